"""Project quota: a limit of bytes and inodes for a directory and all below it, kept by ext4 or xfs itself.

A directory that has a project and the flag PROJINHERIT hands both on to what is made in
it; only a process of the host's user namespace may change either (ioctl_fsxattr in
fs/ioctl.c), so a tenant can't leave its project. An overlay writes without
CAP_SYS_RESOURCE, so the host's root as its mounter doesn't lift the limit either.
Sources: quotactl(2), ioctl_xfs_fsgetxattr(2), Documentation/filesystems/quota.rst.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from isochamber.launch import syscalls

_PROJECT = 2  # PRJQUOTA
_GET, _SET, _STATE = 0x800007, 0x800008, 0x5808  # Q_GETQUOTA, Q_SETQUOTA, Q_XGETQSTATV
_BLOCK = struct.Struct("=8QI4x")  # struct if_dqblk
_LIMITS = 5  # QIF_BLIMITS | QIF_ILIMITS
_KIB = 1024  # QIF_DQBLKSIZE
_ENFORCED = 32  # FS_QUOTA_PDQ_ENFD
_STATE_SIZE = 160  # struct fs_quota_statv

_FS_IOC_FSGETXATTR, _FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
_ATTRIBUTES = struct.Struct("=5I8x")  # struct fsxattr: flags, extent size, extents, project, copy-on-write extent size
_INHERIT = 0x200  # FS_XFLAG_PROJINHERIT

BYTES_AN_INODE = 8192


def enforced(path: str) -> bool:
    """Say whether the file system at ``path`` keeps limits of projects."""
    state = bytearray(_STATE_SIZE)
    state[0] = 1  # FS_QSTATV_VERSION1
    try:
        _call(_STATE, path, 0, state)
    except OSError:
        return False
    return bool(struct.unpack_from("=H", state, 2)[0] & _ENFORCED)


def project_of(path: str) -> int:
    """Return the project that what is made in the directory ``path`` belongs to; 0 for none, or no such directory."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        flags, _, _, project, _ = _ATTRIBUTES.unpack(fcntl.ioctl(descriptor, _FS_IOC_FSGETXATTR, b"\0" * 28))
    except OSError:
        return 0  # a file system that knows no projects
    finally:
        os.close(descriptor)
    return int(project) if flags & _INHERIT else 0


def give(path: str, project: int) -> None:
    """Let the empty directory ``path``, and what is made in it from now on, belong to ``project``. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        flags, extent, extents, _, copied = _ATTRIBUTES.unpack(fcntl.ioctl(descriptor, _FS_IOC_FSGETXATTR, b"\0" * 28))
        wanted = _ATTRIBUTES.pack(flags | _INHERIT, extent, extents, project, copied)
        fcntl.ioctl(descriptor, _FS_IOC_FSSETXATTR, wanted)
    finally:
        os.close(descriptor)


def limit(path: str, project: int) -> tuple[int, int]:
    """Return the bytes that ``project`` may use, 0 for no limit, and those that it uses. Raises OSError."""
    block = bytearray(_BLOCK.size)
    try:
        _call(_GET, path, project, block)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH) and enforced(path):
            return 0, 0  # nobody has spoken of that project yet
        raise
    hard, _, used, *_ = _BLOCK.unpack(block)
    return hard * _KIB, used


def set_limit(path: str, project: int, size: int) -> None:
    """Let ``project`` use ``size`` bytes and as many inodes as an image of that size; 0: no limit. Raises OSError."""
    blocks, inodes = size // _KIB, size // BYTES_AN_INODE
    _call(_SET, path, project, bytearray(_BLOCK.pack(blocks, blocks, 0, inodes, inodes, 0, 0, 0, _LIMITS)))


def _call(command: int, path: str, project: int, buffer: bytearray) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.quotactl_fd(descriptor, command << 8 | _PROJECT, project, buffer)
    finally:
        os.close(descriptor)
