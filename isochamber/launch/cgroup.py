"""Control groups: one of each kind a tenant, so that all of it can be limited, frozen and killed at once.

A machine may have the v2 tree alone (Documentation/admin-guide/cgroup-v2.rst), v1
controllers alone (cgroup-v1/), or v1 controllers with a v2 tree beside them. Each
controller is used where it is: v1 if it is mounted there, else v2. Kill and freeze
are v2's, which work without any controller. What is written into the groups is
decided in :mod:`isochamber.launch.limits`.
"""

from __future__ import annotations

import errno
import os
import select

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.launch.lean import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Remover = Callable[[str], None]

_PATIENCE = 5000  # milliseconds for killed processes to leave their group
_A_MOMENT = 10  # milliseconds between two looks at a v1 group, which can't be waited for


class Trees:
    """Where the cgroup file systems are mounted."""

    __slots__ = ("v1", "v2")

    def __init__(self, v1: dict[str, str], v2: str | None) -> None:
        self.v1 = v1  # controller -> mount point
        self.v2 = v2


class Groups:
    """One tenant's groups, as paths: of the v2 tree, and of each v1 controller that is used."""

    __slots__ = ("refused", "v1", "v2")

    def __init__(self, v1: dict[str, str], v2: str | None) -> None:
        self.v1 = v1  # controller -> group; controllers mounted together have the same one
        self.v2 = v2
        self.refused: dict[str, OSError] = {}  # v2 controllers that could not be enabled


def trees() -> Trees:
    """Look at this mount namespace (proc_pid_mountinfo(5)): the first mount of each controller counts."""
    v1: dict[str, str] = {}
    v2 = None
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            if b" - cgroup" not in line:
                continue
            fields, _, rest = line.partition(b" - ")
            target = os.fsdecode(fields.split(b" ")[4])
            if rest.startswith(b"cgroup2 "):
                v2 = v2 or target
            elif rest.startswith(b"cgroup "):
                for option in rest.split()[2].decode().split(","):
                    v1.setdefault(option, target)  # "rw" and "name=systemd" among them: nobody asks for those
    return Trees(v1, v2)


class Remembered:
    """:func:`trees` for who starts many tenants: looked at again only when a mount has come or gone."""

    __slots__ = ("_file", "_found", "_poller")

    def __init__(self) -> None:
        self._file = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._poller = select.poll()
        self._poller.register(self._file, select.POLLPRI)  # proc_pid_mounts(5): POLLPRI and POLLERR after a change
        self._found: Trees | None = None

    def trees(self) -> Trees:
        """Return where the cgroup file systems are mounted now."""
        if self._poller.poll(0) or self._found is None:
            self._found = trees()
        return self._found


def _name(tid: str) -> str:
    return f"{paths.cgroup_parent()}/{tid}"


def groups_of(tid: str, controllers: Iterable[str], found: Trees) -> Groups:
    """Return the names of the groups that ``tid`` has for ``controllers``, there or not."""
    v1 = {controller: f"{found.v1[controller]}/{_name(tid)}" for controller in controllers if controller in found.v1}
    return Groups(v1, None if found.v2 is None else f"{found.v2}/{_name(tid)}")


def make_v1(groups: Groups, tid: str, found: Trees) -> None:
    """Make the v1 half of a tenant's ``groups`` anew; a former start may have used more controllers.

    The caller holds the tenant's lock: who is in a group of that name was left behind, and is killed.
    Raises IsochamberError.
    """
    group = None
    try:
        used = {*groups.v1.values()}
        for group in {f"{tree}/{_name(tid)}" for tree in found.v1.values()} - used:
            _remove_v1(group)
        for group in used:
            _make_anew(group, _remove_v1)
    except OSError as error:
        raise _read_only(error, group) from error


def make_v2(groups: Groups, wanted: list[str], found: Trees) -> None:
    """Make the v2 half of a tenant's ``groups`` anew, with those ``wanted`` that are no v1 controllers.

    Never one that was left behind: it may be frozen, and clone3 into one that was killed once kills the child
    (seen on Linux 6.18). Raises IsochamberError.
    """
    group = groups.v2
    if found.v2 is None or group is None:
        return
    try:
        enabled = [controller for controller in wanted if controller not in groups.v1]
        if enabled:
            os.makedirs(os.path.dirname(group), 0o755, exist_ok=True)
        for controller in enabled:
            _enable(groups, found.v2, controller)
        _make_anew(group, remove)
    except OSError as error:
        raise _read_only(error, group) from error


def _read_only(error: OSError, group: str | None) -> IsochamberError:
    return IsochamberError.from_os(
        error, stage="launch", path=group, hint="is the cgroup file system mounted read-only?"
    )


def _make_anew(group: str, remove_one: Remover) -> None:
    try:
        os.mkdir(group, 0o755)
    except FileExistsError:
        remove_one(group)
        os.mkdir(group, 0o755)
    except FileNotFoundError:
        os.makedirs(group, 0o755)


def _enable(groups: Groups, tree: str, controller: str) -> None:
    """Let the tenants' groups have a v2 controller: each level gives it to the next (cgroup-v2.rst, 2-4-1)."""
    parent = tree
    try:
        for level in [*paths.cgroup_parent().split("/"), ""]:
            if controller not in _read(parent, "cgroup.controllers").split():
                return  # this kernel has it not, or has it as v1: the file that is missing will tell
            if controller not in _read(parent, "cgroup.subtree_control").split():
                write(parent, "cgroup.subtree_control", f"+{controller}")
            parent = f"{parent}/{level}"
    except OSError as error:
        groups.refused[controller] = error


def enter(groups: Groups) -> None:
    """Move this process, which has one thread, into its v1 groups. Raises OSError.

    By ``tasks``, as a thread moves itself: ``cgroup.procs`` would wait until no process of the
    machine can be in the middle of a fork or an exec, 5 to 15 ms (cgroup_attach_lock in
    kernel/cgroup/cgroup.c). Into the v2 group there is no such way: a process is cloned into it.
    """
    for group in {*groups.v1.values()}:
        write(group, "tasks", "0")  # the writer itself


def _read(group: str, file: str) -> str:
    with open(f"{group}/{file}", "rb") as content:
        return content.read().decode()


def write(group: str, file: str, *texts: str) -> None:
    """Write each of ``texts`` into one file of ``group``, in order; raises OSError with its path."""
    path = f"{group}/{file}"
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        for text in texts:
            os.write(descriptor, text.encode())
    except OSError as error:
        raise _of_group(error, path) from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _of_group(error: OSError, path: str) -> OSError:
    """Return the error with its path; ENODEV is that of a group removed while its file was open: it is gone."""
    number = errno.ENOENT if error.errno == errno.ENODEV else error.errno or 0
    return OSError(number, os.strerror(number), path)


def is_frozen(group: str) -> bool:
    """Say whether somebody has stopped the v2 ``group``; raises FileNotFoundError when it is gone."""
    try:
        return _read(group, "cgroup.freeze").strip() == "1"
    except OSError as error:
        raise _of_group(error, f"{group}/cgroup.freeze") from error


def freeze(group: str, *, frozen: bool) -> None:
    """Stop or continue every process of the v2 ``group`` at once; raises OSError."""
    write(group, "cgroup.freeze", "1" if frozen else "0")


def kill(group: str) -> None:
    """SIGKILL to every process of the v2 ``group``; to nobody before Linux 5.14 (no cgroup.kill). Raises OSError."""
    try:
        write(group, "cgroup.kill", "1")
    except FileNotFoundError:
        pass


def remove_all(groups: Groups) -> None:
    """Remove the groups of one start, killing whoever is in them; those that are gone are fine. Raises OSError.

    What a tenant started has died with its PID namespace: this ends what the host put beside it.
    """
    failed = None
    if groups.v2 is not None:
        try:
            remove(groups.v2)
        except OSError as error:
            failed = error
    for group in {*groups.v1.values()}:
        try:
            _remove_v1(group)
        except OSError as error:
            failed = failed or error
    if failed is not None:
        raise failed


def remove(group: str) -> None:
    """Remove the v2 ``group`` and those below, killing whoever is in it; one that is gone is fine. Raises OSError."""
    try:
        try:
            os.rmdir(group)  # as a rule nobody is left, and there is nothing below
            return
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                raise
        _remove_below(group, remove)
        try:
            os.rmdir(group)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            kill(group)
            _wait_until_empty(group)  # a killed process may be gone for wait(2) and not yet for its group
            os.rmdir(group)
    except FileNotFoundError:
        pass


def _remove_v1(group: str) -> None:
    """Do the same with a v1 group, which has no kill of its own and nothing to wait on."""
    try:
        os.rmdir(group)
        return
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
    try:
        _remove_below(group, _remove_v1)
        poller = select.poll()
        for _ in range(_PATIENCE // _A_MOMENT):
            for pid in _read(group, "cgroup.procs").split():
                _kill_one(int(pid))
            try:
                os.rmdir(group)
                return
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
            poller.poll(_A_MOMENT)
        os.rmdir(group)
    except FileNotFoundError:
        pass


def _remove_below(group: str, remove_one: Remover) -> None:
    for name in os.listdir(group):
        if os.path.isdir(f"{group}/{name}"):
            remove_one(f"{group}/{name}")


def _kill_one(pid: int) -> None:
    if pid:  # 0: of a PID namespace that we do not see
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _wait_until_empty(group: str) -> None:
    """Return when nobody is in ``group``, or after a while; the caller finds out."""
    wait_until(group, b"populated 0")


def wait_until(group: str, words: bytes) -> bool:
    """Return True when cgroup.events says ``words`` ("frozen 1"), False after a while. Raises OSError."""
    path = f"{group}/cgroup.events"
    events = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        poller = select.poll()
        poller.register(events, select.POLLPRI)
        while words not in os.pread(events, 4096, 0):
            if not poller.poll(_PATIENCE):
                return False
        return True
    except OSError as error:
        raise _of_group(error, path) from error
    finally:
        os.close(events)
