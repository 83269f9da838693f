"""`isochamber serve` as the benchmarks use it: a supervisor of their own, and requests made over its socket."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import Sample
from benchmarks.world import World
from isochamber.errors import IsochamberError
from isochamber.launch import channel
from isochamber.launch.messages import Word
from isochamber.serve import client

_SECONDS = 60


@contextmanager
def supervisor(world: World) -> Iterator[int]:
    """Run ``isochamber serve`` for the block, and end it with its nursery; gives its process id."""
    former = os.environ.get("ISOCHAMBER_RUN")
    os.environ["ISOCHAMBER_RUN"] = world.environment["ISOCHAMBER_RUN"]  # where the client looks for the socket
    argv = world.python("isochamber", "--root", str(world.root), "serve", "--stop-tenants")
    with (world.scratch / "serve.log").open("wb") as log:
        process = subprocess.Popen(argv, env=world.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + _SECONDS
        while not _answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"the supervisor does not start: {(world.scratch / 'serve.log').read_text()[-200:]}")
            time.sleep(0.02)
        yield process.pid
    finally:
        _end(process, world)
        if former is None:
            del os.environ["ISOCHAMBER_RUN"]
        else:
            os.environ["ISOCHAMBER_RUN"] = former


def _answers() -> bool:
    try:
        ask("version")
    except IsochamberError:
        return False
    return True


def _end(process: "subprocess.Popen[bytes]", world: World) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        process.wait(_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in processes_of(world):  # the nursery of a supervisor that was killed
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes_of(world: World) -> list[int]:
    """Return our processes: those with the run-time directory of this benchmark in their environment, tenants never."""
    mark = f"ISOCHAMBER_RUN={world.environment['ISOCHAMBER_RUN']}".encode()
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and int(path.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
    return found


def ask(verb: str, *tenants: str, **more: Any) -> dict[str, Any]:
    """Ask the supervisor as a client does; raises IsochamberError."""
    end = client.need()
    try:
        names = {"tenants": list(tenants)} if tenants else {}
        return client.ask(end, {"verb": verb, **names, **more})
    finally:
        end.close()


def request(world: World, tenant: str) -> Sample:
    """Have a tenant run that tells when its first instruction was; seconds from just before we connect."""
    reading, writing = os.pipe()
    nothing = os.open(os.devnull, os.O_RDWR)
    ours, theirs = channel.pair()
    try:
        begun = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        end = client.need()
        wanted = {"verb": "run", "root": str(world.root), "tenant": tenant, "argv": [], "terminal": False}
        client.ask(end, wanted, (theirs.fileno(), nothing, writing, nothing))
        end.close()
        theirs.close()
        os.close(writing)
        writing = -1
        told = os.read(reading, 64)
        _wait_for_end(ours, tenant)
        ended = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    except IsochamberError as error:
        raise ValueError(error.line()) from error
    finally:
        ours.close()
        for descriptor in (reading, writing, nothing):
            if descriptor >= 0:
                os.close(descriptor)
    if not told:
        raise ValueError(f"{tenant} said nothing")
    return {"to first instruction": (int(told) - begun) / 1e9, "whole process": (ended - begun) / 1e9}


def _wait_for_end(end: Any, tenant: str) -> None:
    while True:
        word, packet, descriptor = channel.receive(end)
        if descriptor is not None:
            os.close(descriptor)
        if word == Word.FAILED:
            raise channel.failure_of(packet, tenant)
        if word in (Word.ENDED, None):
            return


def pss(pids: Sequence[int]) -> int:
    """Return the bytes of memory that the processes take, each shared page counted by its share (proc(5))."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
    return total
