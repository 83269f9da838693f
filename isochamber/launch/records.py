"""Which tenants run: a lock that death frees, and a pid record beside it for people and tools."""

from __future__ import annotations

import fcntl
import os
import select
import struct

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.launch import lean

# Open file description locks (fcntl(2), "Open file description locks"): they live as long as a process holds a copy
# of the descriptor, as flock(2)'s do, and unlike those they can be asked about without being taken.
_FLOCK = "hhqqi4x"  # struct flock of every 64-bit architecture: type, whence, start, length, pid
_WHOLE_FILE = (os.SEEK_SET, 0, 0, 0)
_A_MOMENT = 0.01  # seconds between two looks at a tenant that is just being set up or taken down


class Record:
    """What is known of a running tenant."""

    __slots__ = ("cgroup", "keeper", "pid", "shared", "start_time", "waits")

    def __init__(
        self, pid: int, keeper: int, start_time: int, cgroup: str | None, shared: bool = False, waits: bool = False
    ) -> None:
        self.pid = pid  # of the tenant's first process, as the host sees it
        self.keeper = keeper
        self.start_time = start_time  # of pid, in clock ticks since boot: field 22 of proc_pid_stat(5)
        self.cgroup = cgroup
        self.shared = shared  # its keeper keeps others too (the supervisor's nursery): it does not end with the tenant
        self.waits = waits  # set up until the exec, and handed to nobody yet


def lock(tid: str, name: str) -> int:
    """Take the tenant's lock and return its descriptor; raises IsochamberError when it runs already.

    The launcher and then the keeper hold it. Two mounts of one upper are undefined
    (overlayfs.rst, "Sharing and copying layers").
    """
    path = paths.tenant_lock(tid)
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            if not _take(descriptor):
                os.close(descriptor)
                break
            if _is_at(descriptor, path):
                return descriptor
            os.close(descriptor)  # deleted with its tenant before we had the lock: take the one that is there now
    except OSError as error:
        raise IsochamberError.from_os(error, stage="launch", tenant=name, path=path, hint="run as root") from error
    raise IsochamberError(
        "runs already", stage="launch", tenant=name, path=path, hint="one tenant runs once: its upper can't be shared"
    )


def _take(descriptor: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, *_WHOLE_FILE))
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    """Let go of a lock and close it, even while a process that was just forked has a copy of the descriptor."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_UNLCK, *_WHOLE_FILE))
    os.close(descriptor)


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def pid_of(pidfd: int) -> int:
    """Return the pid that ``pidfd`` names, in the numbers of /proc (proc_pid_fdinfo(5)); -1 once it is reaped.

    A keeper lives in a PID namespace of its own, with the host's /proc.
    """
    with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(b"Pid:"))


def as_proc_counts(child: int) -> int:
    """Return the number that /proc knows ``child`` by: who keeps many tenants is in a PID namespace of its own.

    Raises OSError.
    """
    pidfd = os.pidfd_open(child)
    try:
        return pid_of(pidfd)
    finally:
        os.close(pidfd)


def start_time(pid: int) -> int:
    """Return field 22 of proc_pid_stat(5); raises FileNotFoundError when the process is gone."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


def write(tid: str, record: Record) -> None:
    """Write the pid record; a reboot may forget it, so it is replaced atomically but not synced. Raises OSError."""
    path = paths.tenant_record(tid)
    group = "null" if record.cgroup is None else lean.quote(record.cgroup)
    flags = f'"shared": {str(record.shared).lower()}, "waits": {str(record.waits).lower()}'
    content = (
        f'{{"pid": {record.pid}, "keeper": {record.keeper}, "start_time": {record.start_time}, "cgroup": {group}, '
        f"{flags}}}\n"
    )
    with open(f"{path}.new", "wb") as file:
        file.write(content.encode())
    os.rename(f"{path}.new", path)


def forget(tid: str) -> None:
    """Remove the pid record; none is fine."""
    try:
        os.unlink(paths.tenant_record(tid))
    except FileNotFoundError:
        pass


def held(tid: str) -> bool:
    """Say whether somebody holds the tenant's lock; asks without taking it, so that no start is refused meanwhile."""
    try:
        descriptor = os.open(paths.tenant_lock(tid), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, *_WHOLE_FILE))
    finally:
        os.close(descriptor)
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def running(tid: str) -> Record | None:
    """Return the record of a tenant that runs, None when it does not (or is only just being set up)."""
    if not held(tid):
        return None
    record = read(tid)
    return record if record is not None and alive(record) else None


def read(tid: str) -> Record | None:
    """Return the record as it stands, whoever it names; None when there is none that can be read."""
    try:
        with open(paths.tenant_record(tid), "rb") as file:
            fields = lean.parse(file.read())
        return Record(**fields) if isinstance(fields, dict) else None
    except (OSError, ValueError, TypeError):
        return None


def alive(record: Record) -> bool:
    """Say whether the process that ``record`` names is there (or waits to be reaped), and is still that one."""
    try:
        return start_time(record.pid) == record.start_time
    except (FileNotFoundError, ProcessLookupError):
        return False


def settled(tid: str) -> Record | None:
    """Return :func:`running`, waited for while the tenant is just being set up or taken down."""
    while held(tid):
        record = running(tid)
        if record is not None:
            return record
        select.select([], [], [], _A_MOMENT)  # milliseconds, and nothing says when: its processes have no names yet
    return None


def catches(pid: int | None, number: int) -> bool:
    """Say whether the PID 1 ``pid`` would notice ``number``: it has a handler, ignores it on purpose, or waits for it.

    A PID 1 without a handler is not killed by a signal's default action
    (pid_namespaces(7)); blocked means that somebody takes it by sigwait or signalfd.
    """
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            masks = [int(line.split()[1], 16) for line in file if line.startswith((b"SigBlk", b"SigIgn", b"SigCgt"))]
    except (FileNotFoundError, ProcessLookupError):
        return True  # it has ended: nothing is left to be done
    return any(mask >> (number - 1) & 1 for mask in masks)
