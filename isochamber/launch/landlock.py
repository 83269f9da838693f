"""Landlock (landlock(7)): what a tenant gives up besides, where the kernel has it; the best level that it has.

The mounts are what bounds a tenant's view of files. Landlock comes on top: no mount
can be changed by whoever is in a domain, even in a user namespace of its own; device
nodes can't be made (the 0:0 of overlayfs is free to everybody otherwise, and at ABI 2 still is); from ABI 5
on devices take ioctls below /dev only, from ABI 6 on abstract sockets and signals
stay among the tenant's own processes. ABI 1 refuses every rename between
directories, so it is not used.
"""

from __future__ import annotations

import os

from isochamber.launch import syscalls

_FIRST = 2  # the ABI of Linux 5.19

_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_REFER = 1 << 13  # renames between directories: refused to every domain that is not given it (ABI 2)
_IOCTL_DEV = 1 << 15  # ABI 5
_SCOPE_ABSTRACT, _SCOPE_SIGNAL = 1, 2  # ABI 6


def abi() -> int:
    """Return the highest ABI of this kernel, 0 where Landlock is not built in or not enabled."""
    try:
        return syscalls.landlock_abi()
    except OSError:
        return 0


def apply(*, joins: bool) -> None:
    """Confine this process, which has no_new_privs, and all that it starts. Raises OSError.

    A command that ``joins`` a tenant gets a domain beside the tenant's: it may signal
    what it came for, and the tenant may not signal it.
    """
    level = abi()
    if level < _FIRST:
        return
    handled = _MAKE_CHAR | _MAKE_BLOCK | _REFER
    scoped = 0
    if level >= 5:
        handled |= _IOCTL_DEV
    if level >= 6:
        scoped = _SCOPE_ABSTRACT if joins else _SCOPE_ABSTRACT | _SCOPE_SIGNAL
    rules = [("/", _REFER)]
    if level >= 5:
        rules.append(("/dev", _IOCTL_DEV))
    ruleset = syscalls.landlock_create_ruleset(handled, scoped, with_scope=level >= 6)
    try:
        for path, allowed in rules:
            where = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                syscalls.landlock_allow(ruleset, allowed, where)
            finally:
                os.close(where)
        syscalls.landlock_restrict_self(ruleset)
    finally:
        os.close(ruleset)


def described() -> str:
    """Return the level in force on this machine, for people."""
    level = abi()
    if level < _FIRST:
        return f"not in force: this kernel has {f'ABI {level}, which is too old' if level else 'none'}"
    parts = ["no mounts", "no device nodes" + ("" if level > _FIRST else " (but whiteouts)")]
    if level >= 5:
        parts.append("ioctls of devices below /dev only")
    if level >= 6:
        parts.append("abstract sockets and signals among its own")
    return f"ABI {level}: {', '.join(parts)}"
