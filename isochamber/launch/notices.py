"""Calls that a tenant's learned filter hands to us: noted and let through while learning, refused and reported else.

seccomp_unotify(2): the caller sleeps until its notification is answered. Only the number
and the registers are looked at, which nobody can change meanwhile; no memory of the tenant
is read. When the listener goes, every such call answers ENOSYS.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from isochamber.launch.filterset import Learning
    from isochamber.launch.refusals import Refusals

_RECV, _SEND, _SET_FLAGS = 0xC0502100, 0xC0182101, 0x40082104  # include/uapi/linux/seccomp.h
_SYNC_WAKE_UP = 1  # the answer wakes the caller on our own processor: Linux 6.6, twice as fast
_NOTICE, _ANSWER = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_CONTINUE = 1
_LOW_32_BITS = 0xFFFFFFFF
_MOST_USES = 2000  # different ones that a run may note: a large program makes a few hundred
_AT_ONCE = 1000  # notifications before signals and the terminal have their turn


class Notices:
    """A listener, and who answers: called with pid, number and arguments, returns an errno or 0 to let it through."""

    def __init__(self, listener: int, answer: Callable[[int, int, tuple[int, ...]], int]) -> None:
        self.listener = listener
        self._answer = answer
        self._poller = select.poll()
        self._poller.register(listener, select.POLLIN)
        try:
            fcntl.ioctl(listener, _SET_FLAGS, _SYNC_WAKE_UP)
        except OSError:
            pass  # an older kernel

    def serve(self, most: int = _AT_ONCE) -> bool:
        """Answer what is waiting, ``most`` of it at once; returns False when nobody is left who could ask."""
        for _ in range(most):
            ready = self._poller.poll(0)
            if not ready:
                return True
            if not ready[0][1] & select.POLLIN:
                return False
            self._one()
        return True

    def _one(self) -> None:
        notice = bytearray(_NOTICE.size)
        try:
            fcntl.ioctl(self.listener, _RECV, notice)
        except (FileNotFoundError, InterruptedError):
            return  # the caller was killed meanwhile
        identity, pid, _flags, number, _architecture, _address, *arguments = _NOTICE.unpack(notice)
        try:
            error = self._answer(pid, number, tuple(arguments))
        except Exception:
            error = errno.EPERM  # never let through for a mistake of ours
            self._reply(identity, error)
            raise
        self._reply(identity, error)

    def _reply(self, identity: int, error: int) -> None:
        try:
            fcntl.ioctl(self.listener, _SEND, _ANSWER.pack(identity, 0, -error, 0 if error else _CONTINUE))
        except (FileNotFoundError, InterruptedError):
            pass


class Learner:
    """Notes each call once, with the argument that matters, and lets it through unless no tenant may make it."""

    def __init__(self, learning: Learning) -> None:
        self._learning = learning
        self._seen: set[tuple[int, int, str]] = set()

    def __call__(self, _pid: int, number: int, arguments: tuple[int, ...]) -> int:
        """Answer one call."""
        index = self._learning.matters.get(number)
        value = -1 if index is None else arguments[index] & _LOW_32_BITS
        name, error = self._refused(number, arguments)
        if (number, value, name) not in self._seen:
            if len(self._seen) >= _MOST_USES:
                return errno.EPERM  # or a hostile program would fill our memory with values of ioctl's argument
            self._seen.add((number, value, name))
            # At once: what was noted is kept when we are killed.
            os.write(self._learning.notes, f"{number} {value} {name}\n".encode())
        return error

    def _refused(self, number: int, arguments: tuple[int, ...]) -> tuple[str, int]:
        """Return the name and the errno of the row that refuses the call, "-" and 0 where none does."""
        for name, error, conditions in self._learning.refused.get(number, ()):
            if all(arguments[index] & mask == value for index, mask, value in conditions):
                return name, error
        return "-", 0


class Refuser:
    """Refuses, and reports."""

    def __init__(self, refusals: Refusals, host_pid: Callable[[int], int] = int) -> None:
        """``host_pid`` turns a pid of ours into the one that /proc has, where these differ."""
        self._refusals, self._host_pid = refusals, host_pid
        self.count = 0

    def __call__(self, pid: int, number: int, arguments: tuple[int, ...]) -> int:
        """Answer one call."""
        self.count += 1
        self._refusals.add(number, arguments, self._program(pid))
        return errno.EPERM

    def _program(self, pid: int) -> str:
        try:
            return program_of(self._host_pid(pid))
        except OSError:
            return program_of(-1)


def program_of(pid: int) -> str:
    """Return what the process ``pid`` runs, for a message."""
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return "a program that has ended"
