"""What a tenant may use at most, as cgroup files: decided purely, written before the clone, read back.

The kernel takes a limit or not: a file may be missing (a controller that is not
there), refuse a value, or round it. So each is read back. One that the operator
named and that is not in force stops the start; a default, or with ``best_effort``,
it is what ``isochamber show`` warns of.

Sources: Documentation/admin-guide/cgroup-v2.rst; cgroup-v1/memory.rst,
blkio-controller.rst, pids.rst; Documentation/scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import os

from isochamber.errors import IsochamberError
from isochamber.launch import cgroup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from isochamber.launch.cgroup import Groups

_PERIOD = 100_000  # microseconds that a quota of processor time is counted in
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Setting:
    """One limit as a file to write; ``path`` None: no such file can be, ``why`` says so."""

    __slots__ = ("controller", "limit", "path", "text", "why")

    def __init__(self, limit: str, controller: str, path: str | None, text: str, why: str = "") -> None:
        self.limit = limit  # as containers.json calls it
        self.controller = controller
        self.path = path
        self.text = text  # what is written, and what must be read back
        self.why = why


# limit: (controller, v1 file, v1 text, v2 file, v2 text). In a text: V the limit, P the same in whole pages, as the
# kernel rounds, M that and the memory, S the v1 share of a weight (both defaults are the same one: 100 and 1024),
# D the state directory's disk.
_TABLE = {
    "memory": ("memory", "memory.limit_in_bytes", "P", "memory.max", "P"),
    "swap": ("memory", "memory.memsw.limit_in_bytes", "M", "memory.swap.max", "P"),
    "processes": ("pids", "pids.max", "V", "pids.max", "V"),
    "cpu_weight": ("cpu", "cpu.shares", "S", "cpu.weight", "V"),
    "cpu_quota": ("cpu", "cpu.cfs_quota_us", "V", "cpu.max", f"V {_PERIOD}"),
    "io_weight": ("blkio", "blkio.bfq.weight", "V", "io.weight", "default V"),
    "io_read": ("blkio", "blkio.throttle.read_bps_device", "D V", "io.max", "D rbps=V"),
    "io_write": ("blkio", "blkio.throttle.write_bps_device", "D V", "io.max", "D wbps=V"),
}
_V2_NAMES = {"blkio": "io"}


def controllers(limits: Mapping[str, int]) -> list[str]:
    """Return the controllers that ``limits`` needs, under both names where v1's and v2's differ, without repeats."""
    found = dict.fromkeys(_row(name)[0] for name in limits)
    return [*found, *(_V2_NAMES[name] for name in found if name in _V2_NAMES)]


def _row(name: str) -> tuple[str, str, str, str, str]:
    row = _TABLE.get(name)
    if row is None:
        raise IsochamberError(f"there is no limit {name}", stage="launch", hint="see the reference of containers.json")
    return row


def settings(limits: Mapping[str, int], groups: Groups, disk: str | None) -> list[Setting]:
    """Return what is to be written where, in an order that the kernel takes. Pure; ``disk`` is "major:minor"."""
    return [_setting(name, row, limits, groups, disk) for name, row in _TABLE.items() if name in limits]


def _setting(
    name: str, row: tuple[str, str, str, str, str], limits: Mapping[str, int], groups: Groups, disk: str | None
) -> Setting:
    controller, file, text, v2_file, v2_text = row
    group = groups.v1.get(controller)
    if group is None:
        group, file, text = groups.v2, v2_file, v2_text
        controller = _V2_NAMES.get(controller, controller)
    if group is None:
        return Setting(name, controller, None, "", f"no control groups with {controller} are mounted")
    if "D" in text and disk is None:
        return Setting(name, controller, None, "", "the state directory is on no disk of its own")
    value = limits[name]
    words = {
        "V": str(value),
        "P": str(_pages(value)),
        "M": str(_pages(limits.get("memory", 0)) + _pages(value)),
        "S": str(max(2, value * 1024 // 100)),
        "D": disk or "",
    }
    return Setting(name, controller, f"{group}/{file}", "".join(words.get(letter, letter) for letter in text))


def _pages(size: int) -> int:
    return size // _PAGE * _PAGE


def disk_for(limits: Mapping[str, int], path: str) -> str | None:
    """Return :func:`disk_of` for limits that name one; None, and no look at it, for others."""
    return disk_of(path) if any("D" in row[2] for name, row in _TABLE.items() if name in limits) else None


def disk_of(path: str) -> str | None:
    """Return "major:minor" of the whole disk that ``path`` lies on; None where there is none (btrfs, tmpfs)."""
    number = os.stat(path).st_dev
    where = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    if not os.path.exists(where):
        return None
    if os.path.exists(f"{where}/partition"):
        where = f"{os.path.realpath(where)}/.."
    with open(f"{where}/dev", "rb") as file:
        return file.read().decode().strip()


def apply(limits: Mapping[str, int], required: list[str], groups: Groups, disk: str | None) -> None:
    """Write every limit and read it back; raises IsochamberError for one in ``required`` that is not in force."""
    for setting in settings(limits, groups, disk):
        problem = _write(setting)
        if problem is not None and setting.limit in required:
            refused = groups.refused.get(setting.controller)
            if refused is not None:
                problem += f" ({refused.filename}: {refused.strerror})"
            cgroup.remove_all(groups)
            raise IsochamberError(
                f"the limit {setting.limit} is not in force: {problem}",
                stage="launch",
                path=setting.path,
                hint="leave the limit out, or write best_effort: true",
            )


def _write(setting: Setting) -> str | None:
    """Write a limit and return why it is not in force, as it is read back by the same descriptor."""
    if setting.path is None:
        return setting.why
    try:
        descriptor = os.open(setting.path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return problem_of(setting)  # not there: said in the same words as for a group that runs
    try:
        os.write(descriptor, setting.text.encode())
        return _difference(setting, os.pread(descriptor, 4096, 0))
    except OSError as error:
        return f"the kernel does not take {setting.text!r} ({error.strerror})"
    finally:
        os.close(descriptor)


def problem_of(setting: Setting) -> str | None:
    """Return why a limit is not in force, as its file reads now; None when it is."""
    if setting.path is None:
        return setting.why
    try:
        with open(setting.path, "rb") as file:
            found = file.read()
    except FileNotFoundError:
        return f"this machine has no {setting.path.rpartition('/')[2]} (controller {setting.controller})"
    except OSError as error:
        return error.strerror or str(error)
    return _difference(setting, found)


def _difference(setting: Setting, found: bytes) -> str | None:
    lines = found.decode().splitlines()
    wanted = set(setting.text.split())
    if any(wanted <= set(line.split()) for line in lines):
        return None
    return f"{setting.text!r} was written and {' '.join(lines)[:60]!r} is read"


def in_force(tid: str, limits: Mapping[str, int], root: str, *, running: bool) -> list[tuple[str, str | None]]:
    """Return, for every limit, what is written where and None, or why it is not in force on this machine.

    Of a tenant that runs the files are read; for another one it is what a start would find.
    """
    found = cgroup.trees()
    groups = cgroup.groups_of(tid, controllers(limits), found)
    told = []
    for setting in settings(limits, groups, disk_of(root)):
        where = f"{setting.limit} {limits[setting.limit]}: {setting.path}"
        told.append((where, problem_of(setting) if running else _missing(setting, found)))
    return told


def _missing(setting: Setting, found: cgroup.Trees) -> str | None:
    """Return why a start would not find the file of ``setting``, as far as can be told without a group."""
    if setting.path is None:
        return setting.why
    if found.v2 is not None and setting.path.startswith(f"{found.v2}/"):
        with open(f"{found.v2}/cgroup.controllers", "rb") as file:
            if setting.controller not in file.read().decode().split():
                return f"this machine has no control groups with {setting.controller}"
    return None
