"""The nursery answers what its tenants' learned filters hand over (``seccomp: notify``): refused, counted, told.

The calls of a command beside a tenant (exec) are answered with the tenant's own: what it
leaves behind outlives it. A caller sleeps until it is answered, so a tenant that does
nothing else is held back and not the nursery. When a listener is closed, for whatever
reason, the kernel itself answers ENOSYS and nobody hangs.
"""

from __future__ import annotations

import os

from isochamber.launch import channel, notices, records, refusals, syscalls
from isochamber.launch.constants import SIGSYS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from isochamber.serve.held import Held
    from isochamber.serve.nursery import Nursery

_PERIOD = 1.0  # seconds
_MOST = 250  # calls of a tenant that are answered a period: each costs the nursery some 30 us
_AT_ONCE = 50  # before the other tenants have their turn


class Refusing:
    """The listeners of one tenant, what was refused there, and who is told."""

    def __init__(self, nursery: Nursery, held: Held) -> None:
        self._nursery, self._loop, self._held = nursery, nursery.loop, held
        self._refusals: refusals.Refusals | None = None
        self._refuser: notices.Refuser | None = None
        if held.prepared is not None:
            self._refusals = refusals.Refusals(held.prepared.root, held.name, self.say)
            self._refuser = notices.Refuser(self._refusals, records.as_proc_counts)
        self._listeners: dict[int, notices.Notices] = {}
        self._clients: dict[int, Held] = {}  # listener -> whose launcher hears of it
        self._asked = -1  # the listener that is being answered
        self._deaths = self._reported = self._before = 0
        self._ticking = self._held_back = False

    @property
    def count(self) -> int:
        """How many calls were refused."""
        return self._deaths + (self._refuser.count if self._refuser else 0)

    def add(self, listener: int, caller: Held) -> None:
        """Answer what comes from ``listener``, which the filters of ``caller`` made."""
        if self._refuser is None:
            os.close(listener)
            return
        self._listeners[listener] = notices.Notices(listener, self._refuser)
        self._clients[listener] = caller
        if not self._held_back:
            self._watch(listener)

    def _watch(self, listener: int) -> None:
        self._loop.watch(listener, lambda _happened: self._serve(listener), self._held)

    def _serve(self, listener: int) -> None:
        if not self._ticking:
            self._ticking = True
            self._loop.later(_PERIOD, self._tick)
        self._asked = listener
        if not self._listeners[listener].serve(_AT_ONCE):
            self._close(listener)  # no process of that filter is left
        elif self.count - self._before >= _MOST:
            self._held_back = True
            for other in self._listeners:
                self._loop.unwatch(other, self._held)

    def _tick(self) -> None:
        self._ticking, self._before = False, self.count
        if self.count != self._reported and self._held.status is None:
            self._report("")
        if self._held_back:
            self._held_back = False
            for listener in self._listeners:
                self._watch(listener)

    def _close(self, listener: int) -> None:
        self._loop.unwatch(listener, self._held)
        del self._listeners[listener], self._clients[listener]
        os.close(listener)

    def close(self) -> None:
        """Answer no more."""
        for listener in tuple(self._listeners):
            self._close(listener)

    def died(self, line: str, caller: Held) -> None:
        """Count an end of ``caller`` by a filter, and tell it; its launcher is still there."""
        self._deaths += 1
        self._tell(line, caller)

    def say(self, line: str) -> None:
        """Tell a line to the tenant's log, to the launcher that waits for the caller, and to the supervisor."""
        self._tell(line, self._clients.get(self._asked, self._held))

    def _tell(self, line: str, caller: Held) -> None:
        if self._held.ring is not None:
            self._held.ring.write(b"stderr", f"isochamber: {line}\n".encode("utf-8", "backslashreplace"))
        if caller.client is not None:
            caller.client.said(line)
        self._report(line)

    def _report(self, line: str) -> None:
        self._reported = self.count
        self._nursery.report({"on": "syscall", "key": self._held.key, "refused": self.count, "text": line})


def _of(nursery: Nursery, held: Held) -> Refusing | None:
    owner = nursery.held.get(held.tid) if held.kind == "exec" else held
    if owner is None or owner.status is not None:
        return None
    if owner.refusing is None:
        owner.refusing = Refusing(nursery, owner)
    return owner.refusing


def take(nursery: Nursery, held: Held, number: int) -> None:
    """Copy the listener ``number`` out of a process that waits for that before its program runs; raises OSError."""
    if held.setup is None:
        return
    owner = _of(nursery, held)
    listener = syscalls.pidfd_getfd(held.pidfd, number)
    if owner is None:
        os.close(listener)
    else:
        owner.add(listener, held)
    channel.send_go(held.setup)


def finish(nursery: Nursery, held: Held) -> None:
    """Tell an end by a filter (SIGSYS), and let the listeners of a tenant that has ended go."""
    if held.status is not None and os.WIFSIGNALED(held.status) and os.WTERMSIG(held.status) == SIGSYS:
        owner = nursery.held.get(held.tid)
        if owner is not None and owner.prepared is not None:
            if owner.refusing is None:
                owner.refusing = Refusing(nursery, owner)
            owner.refusing.died(refusals.death(held.name, owner.prepared.entry.seccomp.mode), held)
    if held.kind != "exec" and held.refusing is not None:
        held.refusing.close()
