"""The keeper: PID 1 of an outer PID namespace, with the tenant's own inside it.

It is our code. When the launcher dies, however it dies, the keeper reads the end of
a pipe, and ends the tenant; when the keeper itself is killed, the kernel kills every
process of its namespace (pid_namespaces(7)). Either way nothing of the tenant stays,
whatever it did to its own death signal or its sessions. It has no death signal of its
own: one would end it before it has removed the cgroup and the pid record, which a
launcher that was killed could not. It stands in the host's mounts and namespaces
otherwise, and does nothing but wait.
"""

from __future__ import annotations

import _socket
import os
import select
import sys

from isochamber.errors import IsochamberError
from isochamber.launch import cgroup, channel, records, start, syscalls
from isochamber.launch.lean import signal
from isochamber.launch.messages import Word

_NAME = b"isochamber-keep\0"  # what ps shows: prctl(2), PR_SET_NAME


def keep(prepared: start.Prepared, messages: _socket.socket, life: int) -> None:
    """Start the tenant and wait for its end, or for the launcher's (``life`` reads EOF then). Never returns."""
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        pid, pidfd = clone(prepared)
        if pid == 0:
            os.close(life)
            os.close(prepared.lock)
            start.tenant_side(prepared, messages)
        try:
            record(prepared, pidfd, int(os.readlink("/proc/self")))
            channel.send_started(messages, pidfd)
            _let_go_of(prepared, messages, pidfd, life)
            _wait(pidfd, life)
        finally:
            status = _reap(pid, pidfd)
            _clean(prepared, messages)
        channel.send_ended(messages, status)
    except OSError as error:
        wrapped = IsochamberError.from_os(error, stage="launch", hint="are namespaces enabled on this kernel?")
        channel.send_failure(messages, "start the tenant", wrapped)
        _clean(prepared, messages)
    except BaseException:  # a bug of ours: shown, and never run on with the launcher's code
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)  # and everything of this PID namespace with us


def clone(prepared: start.Prepared) -> tuple[int, int]:
    """Clone the tenant's first process into its namespaces and its group; returns (pid, pidfd), in it (0, -1)."""
    group = os.open(prepared.groups.v2, os.O_RDONLY | os.O_DIRECTORY) if prepared.groups.v2 else None
    try:
        return syscalls.clone3(start.TENANT_NAMESPACES, cgroup_fd=group)
    finally:
        if group is not None:
            os.close(group)


def record(prepared: start.Prepared, pidfd: int, keeper: int) -> None:
    """Write who runs, in the numbers of the host: those of its /proc, which is still ours."""
    pid = records.pid_of(pidfd)
    started = records.start_time(pid)  # a zombie at worst: only we reap it
    records.write(prepared.entry.tid, records.Record(pid, keeper, started, prepared.groups.v2))


def _let_go_of(prepared: start.Prepared, messages: _socket.socket, pidfd: int, life: int) -> None:
    """Hold nothing of the operator's: no terminal, no pipe whose reader would wait for our end."""
    syscalls.prctl(syscalls.PR_SET_NAME, syscalls.address(_NAME))
    os.chdir("/")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    kept = {prepared.lock, messages.fileno(), pidfd, life}
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and descriptor not in kept:
            try:
                os.close(descriptor)
            except OSError:
                pass  # the one that listed


def _wait(pidfd: int, life: int) -> None:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.register(life, select.POLLIN)
    poller.poll()


def _reap(pid: int, pidfd: int) -> int:
    """Kill it if it still lives and return its wait status; all of its PID namespace is dead by then."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return os.waitpid(pid, 0)[1]


def clean(prepared: start.Prepared) -> None:
    """Remove what the start of a tenant that has ended made, but for its pins. Raises OSError."""
    cgroup.remove_all(prepared.groups)
    records.forget(prepared.entry.tid)


def _clean(prepared: start.Prepared, messages: _socket.socket) -> None:
    """Leave nothing behind but the pins; what can't be removed is said and does not change the tenant's status."""
    try:
        clean(prepared)
    except OSError as error:
        wrapped = IsochamberError.from_os(error, stage="launch", hint="the next start of the tenant tries again")
        channel.send_failure(messages, "clean up", wrapped, Word.LEFT)
