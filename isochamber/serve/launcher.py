"""The launcher that waits for a `run` or an `exec`, as the nursery holds it: told without ever waiting for it.

It is whoever may talk to the supervisor. It may be dead, stopped or hostile, and has a
copy of our end of the channel: it can take from it what was sent to us, and change its
settings. So every call here is MSG_DONTWAIT. What can't be told shuts the channel down,
which the loop hears as the launcher's end: the consequences are in one place.
"""

from __future__ import annotations

import _socket
import os

from isochamber.errors import EXIT_BAD_INPUT, IsochamberError
from isochamber.launch import channel, messages
from isochamber.launch.messages import Word

_SO_SNDBUFFORCE = 32  # socket(7)
_ROOM = 4 << 20  # bytes: more than is ever said to one launcher, so that one that is stopped misses nothing


class Launcher:
    """The nursery's end of one channel."""

    __slots__ = ("_end",)

    def __init__(self, descriptor: int) -> None:
        """Take ``descriptor`` over; raises IsochamberError when it is no such channel."""
        self._end = channel_of(descriptor)
        try:
            self._end.setsockopt(_socket.SOL_SOCKET, _SO_SNDBUFFORCE, _ROOM)
        except OSError:
            pass  # not allowed in a user namespace: one that is stopped for long may be taken for dead

    def fileno(self) -> int:
        """Return the descriptor, to be watched."""
        return self._end.fileno()

    def hear(self) -> tuple[bytes | None, bytes]:
        """Return the next order's word and its packet; None at the end, b"" when somebody else took it."""
        try:
            word, packet, descriptor = channel.receive(self._end, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b"", b""
        except OSError:
            return None, b""
        if descriptor is not None:
            os.close(descriptor)
        return word, packet

    def started(self, pidfd: int) -> None:
        """Hand over the pidfd of what it waits for."""
        self._tell(Word.STARTED, pidfd)

    def terminal(self, master: int) -> None:
        """Hand over the master of its terminal."""
        self._tell(Word.TERMINAL, master)

    def failed(self, step: str, error: IsochamberError) -> None:
        """Say which step failed, and how."""
        self.pass_on(channel.failure_packet(step, error))

    def pass_on(self, packet: bytes) -> None:
        """Tell it what the tenant's side has said of a failure."""
        self._tell(packet)

    def ended(self, status: int) -> None:
        """Say that it ended with a wait status (wait(2))."""
        self._tell(Word.ENDED + b"%d" % status)

    def said(self, line: str) -> None:
        """Give it a line for its operator; one that does not listen misses it."""
        packet = Word.SAID + line.encode("utf-8", "backslashreplace")
        try:
            self._end.send(packet[: messages.MAXIMUM], _socket.MSG_NOSIGNAL | _socket.MSG_DONTWAIT)
        except OSError:
            pass

    def _tell(self, packet: bytes, descriptor: int | None = None) -> None:
        passed = () if descriptor is None else (descriptor,)
        try:
            self._end.sendmsg([packet], channel.rights(passed), _socket.MSG_NOSIGNAL | _socket.MSG_DONTWAIT)
        except OSError:
            self._hang_up()

    def _hang_up(self) -> None:
        try:
            self._end.shutdown(_socket.SHUT_RDWR)
        except OSError:
            pass  # never connected: its next read says so

    def close(self) -> None:
        """Let it go."""
        self._end.close()


def refuse(client: Launcher | None, error: IsochamberError) -> IsochamberError:
    """Tell the launcher that waits, if one does, that nothing was started for it, and return ``error``."""
    if client is not None:
        client.failed(error.stage, error)
        client.close()
    return error


def channel_of(descriptor: int) -> _socket.socket:
    """Take over ``descriptor``, which a client sent; raises IsochamberError when it is no Unix socket of packets."""
    try:
        end = _socket.socket(fileno=descriptor)
    except OSError:
        os.close(descriptor)
        raise _no_channel() from None
    if end.family != _socket.AF_UNIX or end.type != _socket.SOCK_SEQPACKET:
        end.close()
        raise _no_channel()
    return end


def _no_channel() -> IsochamberError:
    return IsochamberError(
        "the first descriptor is one end of a pair of SOCK_SEQPACKET", stage="serve", exit_code=EXIT_BAD_INPUT
    )
