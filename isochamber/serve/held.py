"""One tenant (or command beside one) as the nursery holds it: its descriptors, and what becomes of its output."""

from __future__ import annotations

import _socket
import os
import stat
import time

from isochamber.errors import EXIT_BAD_INPUT, IsochamberError
from isochamber.launch import cgroup, keeper, records
from isochamber.launch.lean import signal
from isochamber.serve import journal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from isochamber.launch.start import Prepared
    from isochamber.serve.launcher import Launcher
    from isochamber.serve.notifying import Notifying
    from isochamber.serve.refusing import Refusing
    from isochamber.serve.ring import Ring

_CHUNK = 65536
_STREAMS = {1: b"stdout", 2: b"stderr"}


class Held:
    """A process that the nursery started, until the supervisor has been told of its end."""

    __slots__ = (
        "attached", "client", "ended_at", "failure", "fds", "host_pid", "key", "kind", "left_out", "master", "name",
        "note", "notify", "pid", "pidfd", "pipes", "prepared", "ready", "refusing", "ring", "running", "setup",
        "start_time", "started_at", "status", "tid",
    )  # fmt: skip

    def __init__(self, key: str, kind: str, tid: str, name: str) -> None:
        self.key = key  # the tid, or for a command beside the tenant "tid/number"
        self.kind = kind  # "service", "run", "warm" or "exec"
        self.tid = tid
        self.name = name
        self.prepared: Prepared | None = None  # None once it has been cleaned up
        self.pid = self.host_pid = self.pidfd = -1
        self.start_time = 0
        self.started_at = time.time()  # seconds since the epoch, for people
        self.running = False  # its program runs: the exec has been done
        self.ready = False
        self.setup: _socket.socket | None = None  # to the tenant's side, until its exec
        self.client: Launcher | None = None  # of a "run" or "exec"
        self.pipes: dict[int, int] = {}  # descriptor that is read -> 1 or 2
        self.master: int | None = None  # its terminal, where nobody but us holds it
        self.ring: Ring | None = None
        self.notify: Notifying | None = None
        self.refusing: Refusing | None = None  # once a learned filter in it hands calls over
        self.attached: list[_socket.socket] = []
        self.left_out = 0  # bytes that attached clients were too slow for
        self.status: int | None = None  # wait(2)
        self.ended_at: float | None = None
        self.failure: dict[str, Any] | None = None
        self.note: Any = None  # the supervisor's, given back to the next one
        self.fds: set[int] = set()  # what of it the loop watches

    def describe(self) -> dict[str, Any]:
        """Return what a supervisor needs to know of it."""
        return {
            "key": self.key, "kind": self.kind, "tid": self.tid, "name": self.name, "pid": self.host_pid,
            "start_time": self.start_time, "started_at": self.started_at, "running": self.running,
            "ready": self.ready, "status": self.status, "ended_at": self.ended_at, "failure": self.failure,
            "cgroup": self.prepared.groups.v2 if self.prepared else None,
            "cgroups": self.prepared.groups.v1 if self.prepared else {}, "note": self.note,
            "lost": self.ring.failed if self.ring else 0, "terminal": self.master is not None,
            "refused": self.refusing.count if self.refusing else 0,
        }  # fmt: skip

    def kill(self, number: int) -> None:
        """Send a signal to its first process; one that has ended is fine."""
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, number)
            except ProcessLookupError:
                pass

    def freeze(self, *, frozen: bool) -> None:
        """Stop or continue all of the tenant."""
        group = self.prepared.groups.v2 if self.prepared and self.kind != "exec" else None
        if group is not None:
            try:
                cgroup.freeze(group, frozen=frozen)
            except FileNotFoundError:
                pass  # it has just ended
            else:
                return
        self.kill(signal.SIGSTOP if frozen else signal.SIGCONT)

    def take_output(self, descriptor: int) -> bool:
        """Read what is there on one of its pipes or its terminal, and keep it; False at the end of it."""
        number = self.pipes[descriptor]
        try:
            data = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            return False  # EIO: the last process has closed its terminal
        if not data:
            return False
        if self.ring is not None:
            self.ring.write(_STREAMS[number], data)
            entry = self.prepared.entry if self.prepared else None
            if entry is not None and entry.service is not None and entry.service.journald:
                journal.send(self.name, self.tid, self.host_pid, number, data)
        for end in tuple(self.attached):
            self._show(end, b"%d" % number + data)
        return True

    def _show(self, end: _socket.socket, packet: bytes) -> None:
        try:
            end.send(packet, _socket.MSG_NOSIGNAL | _socket.MSG_DONTWAIT)
        except BlockingIOError:
            self.left_out += len(packet) - 1  # the log has it; a tenant never waits for who looks on
        except OSError:
            pass  # it hangs up: the loop will see that

    def clean_up(self) -> None:
        """Remove what its start made and let go of its lock; raises OSError when something stays."""
        prepared, self.prepared = self.prepared, None
        if self.notify is not None:
            self.notify.close()
            self.notify = None
        if prepared is None or self.kind == "exec":
            return
        try:
            keeper.clean(prepared)
        finally:
            records.unlock(prepared.lock)

    def close(self) -> None:
        """Close everything of it that is still open."""
        for descriptor in (*self.pipes, self.pidfd):
            if descriptor >= 0:
                os.close(descriptor)
        self.pipes.clear()
        self.pidfd = -1
        self.master = None
        for end in (self.setup, self.client, *self.attached):
            if end is not None:
                end.close()
        self.setup = self.client = None
        self.attached.clear()
        if self.ring is not None:
            self.ring.close()
            self.ring = None


def stdio(kind: str, descriptors: list[int]) -> tuple[list[int], dict[int, int]]:
    """Return (descriptors 0, 1, 2 for the tenant, what of them we read): the client's own, or pipes of ours."""
    if kind in ("run", "exec") and len(descriptors) == 3:
        for descriptor in descriptors:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise IsochamberError(  # a way out of its root
                    "a directory is no standard descriptor for a tenant", stage="launch", exit_code=EXIT_BAD_INPUT
                )
        return list(descriptors), {}
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    if kind == "exec":
        return [nothing, os.dup(nothing), os.dup(nothing)], {}
    out_read, out_write = os.pipe()
    error_read, error_write = os.pipe()
    os.set_blocking(out_read, False)
    os.set_blocking(error_read, False)
    return [nothing, out_write, error_write], {out_read: 1, error_read: 2}
