"""A client in the foreground: what the supervisor started for it, with its descriptors, signals and terminal.

`isochamber run` begins here, so it imports next to nothing; a test counts.
"""

import _socket
import os

from isochamber.errors import EXIT_OURS, IsochamberError, exit_code_of
from isochamber.launch import channel
from isochamber.launch.foreground import Foreground
from isochamber.launch.messages import Word
from isochamber.launch.words import on_a_terminal
from isochamber.serve import client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def run_tenant(root: str, tenant: str, argv: list[str], *, no_terminal: bool) -> int | None:
    """Run a tenant through the supervisor with our descriptors; returns its exit code. Raises IsochamberError.

    None: there is no supervisor, or it looks after another state directory.
    """
    control = client.connect()
    if control is None:
        return None
    wants = not no_terminal and on_a_terminal()
    request = {"verb": "run", "root": root, "tenant": tenant, "argv": argv, "terminal": wants}
    return _unless_of_another_root(lambda: run(request, control))


def take_over(tenant: str, end: int, control: int, pidfd: int) -> int | None:
    """Go on with what run.pl has asked for, as :func:`run_tenant` would have; ``end`` is its end of the channel.

    ``control`` is its connection while nothing has started, -1 after that; ``pidfd`` is the tenant's, -1 if unknown.
    """

    def begun() -> Remote:
        channel_end = _socket.socket(fileno=end)
        if control >= 0:
            await_start(channel_end, _socket.socket(fileno=control))
        return Remote(tenant, channel_end, pidfd=pidfd if pidfd >= 0 else None)

    for descriptor in (end, control, pidfd):
        if descriptor >= 0:
            os.set_inheritable(descriptor, False)
    return _unless_of_another_root(lambda: _supervise(begun()))


def _unless_of_another_root(do: "Callable[[], int]") -> int | None:
    try:
        return do()
    except IsochamberError as error:
        if error.stage == client.OTHER_ROOT:
            return None
        raise


def run(request: "dict[str, Any]", control: _socket.socket | None = None) -> int:
    """Start what ``request`` says with our descriptors, signals and terminal; returns its exit code.

    ``control`` is a connection to the supervisor if there is one. Raises IsochamberError.
    """
    if os.isatty(0) and os.environ.get("TERM"):
        request["term"] = os.environ["TERM"]
    return _supervise(order(control or client.need(), request))


def _supervise(started: "Remote") -> int:
    shown = Foreground(started)
    started.say = shown.say
    code = shown.supervise()
    if started.failure is not None:
        raise started.failure
    return code


def order(control: _socket.socket, request: "dict[str, Any]") -> "Remote":
    """Have it started with our descriptors 0, 1, 2, over ``control``, which is closed. Raises IsochamberError."""
    end, other = channel.pair()
    try:
        client.tell(control, request, (other.fileno(), 0, 1, 2))
    except IsochamberError:
        control.close()
        raise
    finally:
        other.close()
    await_start(end, control)
    return Remote(request["tenant"], end, beside=request["verb"] == "exec")


def await_start(end: _socket.socket, control: _socket.socket) -> None:
    """Return when whoever holds what was ordered has said so; ``control`` is closed. Raises IsochamberError."""
    try:
        # Who holds it says so over the channel, whatever becomes of the supervisor meanwhile.
        if end.recv(1, _socket.MSG_PEEK) != Word.STARTED:
            for _ in client.answers(control):  # a refusal, as a rule: then nobody has the channel any more
                pass
    finally:
        control.close()


class Remote:
    """A tenant, or a command beside one, that the supervisor started for us: what launch.running.Running is nearby."""

    __slots__ = ("_beside", "_pidfd", "end", "exit_code", "failure", "master", "say", "tenant")

    def __init__(self, tenant: str, end: _socket.socket, *, beside: bool = False, pidfd: int | None = None) -> None:
        """``end`` is our end of the channel; ``pidfd`` where STARTED was heard already."""
        self.tenant, self.end = tenant, end
        self._beside = beside
        self._pidfd = pidfd
        self.master: int | None = None
        self.failure: IsochamberError | None = None
        self.exit_code: int | None = None
        self.say: Callable[[str], None] | None = None  # prints a line for the operator

    def hear(self) -> None:
        """Take one message (waits for it) and remember what it says."""
        word, packet, descriptor = channel.receive(self.end)
        if word == Word.STARTED:
            self._pidfd = descriptor
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

    @property
    def pid(self) -> int | None:
        """Its first process as the host counts, None before it is there: only who signals it or types asks for it."""
        if self._pidfd is None:
            return None
        from isochamber.launch import records  # noqa: PLC0415 - most runs end without that

        return records.pid_of(self._pidfd)

    def kill(self, number: int) -> None:
        """Have the signal ``number`` sent: its sender is root, we need not be."""
        self._say(Word.SIGNAL + b"%d" % number)

    def catches(self, number: int) -> bool:
        """Say whether it would notice ``number``; what is no PID 1 has the default actions."""
        if self._beside:
            return True
        from isochamber.launch import records  # noqa: PLC0415 - most runs end without a signal

        return records.catches(self.pid, number)

    def freeze(self, *, frozen: bool) -> None:
        """Have it stopped or continued."""
        self._say(Word.FREEZE + (b"1" if frozen else b"0"))

    def _say(self, packet: bytes) -> None:
        try:
            self.end.send(packet, _socket.MSG_NOSIGNAL)
        except OSError:
            pass  # it has ended
