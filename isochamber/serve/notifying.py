"""What a tenant with ``ready: notify`` says of itself (sd_notify(3)): READY once, and its last STATUS.

It may say more than anybody wants to hear: it is listened to ten times a second at most,
and a flood waits in its own send(2). A tenant that passes descriptors along (SCM_RIGHTS)
is not listened to any more. Whoever takes such a message out of the queue may be the last
to hold what came with it, and waits as long as the tenant likes: for a TCP socket with
SO_LINGER, hours. The kernel can't be asked to refuse them (before SO_PASSRIGHTS, Linux
6.16), so every message is peeked at first, and the queue is closed by a process of its own.
"""

from __future__ import annotations

import _socket
import os

from isochamber.errors import IsochamberError
from isochamber.launch import syscalls
from isochamber.serve import spare
from isochamber.serve.loop import readable
from isochamber.serve.tending import told_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from isochamber.serve.held import Held
    from isochamber.serve.nursery import Nursery

_AT_ONCE = 16  # messages
_PERIOD = 0.1  # seconds
_LONGEST = 4096  # bytes of a message
_TEXT = 200  # characters


class Notifying:
    """The host's end of one tenant's $NOTIFY_SOCKET."""

    def __init__(self, nursery: Nursery, held: Held, path: str) -> None:
        """Bind it to ``path``. Raises OSError."""
        self.path = path
        self._nursery, self._loop, self._held = nursery, nursery.loop, held
        self._text: str | None = None  # as it was reported
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        kind = _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
        self._end: _socket.socket | None = _socket.socket(_socket.AF_UNIX, kind)
        self._end.bind(path)
        os.chmod(path, 0o666)  # noqa: S103 - its directory is root's alone: the tenant's bind is the only way to it

    def watch(self) -> None:
        """Listen."""
        if self._end is not None and self._held.status is None:
            self._loop.watch(self._end.fileno(), self._hear, self._held)

    def _hear(self, _happened: int) -> None:
        """Take some messages, report what is news, and listen again in a while."""
        if self._end is None:
            return
        text = self._text
        for _ in range(_AT_ONCE):
            try:
                _, _, flags, _ = self._end.recvmsg(1, 0, _socket.MSG_PEEK)
                if flags & _socket.MSG_CTRUNC:
                    self._no_more()
                    break
                packet = self._end.recv(_LONGEST)
            except OSError:
                break
            for line in packet.split(b"\n"):
                key, _, value = line.partition(b"=")
                if key == b"READY" and value == b"1":
                    self._ready()
                elif key == b"STATUS":
                    text = value.decode("utf-8", "replace")[:_TEXT]
        if text != self._text:
            self._text = text
            self._report({"on": "status", "text": text})
        if self._end is not None:
            self._loop.unwatch(self._end.fileno(), self._held)
            self._loop.later(_PERIOD, self.watch, self._held)

    def _ready(self) -> None:
        if not self._held.ready:
            self._held.ready = True
            self._report({"on": "ready"})

    def _report(self, report: dict[str, Any]) -> None:
        self._nursery.report({**report, "key": self._held.key})

    def _no_more(self) -> None:
        self.close()
        error = IsochamberError(
            "passed descriptors to its $NOTIFY_SOCKET: it is not listened to any more", stage="notify",
            tenant=self._held.name,
        )  # fmt: skip
        if self._held.ring is not None:
            self._held.ring.write(b"stderr", f"isochamber: {error.line()}\n".encode())
        self._report({"on": "left", "error": told_of(error)})

    def close(self) -> None:
        """Close and remove it; what nobody has read is closed by somebody else."""
        end, self._end = self._end, None
        if end is None:
            return
        self._loop.unwatch(end.fileno(), self._held)
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        try:
            if readable(end.fileno()):
                _close_elsewhere(self._nursery, end.fileno())
        except OSError:
            end.detach()  # nobody can be forked: better a descriptor lost than a close that waits
        end.close()


def _close_elsewhere(nursery: Nursery, descriptor: int) -> None:
    """Fork a process that holds ``descriptor`` until the nursery has closed it, and ends: no end waits for a socket."""
    wait, go = os.pipe()
    pid, pidfd = syscalls.clone3(0)
    if pid == 0:
        try:
            spare.close_all_but(descriptor, wait)
            os.read(wait, 1)
        finally:
            os._exit(0)
    os.close(wait)
    nursery.loop.later(0, lambda: os.close(go))  # after this round, in which the nursery's own copy is closed

    def ended(_happened: int) -> None:
        nursery.loop.unwatch(pidfd)
        os.close(pidfd)
        os.waitpid(pid, 0)

    nursery.loop.watch(pidfd, ended)
