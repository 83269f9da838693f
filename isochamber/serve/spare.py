"""The process that becomes the next tenant's, set up ahead: a start that somebody waits for does not wait for that.

It has closed everything of the nursery's but one end of a channel, knows nothing of any
tenant, and ends when that end hangs up. It is the host's root as the nursery is, for it is
to mount; what the tenant must not have it gives up in the same steps as every start
(start.tenant_side). While it waits it has done what no tenant decides: nobody can look
into it, and it has IPC and UTS namespaces of its own.

It is given the order as soon as that comes, to read while the nursery takes the lock. Then
it clones its one child into the tenant's v2 group and a PID namespace, and ends: the child
is the tenant. To move a process into a group of the v2 tree takes 5 to 15 ms, to clone
one into it less than one. The child's parent is the nursery. It mounts while the nursery
makes the other groups, in a mount namespace that it takes only then, so that what the host
has mounted meanwhile is in it.
"""

from __future__ import annotations

import _socket
import errno
import gc
import os
import sys

from isochamber import paths
from isochamber.errors import EXIT_OURS, IsochamberError
from isochamber.launch import capabilities, cgroup, channel, records, seccomp, start, syscalls
from isochamber.launch import entry as entry_module
from isochamber.launch.entry import Entry
from isochamber.launch.lean import signal
from isochamber.launch.messages import Word
from isochamber.serve import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# The PID namespace is the child's, and the mount namespace is taken when there is an order.
_AHEAD = start.TENANT_NAMESPACES & ~(syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNS)


class Spare:
    """The waiting process, and then the tenant's, as the nursery holds it."""

    __slots__ = ("_asked", "_waiting", "_waiting_fd", "end", "host_pid", "pid", "pidfd", "start_time")

    def __init__(self, namespaces: dict[str, int]) -> None:
        """Fork it; ``namespaces`` are the host's (verify.namespaces). Raises IsochamberError, OSError."""
        self.end, theirs = channel.pair()
        highest = capabilities.last()
        self.pid = self.pidfd = self.host_pid = -1  # of the tenant's first process, once it is born
        self.start_time = 0
        self._asked = False  # to clone
        try:
            self._waiting, self._waiting_fd = syscalls.clone3(0)
        except OSError as error:
            self.end.close()
            theirs.close()
            raise IsochamberError.from_os(error, stage="launch") from error
        if self._waiting == 0:
            _become(theirs, namespaces, highest)
        theirs.close()

    def read(self, packet: bytes) -> None:
        """Let it read the order. Raises OSError."""
        wire.send_packet(self.end, packet)

    def clone_into(self, group: str | None) -> None:
        """Let it clone the tenant's first process, into the v2 ``group`` if there is one. Raises OSError."""
        wire.send(self.end, {"group": group})
        self._asked = True

    def go(self, prepared: start.Prepared, ours: list[int]) -> None:
        """Let that make its mounts, with ``ours`` as its descriptors 0, 1 and 2. Raises OSError."""
        told = {"notify": prepared.notify, "v1": prepared.groups.v1}
        wire.send(self.end, told, (*ours, prepared.user, prepared.net))

    def born(self) -> None:
        """Return when the tenant's first process is there; raises IsochamberError, OSError."""
        self._asked = False
        word, packet, pidfd = channel.receive(self.end)
        if word == Word.FAILED:
            raise channel.failure_of(packet, None)
        if word != Word.STARTED:
            raise IsochamberError("the process that waited for it has ended", stage="nursery", hint="try again")
        self.pid = int(packet[1:])
        if pidfd is None:
            raise OSError(errno.EMFILE, "no descriptor is left to hold it by")
        self.pidfd = pidfd
        self.host_pid = records.pid_of(pidfd)
        self.start_time = records.start_time(self.host_pid)

    def forget_who_waited(self) -> None:
        """Reap the process that waited, which has ended or is about to. Raises OSError."""
        os.waitpid(self._waiting, 0)
        os.close(self._waiting_fd)

    def discard(self) -> None:
        """End it, and its child if there is one."""
        if self._asked:
            try:
                self.born()
            except (IsochamberError, OSError):
                pass  # it has none
        for pid, pidfd in ((self._waiting, self._waiting_fd), (self.pid, self.pidfd)):
            if pid > 0:  # a child of ours that nobody has reaped: the number is its own
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            if pidfd >= 0:
                os.close(pidfd)
        self.end.close()


def entry_of(order: dict[str, Any], text: bytes) -> Entry:
    """Return what an order wants to be started, by the ``text`` of its entry; raises IsochamberError."""
    entry = entry_module.parse(text)
    if order.get("argv"):
        entry.argv = order["argv"]
    entry.env.update(order.get("env") or {})
    return entry


def _become(end: _socket.socket, namespaces: dict[str, int], highest: int) -> None:
    """The waiting process itself, and its child. Never returns."""
    try:
        gc.disable()  # what it does takes milliseconds
        close_all_but(end.fileno())
        score(0)
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
        syscalls.unshare(_AHEAD)
        packet, _ = wire.receive_json(end)
        prepared = _read(packet) if packet else None
        if prepared is not None:
            prepared.host_namespaces, prepared.highest_capability = namespaces, highest
            if _is_the_child(end) and _hears_the_rest(prepared, end):
                start.tenant_side(prepared, end)
    except (IsochamberError, OSError) as error:
        told = error if isinstance(error, IsochamberError) else IsochamberError.from_os(error, stage="launch")
        channel.send_failure(end, "read the order", told)
    except BaseException:  # a bug of ours: in the log, and the end of the channel says that nothing was started
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(EXIT_OURS)


def _read(packet: bytes) -> start.Prepared:
    """Return what the order alone decides. Raises IsochamberError."""
    head, _, text = packet.partition(b"\n")
    order = wire.parse(head)
    made = start.Prepared.__new__(start.Prepared)
    made.root, made.entry = order["root"], entry_of(order, text)
    made.terminal, made.waits, made.spare, made.lock = bool(order.get("terminal")), order["kind"] == "warm", True, -1
    made.filters = seccomp.Filters(made.root, made.entry.seccomp, listens=True)
    return made


def _is_the_child(end: _socket.socket) -> bool:
    """Clone the tenant's first process when the nursery says so, and say which it is: True in it, False in us."""
    told, _ = wire.receive(end)
    if told is None:
        return False  # nobody wants it any more
    path = told["group"]
    group = None if path is None else os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    is_told, tell = os.pipe()
    pid, pidfd = syscalls.clone3(syscalls.CLONE_NEWPID | syscalls.CLONE_PARENT, cgroup_fd=group)
    if pid:
        channel.send_started(end, pidfd, pid)
        os.write(tell, b"1")
        return False
    os.close(tell)
    wanted = os.read(is_told, 1) == b"1"  # not before: what it says must come after what its parent does
    for descriptor in (is_told, *(() if group is None else (group,))):
        os.close(descriptor)
    return wanted


def _hears_the_rest(made: start.Prepared, end: _socket.socket) -> bool:
    """Take what the nursery has prepared; False when it is not wanted any more. Raises OSError."""
    syscalls.unshare(syscalls.CLONE_NEWNS)  # only now: what the host has mounted meanwhile, a disk image too, is in it
    told, descriptors = wire.receive(end)
    if told is None:
        return False
    made.groups = cgroup.Groups(told["v1"], None)
    made.notify = told["notify"]
    if made.notify is not None:
        made.entry.env["NOTIFY_SOCKET"] = paths.NOTIFY_INSIDE
    *standard, made.user, made.net = descriptors
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
        os.close(descriptor)
    return True


def close_all_but(*kept: int) -> None:
    """Close every descriptor above 2 but ``kept``: at once, and not at the exec.

    With hundreds of tenants it is more than the tenant's own limit of open files lets it have.
    """
    last = 2
    for descriptor in sorted(kept):
        if descriptor > last + 1:
            syscalls.close_range(last + 1, descriptor - 1)
        last = max(last, descriptor)
    syscalls.close_range(last + 1)


def score(value: int) -> None:
    """Say how likely we are killed when memory is short (proc_pid_oom_score_adj(5)); not allowed everywhere."""
    try:
        descriptor = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, b"%d" % value)
        finally:
            os.close(descriptor)
    except OSError:
        pass
