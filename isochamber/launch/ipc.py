"""The host daemon's IPC directory at /tmp/tenant_ipc of the tenant: read-only, a slave of the host's mount."""

import errno
import os

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.launch import syscalls

_INERT = (
    syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
)
_HINT = "the host daemon (sunneed) makes it: start its service first, or write `ipc: none` for a tenant that needs none"


def check(source: str) -> None:
    """Raise IsochamberError unless ``source`` is a directory: the one line an operator sees before anything is made."""
    if not os.path.isdir(source):
        number = errno.ENOTDIR if os.path.lexists(source) else errno.ENOENT
        raise IsochamberError(os.strerror(number), stage="launch", path=source, errno=number, hint=_HINT)


def clone(source: str, userns_fd: int) -> int:
    """Return a detached clone of the tree at ``source``: slave, read-only, id-mapped where the file system allows it.

    Call it before this mount namespace is made private: the clone starts in the peer
    group of the host's mount, and only so does a mount made there later arrive
    (mount_namespaces(7), "slave"). The host's mount must be shared for that, as
    systemd makes it. Id-mapped, what the host's root owns belongs to the tenant's
    root, so that a socket made with the usual umask (0755) can be connected to;
    read-only does not stop that, nor a write to a FIFO. Raises IsochamberError.
    """
    check(source)
    flags = syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE | syscalls.AT_SYMLINK_NOFOLLOW
    try:
        descriptor = syscalls.open_tree(syscalls.AT_FDCWD, source, flags)
        syscalls.mount_setattr(descriptor, attributes=_INERT, propagation=syscalls.MS_SLAVE, recursive=True)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="launch", path=source, hint=_HINT) from error
    try:
        syscalls.mount_setattr(descriptor, attributes=syscalls.MOUNT_ATTR_IDMAP, userns_fd=userns_fd)
    except OSError as error:
        # EINVAL: the file system has no id-mapped mounts (tmpfs before 6.3); EPERM: it is id-mapped already.
        if error.errno not in (errno.EINVAL, errno.EPERM):
            raise IsochamberError.from_os(error, stage="launch", path=source) from error
    return descriptor


TARGET = paths.DEFAULT_IPC.removeprefix("/")
