"""cgroup v2 (Documentation/admin-guide/cgroup-v2.rst): one group a tenant, so that all of it can be frozen and killed.

A machine with v1 controllers may have a v2 tree beside them ("hybrid"); its kill
and freeze work without any controller. Limits come with the isolation work.
"""

from __future__ import annotations

import errno
import os
import select

from isochamber import paths
from isochamber.errors import IsochamberError

_PATIENCE = 5000  # milliseconds for killed processes to leave their group


def v2_tree() -> str | None:
    """Return where the cgroup v2 hierarchy is mounted, or None."""
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            fields, _, rest = line.partition(b" - ")
            if rest.startswith(b"cgroup2 "):
                return os.fsdecode(fields.split(b" ")[4])
    return None


def make(tid: str) -> str | None:
    """Make the tenant's group, anew, and return its path; None where there is no v2 tree. Raises IsochamberError.

    The caller holds the tenant's lock: who is in a group of that name was left behind, and is killed.
    """
    tree = v2_tree()
    if tree is None:
        return None
    group = f"{tree}/{paths.cgroup_parent()}/{tid}"
    try:
        os.makedirs(os.path.dirname(group), 0o755, exist_ok=True)
        # Never one that was left behind: it may be frozen, and clone3 into one that was killed once kills the child
        # (seen on Linux 6.18).
        remove(group)
        os.mkdir(group, 0o755)
    except OSError as error:
        raise IsochamberError.from_os(
            error, stage="launch", path=group, hint="is the cgroup2 file system mounted read-only?"
        ) from error
    return group


def _write(group: str, file: str, text: str) -> None:
    descriptor = os.open(f"{group}/{file}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def freeze(group: str, *, frozen: bool) -> None:
    """Stop or continue every process of ``group`` at once; raises OSError."""
    _write(group, "cgroup.freeze", "1" if frozen else "0")


def kill(group: str) -> None:
    """SIGKILL to every process of ``group`` at once; to nobody before Linux 5.14 (no cgroup.kill). Raises OSError."""
    try:
        _write(group, "cgroup.kill", "1")
    except FileNotFoundError:
        pass


def remove(group: str) -> None:
    """Remove ``group`` and the groups below it, killing whoever is in it; one that is gone is fine. Raises OSError.

    What a tenant started has died with its PID namespace: this ends what the host put beside it.
    """
    try:
        for name in os.listdir(group):
            if os.path.isdir(f"{group}/{name}"):
                remove(f"{group}/{name}")
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


def _wait_until_empty(group: str) -> None:
    """Return when cgroup.events says that nobody is in ``group``, or after a while; the caller finds out."""
    events = os.open(f"{group}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    try:
        poller = select.poll()
        poller.register(events, select.POLLPRI)
        while b"populated 1" in os.pread(events, 4096, 0):
            if not poller.poll(_PATIENCE):
                return
    finally:
        os.close(events)
