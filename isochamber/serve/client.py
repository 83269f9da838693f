"""Talking to the supervisor: as lean as the launcher, since `isochamber run` begins here."""

from __future__ import annotations

import _socket
import struct

from isochamber import paths
from isochamber.errors import EXIT_OURS, IsochamberError, exit_code_of
from isochamber.launch import channel, lean, records
from isochamber.launch.messages import Word
from isochamber.launch.running import catches
from isochamber.serve import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

VERSION = 1  # of the protocol
OTHER_ROOT = "other state directory"  # the stage of the error of a supervisor that looks after another one


def connect() -> _socket.socket | None:
    """Return a connection to the supervisor, None when there is none; raises IsochamberError when it is not for us."""
    end = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        end.connect(paths.control_socket())
    except PermissionError as error:
        end.close()
        raise IsochamberError.from_os(
            error, stage="serve", path=paths.control_socket(), hint="be root, or join the supervisor's group"
        ) from error
    except OSError:
        end.close()
        return None
    return end


def need() -> _socket.socket:
    """Return a connection to the supervisor; raises IsochamberError when there is none."""
    end = connect()
    if end is None:
        raise IsochamberError(
            "no supervisor runs", stage="serve", path=paths.control_socket(), hint="start it: isochamber serve"
        )
    return end


def ask(end: _socket.socket, request: dict[str, Any], descriptors: tuple[int, ...] = ()) -> dict[str, Any]:
    """Send a request and return its last answer; raises IsochamberError."""
    *_, last = stream(end, request, descriptors)
    return last


def stream(end: _socket.socket, request: dict[str, Any], descriptors: tuple[int, ...] = ()) -> Iterator[dict[str, Any]]:
    """Send a request and yield its answers, the last of them with "ok"; raises IsochamberError."""
    tell(end, request, descriptors)
    yield from answers(end)


def tell(end: _socket.socket, request: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
    """Send a request; raises IsochamberError."""
    line = (wire.dump({"version": VERSION, **request}) + "\n").encode()
    extra = []
    if descriptors:
        extra = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"={len(descriptors)}i", *descriptors))]
    try:
        sent = end.sendmsg([line], extra, _socket.MSG_NOSIGNAL)
        while sent < len(line):
            sent += end.send(line[sent:], _socket.MSG_NOSIGNAL)
    except OSError as error:
        raise _hung_up(error) from error


def _hung_up(error: OSError) -> IsochamberError:
    return IsochamberError.from_os(error, stage="serve", hint="does the supervisor still run?")


def answers(end: _socket.socket) -> Iterator[dict[str, Any]]:
    """Yield the answers to what was asked, the last of them with "ok"; raises IsochamberError."""
    rest = b""
    try:
        while True:
            data = end.recv(65536)
            if not data:
                raise IsochamberError("the supervisor has hung up", stage="serve", hint="does it still run?")
            *lines, rest = (rest + data).split(b"\n")
            for found in lines:
                answer = lean.parse(found)
                if not isinstance(answer, dict):
                    raise IsochamberError("the supervisor speaks something else", stage="serve")
                if "error" in answer:
                    raise _error(answer["error"])
                yield answer
                if "ok" in answer:
                    return
    except OSError as error:
        raise _hung_up(error) from error


def _error(told: dict[str, Any]) -> IsochamberError:
    return IsochamberError(
        told["what"], stage=told["stage"], tenant=told["tenant"], path=told["path"], errno=told["errno"],
        hint=told["hint"], exit_code=told["exit_code"],
    )  # fmt: skip


class Remote:
    """A tenant, or a command beside one, that the supervisor started for us: what launch.running.Running is nearby."""

    __slots__ = ("_beside", "end", "exit_code", "failure", "master", "pid", "pidfd", "say", "tenant")

    def __init__(self, request: dict[str, Any]) -> None:
        """Have it started with our descriptors 0, 1 and 2; raises IsochamberError."""
        self.tenant: str = request["tenant"]
        self._beside = request["verb"] == "exec"
        self.pid: int | None = None
        self.pidfd: int | None = None
        self.master: int | None = None
        self.failure: IsochamberError | None = None
        self.exit_code: int | None = None
        self.say: Callable[[str], None] | None = None  # prints a line for the operator
        self.end, other = channel.pair()
        control = need()
        try:
            try:
                tell(control, request, (other.fileno(), 0, 1, 2))
            finally:
                other.close()
            # Who holds it says so over the channel, whatever becomes of the supervisor meanwhile.
            if self.end.recv(1, _socket.MSG_PEEK) != Word.STARTED:
                for _ in answers(control):  # a refusal, as a rule: then nobody has the channel any more
                    pass
        finally:
            control.close()

    def hear(self) -> None:
        """Take one message (waits for it) and remember what it says."""
        word, packet, descriptor = channel.receive(self.end)
        if word == Word.STARTED:
            self.pidfd = descriptor
            self.pid = -1 if descriptor is None else records.pid_of(descriptor)
        elif word == Word.TERMINAL:
            self.master = descriptor
        elif word == Word.FAILED:
            self.failure = channel.failure_of(packet, self.tenant)
        elif word == Word.SAID:
            if self.say is not None:
                self.say(packet[1:].decode("utf-8", "replace"))
        elif word == Word.ENDED:
            code = exit_code_of(int(packet[1:]))
            self.exit_code = code if self.failure is None else self.failure.exit_code
        elif word is None:
            if self.failure is None:
                self.failure = IsochamberError(
                    "the supervisor's nursery has ended, and the tenant with it", stage="launch", tenant=self.tenant
                )
            self.exit_code = EXIT_OURS

    def kill(self, number: int) -> None:
        """Have the signal ``number`` sent: its sender is root, we need not be."""
        self._say(Word.SIGNAL + b"%d" % number)

    def catches(self, number: int) -> bool:
        """Say whether it would notice ``number``; what is no PID 1 has the default actions."""
        return self._beside or catches(self.pid, number)

    def freeze(self, *, frozen: bool) -> None:
        """Have it stopped or continued."""
        self._say(Word.FREEZE + (b"1" if frozen else b"0"))

    def _say(self, packet: bytes) -> None:
        try:
            self.end.send(packet, _socket.MSG_NOSIGNAL)
        except OSError:
            pass  # it has ended
