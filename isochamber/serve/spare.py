"""The process that becomes the next tenant, forked ahead: a start that somebody waits for does not wait for fork(2).

It is PID 1 of a PID namespace of its own inside the nursery's, has closed everything of
the nursery's but one end of a channel, knows nothing of any tenant, and ends when that
end hangs up. It is the host's root as the nursery is, for it is to mount; what the tenant
must not have it gives up in the same steps as every start (start.tenant_side). While it
waits it has done what no tenant decides: it is closed to others, in a session and in IPC
and UTS namespaces of its own. Its mount namespace it takes when there is an order, so
that what the host has mounted meanwhile is in it.

It is given the order as soon as that comes, to read while the nursery prepares the start,
and then the descriptors; it mounts while the nursery makes the groups.
"""

from __future__ import annotations

import _socket
import gc
import os
import sys

from isochamber import paths
from isochamber.errors import EXIT_OURS, IsochamberError
from isochamber.launch import capabilities, cgroup, channel, records, seccomp, start, syscalls
from isochamber.launch import entry as entry_module
from isochamber.launch.entry import Entry
from isochamber.launch.lean import signal
from isochamber.serve import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# All but the PID namespace, which it was forked into, and the mounts.
_AHEAD = start.TENANT_NAMESPACES & ~(syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNS)


class Spare:
    """The waiting process, as the nursery holds it."""

    __slots__ = ("end", "host_pid", "pid", "pidfd", "start_time")

    def __init__(self, namespaces: dict[str, int]) -> None:
        """Fork it; ``namespaces`` are the host's (verify.namespaces). Raises IsochamberError, OSError."""
        self.end, theirs = channel.pair()
        highest = capabilities.last()
        try:
            self.pid, self.pidfd = syscalls.clone3(syscalls.CLONE_NEWPID)
        except OSError as error:
            self.end.close()
            theirs.close()
            raise IsochamberError.from_os(
                error, stage="launch", hint="are namespaces enabled on this kernel?"
            ) from error
        if self.pid == 0:
            _become(theirs, namespaces, highest)
        theirs.close()
        try:
            self.host_pid = records.pid_of(self.pidfd)
            self.start_time = records.start_time(self.host_pid)
        except OSError:
            self.discard()  # no descriptor is left to ask with: it would stay for ever
            raise

    def read(self, packet: bytes) -> None:
        """Let it read the order. Raises OSError."""
        wire.send_packet(self.end, packet)

    def go(self, prepared: start.Prepared, ours: list[int]) -> None:
        """Let it make its mounts, with ``ours`` as its descriptors 0, 1 and 2. Raises OSError."""
        told = {"notify": prepared.notify, "v1": prepared.groups.v1}
        wire.send(self.end, told, (*ours, prepared.user, prepared.net))

    def discard(self) -> None:
        """End it."""
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.end.close()


def entry_of(order: dict[str, Any], text: bytes) -> Entry:
    """Return what an order wants to be started, by the ``text`` of its entry; raises IsochamberError."""
    entry = entry_module.parse(text)
    if order.get("argv"):
        entry.argv = order["argv"]
    entry.env.update(order.get("env") or {})
    return entry


def _become(end: _socket.socket, namespaces: dict[str, int], highest: int) -> None:
    """The waiting process itself. Never returns."""
    try:
        gc.disable()  # what it does takes milliseconds
        close_all_but(end.fileno())
        score(0)
        start.close_to_others()
        syscalls.unshare(_AHEAD)
        packet, _ = wire.receive_json(end)
        prepared = _prepared(end, packet) if packet else None
        if prepared is not None:
            prepared.host_namespaces, prepared.highest_capability = namespaces, highest
            start.tenant_side(prepared, end)
    except IsochamberError as error:
        channel.send_failure(end, "read the order", error)
    except BaseException:  # a bug of ours: in the log, and the end of the channel says that nothing was started
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(EXIT_OURS)


def _prepared(end: _socket.socket, packet: bytes) -> start.Prepared | None:
    """Do what the order alone decides, then hear what the nursery has prepared; None when it will not be needed."""
    head, _, text = packet.partition(b"\n")
    order = wire.parse(head)
    entry = entry_of(order, text)
    made = start.Prepared.__new__(start.Prepared)
    made.root, made.entry = order["root"], entry
    made.terminal, made.waits, made.spare, made.lock = bool(order.get("terminal")), order["kind"] == "warm", True, -1
    if entry.disk is None:
        syscalls.unshare(syscalls.CLONE_NEWNS)  # only now: what the host has mounted meanwhile is in it
    made.filters = seccomp.Filters(made.root, entry.seccomp, listens=True)
    told, descriptors = wire.receive(end)
    if told is None:
        return None
    if entry.disk is not None:
        syscalls.unshare(syscalls.CLONE_NEWNS)  # only now: the nursery has mounted its disk image
    made.groups = cgroup.Groups(told["v1"], None)
    made.notify = told["notify"]
    if made.notify is not None:
        entry.env["NOTIFY_SOCKET"] = paths.NOTIFY_INSIDE
    *standard, made.user, made.net = descriptors
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
        os.close(descriptor)
    return made


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
