"""A /dev of the tenant's own: a fresh tmpfs with the few nodes that programs expect, and its own terminals."""

from __future__ import annotations

import os
import stat

from isochamber.errors import IsochamberError
from isochamber.launch import mounts, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from isochamber.launch.entry import Device

# Documentation/admin-guide/devices.txt: name, major, minor.
NODES = (
    ("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0),
)  # fmt: skip
_LINKS = (
    ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
)  # fmt: skip
_TTY_GID = 5  # Debian's group tty
_MAX_TERMINALS = 64


def make(root: int, owner: int, shm: int, shm_inodes: int | None, granted: list[Device]) -> None:
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
    umask = os.umask(0)  # /dev/null is everybody's
    for name, major, minor in NODES:
        os.mknod(name, stat.S_IFCHR | 0o666, os.makedev(major, minor), dir_fd=dev)
        os.chown(name, owner, owner, dir_fd=dev, follow_symlinks=False)
    os.umask(umask)
    for device in granted:
        _grant(dev, device)  # before there is any link that its path could lead through
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


def look(path: str) -> tuple[str, int]:
    """Return ("c" or "b", number) of the host's device at ``path``, links followed; raises IsochamberError."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="launch", path=path, hint=_HINT) from error
    kind = {stat.S_IFCHR: "c", stat.S_IFBLK: "b"}.get(stat.S_IFMT(status.st_mode))
    if kind is None:
        raise IsochamberError("is not a device", stage="launch", path=path, hint=_HINT)
    return kind, status.st_rdev


_HINT = "devices: in tenants.yaml grants it; is it plugged in?"


def _grant(dev: int, device: Device) -> None:
    """Make a node of the host's device's numbers: a bind of the host's would keep the host's owner and mode.

    It stays the host root's, so that no capability and no chmod inside makes a
    read-only one writable.
    """
    kind, number = look(device.path)
    *above, name = device.path.removeprefix("/dev/").split("/")
    for depth in range(len(above)):
        try:
            os.mkdir("/".join(above[: depth + 1]), 0o755, dir_fd=dev)
        except FileExistsError:
            pass
    mode = 0o444 if device.read_only else 0o666
    path = "/".join([*above, name])
    os.mknod(path, mode | (stat.S_IFCHR if kind == "c" else stat.S_IFBLK), number, dir_fd=dev)
    os.chmod(f"/proc/self/fd/{dev}/{path}", mode)
