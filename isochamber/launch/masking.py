"""What of /proc and /sys a tenant does not see or can't write: runc's defaults (runtime-spec, maskedPaths)."""

from __future__ import annotations

import os
import stat

from isochamber.launch import mounts, syscalls

_HIDDEN = (
    "proc/acpi", "proc/asound", "proc/interrupts", "proc/kallsyms", "proc/kcore", "proc/keys", "proc/latency_stats",
    "proc/sched_debug", "proc/scsi", "proc/timer_list", "proc/timer_stats", "sys/devices/virtual/powercap",
    "sys/firmware",
)  # fmt: skip
# Of each processor: it tells when others work hard (moby hides it since 28).
_HIDDEN_OF_PROCESSORS = "sys/devices/system/cpu/cpu{}/thermal_throttle"
_READ_ONLY = ("proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger")

_INERT = (
    syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
)


def targets() -> list[str]:
    """Return every path that :func:`apply` may mount on, as the tenant sees it."""
    return [f"/{path}" for path in (*_HIDDEN, *_of_processors(), *_READ_ONLY)]


def _of_processors() -> list[str]:
    """Return the paths of all processors, where the first one has such a directory (read in a sysfs at /sys)."""
    if not os.path.isdir(f"/{_HIDDEN_OF_PROCESSORS.format(0)}"):
        return []
    return [_HIDDEN_OF_PROCESSORS.format(number) for number in range(os.sysconf("SC_NPROCESSORS_CONF"))]


def apply(root: int) -> None:
    """Hide and write-protect; names that this kernel does not have are passed over. Raises OSError."""
    for path in (*_HIDDEN, *_of_processors()):
        target = _open(root, path)
        if target is None:
            continue
        if stat.S_ISDIR(os.fstat(target).st_mode):
            flags = syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
            mounts.mount_on(target, "tmpfs", "tmpfs", flags, "size=4k,nr_inodes=1,mode=555")
        else:
            _cover(root, "dev/null", target, _INERT & ~syscalls.MOUNT_ATTR_NODEV)  # it must stay a device
        os.close(target)
    for path in _READ_ONLY:
        target = _open(root, path)
        if target is None:
            continue
        _cover(root, path, target, _INERT)
        os.close(target)


def _cover(root: int, path: str, target: int, attributes: int) -> None:
    """Mount a clone of ``path`` with ``attributes`` on the open ``target``."""
    clone = syscalls.open_tree(root, path, syscalls.OPEN_TREE_CLONE)
    syscalls.mount_setattr(clone, attributes=attributes)
    syscalls.move_mount(clone, target)
    os.close(clone)


def _open(root: int, path: str) -> int | None:
    flags = os.O_PATH | os.O_NOFOLLOW
    try:
        return syscalls.openat2(root, path, flags, resolve=syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS)
    except FileNotFoundError:
        return None
