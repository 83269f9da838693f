"""The supervisor's end of its nursery: found or started, orders out, reports in."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.serve import wire

Report = dict[str, Any]


def error_of(told: dict[str, Any]) -> IsochamberError:
    """Return an error as it travels as an exception again."""
    return IsochamberError(
        told["what"], stage=told["stage"], tenant=told.get("tenant"), path=told.get("path"), errno=told.get("errno"),
        hint=told.get("hint"), exit_code=told.get("exit_code") or 125,
    )  # fmt: skip


def told(error: IsochamberError) -> dict[str, Any]:
    """Return ``error`` as it travels."""
    return {
        "what": error.what, "stage": error.stage, "tenant": error.tenant, "path": error.path, "errno": error.errno,
        "hint": error.hint, "exit_code": error.exit_code,
    }  # fmt: skip


def former() -> list[str]:
    """Return the sockets of nurseries that were replaced, and keep their tenants until they end."""
    directory = os.path.dirname(paths.serve_file("nursery"))
    return sorted(f"{directory}/{name}" for name in os.listdir(directory) if name.removeprefix("nursery-").isdecimal())


def connect(path: str | None = None) -> socket.socket | None:
    """Return a connection to the nursery at ``path`` (default: who takes starts), None when nobody is there."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        end.connect(path or paths.serve_file("nursery"))
    except OSError:
        end.close()
        return None
    return end


def find_or_start() -> tuple[socket.socket, bool]:
    """Return a connection to the nursery and whether it is a new one; the caller holds the supervisors' lock."""
    end = connect()
    if end is not None:
        return end, False
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__main__.py")
    words = [sys.executable, "-I", "-S", program, "nursery"]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    end = connect()
    if end is None:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise IsochamberError(f"the nursery did not start: {last}", stage="serve", hint="run as root")
    return end, True


class HungUpError(IsochamberError):
    """The nursery has hung up before it answered: nobody knows what became of the order."""


class Link:
    """One connection; ``on_report`` gets what no order waits for, ``on_end`` is called when the nursery dies."""

    def __init__(self, end: socket.socket, on_report: Callable[[Report], None], on_end: Callable[[], None]) -> None:
        end.setblocking(False)
        self._end, self._on_report, self._on_end = end, on_report, on_end
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Report]] = {}
        self._queue: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._loop.add_reader(end.fileno(), self._read)

    def _read(self) -> None:
        while True:
            try:
                report, descriptors = wire.receive(self._end)
            except BlockingIOError:
                return
            except (OSError, ValueError):
                report, descriptors = None, []
            wire.close_all(descriptors)
            if report is None:
                self.close()
                self._on_end()
                return
            self._take(report)

    def _take(self, report: Report) -> None:
        if report["on"] in ("started", "running", "ready", "ended", "held", "status", "left", "syscall"):
            self._on_report(report)
        answer = self._answers.pop(report.get("id") or 0, None)
        if answer is not None and not answer.done():
            if report["on"] == "refused":
                answer.set_exception(error_of(report["error"]))
            else:
                answer.set_result(report)

    def tell(self, order: Report, descriptors: tuple[int, ...] = (), entry: bytes = b"") -> None:
        """Send an order that nobody waits for."""
        packet = wire.with_entry(order, entry)
        self._queue.append((packet, tuple(os.dup(descriptor) for descriptor in descriptors)))
        self._flush()

    def _flush(self) -> None:
        while self._queue:
            packet, descriptors = self._queue[0]
            try:
                wire.send_packet(self._end, packet, descriptors)
            except BlockingIOError:
                self._loop.add_writer(self._end.fileno(), self._flush)
                return
            except OSError:
                pass  # its end is read as well
            self._queue.popleft()
            wire.close_all(list(descriptors))
        if self._end.fileno() >= 0:
            self._loop.remove_writer(self._end.fileno())

    async def ask(self, order: Report, descriptors: tuple[int, ...] = (), entry: bytes = b"") -> Report:
        """Send an order, with an entry if it is to start one, and return its answer; raises IsochamberError."""
        number = next(self._ids)
        answer: asyncio.Future[Report] = self._loop.create_future()
        self._answers[number] = answer
        self.tell({**order, "id": number}, descriptors, entry)
        return await answer

    def close(self) -> None:
        """Hang up; whoever waits for an answer gets an error."""
        if self._end.fileno() >= 0:
            self._loop.remove_reader(self._end.fileno())
            self._loop.remove_writer(self._end.fileno())
            self._end.close()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(HungUpError("the nursery has hung up", stage="serve"))
        self._answers.clear()
        for _, descriptors in self._queue:
            wire.close_all(list(descriptors))
        self._queue.clear()
