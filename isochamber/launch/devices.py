"""A /dev of the tenant's own: a fresh tmpfs with the few nodes that programs expect, and its own terminals."""

from __future__ import annotations

import os
import stat

from isochamber.launch import mounts, syscalls

# Documentation/admin-guide/devices.txt: name, major, minor.
_NODES = (
    ("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0),
)  # fmt: skip
_LINKS = (
    ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
)  # fmt: skip
_TTY_GID = 5  # Debian's group tty
_MAX_TERMINALS = 64


def make(root: int, owner: int, shm: int, shm_inodes: int | None = None) -> None:
    """Mount /dev with its nodes, /dev/pts (an instance of its own), /dev/shm of ``shm`` bytes and /dev/mqueue.

    The nodes are made here and never taken from the tenant's file system, where a
    symlink could stand in their place (CVE-2025-31133).
    """
    target = mounts.open_target(root, "dev", owner=owner)
    # No MS_NODEV: the nodes live here. The tenant can't make more, mknod(2) needs a capability over the host.
    mounts.mount_on(
        target, "tmpfs", "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NOEXEC,
        f"mode=755,size=64k,nr_inodes=128,uid={owner},gid={owner}",
    )  # fmt: skip
    os.close(target)
    dev = mounts.reopen(root, "dev")
    for name, major, minor in _NODES:
        os.mknod(name, stat.S_IFCHR | 0o666, os.makedev(major, minor), dir_fd=dev)
        os.chmod(f"/proc/self/fd/{dev}/{name}", 0o666)  # noqa: S103 - /dev/null is everybody's, whatever the umask
        os.chown(name, owner, owner, dir_fd=dev, follow_symlinks=False)
    for name, to in _LINKS:
        os.symlink(to, name, dir_fd=dev)
    os.close(dev)
    pts = mounts.open_target(root, "dev/pts", owner=owner)
    mounts.mount_on(
        pts, "devpts", "devpts", syscalls.MS_NOSUID | syscalls.MS_NOEXEC,
        f"newinstance,ptmxmode=0666,mode=0620,uid={owner},gid={owner + _TTY_GID},max={_MAX_TERMINALS}",
    )  # fmt: skip
    os.close(pts)
    mounts.mount_tmpfs(root, "dev/shm", owner, "1777", shm, shm_inodes)
    queue = mounts.open_target(root, "dev/mqueue", owner=owner)
    mounts.mount_on(queue, "mqueue", "mqueue", syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC)
    os.close(queue)
