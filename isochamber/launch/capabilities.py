"""capabilities(7): all five sets of the process that becomes the tenant."""

from __future__ import annotations

from isochamber.errors import IsochamberError
from isochamber.launch import syscalls

_NAMES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip

# What an install script is given inside the tenant's own user namespace: what dpkg and maintainer scripts use.
INSTALL = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETFCAP", "SYS_CHROOT",
)  # fmt: skip


_highest: list[int] = []  # what was read once: a kernel does not learn new ones


def mask(names: list[str] | tuple[str, ...]) -> int:
    """Return the bit mask of capability ``names`` (without CAP_); raises IsochamberError for an unknown one."""
    bits = 0
    for name in names:
        if name not in _NAMES:
            raise IsochamberError(f"there is no capability {name}", stage="launch", hint="see capabilities(7)")
        bits |= 1 << _NAMES.index(name)
    return bits


def last() -> int:
    """Return the highest capability that this kernel knows; it may know more than we have names for."""
    if not _highest:
        with open("/proc/sys/kernel/cap_last_cap", "rb") as file:
            _highest.append(int(file.read()))
    return _highest[0]


def keep_only(kept: int, highest: int) -> None:
    """Leave exactly the capabilities of the mask ``kept`` in bounding, permitted, effective, inheritable and ambient.

    ``highest`` is :func:`last`, read while /proc was still the host's: a bit that has
    no name here is dropped like the others. Raises OSError.
    """
    for number in range(highest + 1):
        if not kept >> number & 1:
            syscalls.prctl(syscalls.PR_CAPBSET_DROP, number)
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    syscalls.prctl(syscalls.PR_SET_SECUREBITS, 0)  # while this may still be said: another user than root set one
    syscalls.capset(kept, kept, kept)
    for number in range(highest + 1):
        if kept >> number & 1:
            syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_RAISE, number)
