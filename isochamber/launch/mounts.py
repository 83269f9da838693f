"""The tenant's view: id-mapped lowers, overlay, private /proc /sys /dev /tmp, /home and IPC, and the way into it.

All of it happens as host root in the tenant's own mount namespace, so that it goes
when the tenant goes. The upper belongs to the tenant, who may have put anything
where we mount: every target is opened below the overlay's root by descriptor,
never through a symlink, and mounted on by descriptor.
"""

from __future__ import annotations

import os
import stat

from isochamber.errors import IsochamberError
from isochamber.launch import syscalls

_IN_ROOT = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_MS_NOATIME = 1024

# Nothing that makes an upper depend on its neighbours: sealed, it must mean the same over its base anywhere.
APART = "redirect_dir=off,metacopy=off,index=off,xino=off"

_NO_PRIVILEGES = syscalls.MS_NOSUID | syscalls.MS_NODEV
_INERT_ATTRIBUTES = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
_DATA_ONLY = _NO_PRIVILEGES | syscalls.MS_NOEXEC


def make_private() -> None:
    """Cut this mount namespace off from the host's: nothing propagates either way (mount_namespaces(7))."""
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)


def clone_plain(path: str, attributes: int) -> int:
    """Return a detached clone of the tree at ``path``, owners as on disk. Raises OSError."""
    descriptor = syscalls.open_tree(syscalls.AT_FDCWD, path, syscalls.OPEN_TREE_CLONE | syscalls.AT_SYMLINK_NOFOLLOW)
    syscalls.mount_setattr(descriptor, attributes=attributes)
    return descriptor


def clone_idmapped(path: str, userns_fd: int, attributes: int = 0) -> int:
    """Return a detached clone of the tree at ``path``, owners shown through the map of ``userns_fd``."""
    descriptor = syscalls.open_tree(syscalls.AT_FDCWD, path, syscalls.OPEN_TREE_CLONE | syscalls.AT_SYMLINK_NOFOLLOW)
    try:
        syscalls.mount_setattr(
            descriptor,
            attributes=syscalls.MOUNT_ATTR_IDMAP | syscalls.MOUNT_ATTR_NOATIME | attributes,
            clear=syscalls.MOUNT_ATTR__ATIME,
            userns_fd=userns_fd,
        )
    except OSError as error:
        os.close(descriptor)
        hint = "the file system of the state directory must allow id-mapped mounts (ext4, xfs, btrfs, f2fs)"
        raise IsochamberError.from_os(error, stage="launch", path=path, hint=hint) from error
    return descriptor


def map_lowers(lowers: list[str], userns_fd: int) -> None:
    """Cover each lower, in this mount namespace only, with a read-only id-mapped clone of itself."""
    for path in lowers:
        clone = clone_idmapped(path, userns_fd, syscalls.MOUNT_ATTR_RDONLY)
        syscalls.move_mount(clone, syscalls.AT_FDCWD, path)
        os.close(clone)


def mount_overlay(lowers: list[str], upper: str, workdir: str, target: str, *, volatile: bool) -> int:
    """Mount the overlay (overlayfs.rst) and return a descriptor of its root; paths are relative, and hold no ``:``.

    ``volatile`` leaves out every sync: for builds, whose upper is synced or thrown away afterwards.
    """
    data = f"lowerdir={':'.join(lowers)},upperdir={upper},workdir={workdir}"
    data += f",{APART}"
    if volatile:
        data += ",volatile"
    syscalls.mount("overlay", target, "overlay", _NO_PRIVILEGES | _MS_NOATIME, data)
    return os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)


def open_target(root: int, path: str, *, owner: int | None = None) -> int:
    """Open the directory ``path`` (relative) below ``root`` as a mount target, its last part made if it is missing.

    A symlink or a file on the way refuses the start: the tenant put it there.
    Raises IsochamberError.
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        try:
            return syscalls.openat2(root, path, flags, resolve=_IN_ROOT)
        except FileNotFoundError:
            parent_path, _, name = path.rpartition("/")
            parent = syscalls.openat2(root, parent_path or ".", flags, resolve=_IN_ROOT)
            try:
                os.mkdir(name, 0o755, dir_fd=parent)
                if owner is not None:
                    os.chown(name, owner, owner, dir_fd=parent, follow_symlinks=False)
            finally:
                os.close(parent)
            return syscalls.openat2(root, path, flags, resolve=_IN_ROOT)
    except OSError as error:
        raise IsochamberError.from_os(
            error,
            stage="launch",
            path=f"/{path}",
            hint="the tenant has put something else there: remove that from its upper, or delete the tenant",
        ) from error


def open_file_target(root: int, path: str) -> int | None:
    """Open the regular file ``path`` below ``root`` as a mount target, or return None when it is not one."""
    try:
        descriptor = syscalls.openat2(root, path, os.O_PATH | os.O_NOFOLLOW, resolve=_IN_ROOT)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


def _make_file_target(root: int, path: str, owner: int) -> int | None:
    """Make ``path`` below ``root`` where nothing is; what is there and no file stays, and None is returned."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = syscalls.openat2(root, path, flags, 0o644, resolve=_IN_ROOT)
    except OSError:
        return None
    os.fchown(descriptor, owner, owner)
    os.close(descriptor)
    return open_file_target(root, path)


def _by_descriptor(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def mount_on(target: int, source: str, fstype: str, flags: int, data: str | None = None) -> None:
    """Mount a new file system on the open directory ``target``."""
    try:
        syscalls.mount(source, _by_descriptor(target), fstype, flags, data)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="launch", path=fstype, hint="does this kernel have it?") from error


def reopen(root: int, path: str) -> int:
    """Open what is mounted at ``path`` now; the descriptor of the target still names what lies below."""
    return syscalls.openat2(root, path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, resolve=_IN_ROOT)


def mount_kernel_views(root: int, owner: int) -> None:
    """Mount fresh /proc and /sys: of the tenant's own PID and network namespace, owned by the host's root."""
    proc = open_target(root, "proc", owner=owner)
    mount_on(proc, "proc", "proc", _DATA_ONLY)
    sys = open_target(root, "sys", owner=owner)
    mount_on(sys, "sysfs", "sysfs", _DATA_ONLY | syscalls.MS_RDONLY)
    os.close(proc)
    os.close(sys)


def mount_tmpfs(root: int, path: str, owner: int, mode: str, size: int, inodes: int | None = None) -> None:
    """Mount a tmpfs of ``size`` bytes at ``path``, owned by the tenant's root; by default an inode a page of it."""
    target = open_target(root, path, owner=owner)
    inodes = inodes or max(64, size // 4096)
    data = f"mode={mode},size={size},nr_inodes={inodes},uid={owner},gid={owner}"
    mount_on(target, "tmpfs", "tmpfs", _NO_PRIVILEGES, data)
    os.close(target)


def attach(root: int, path: str, mount_fd: int, owner: int | None = None) -> None:
    """Attach the detached mount ``mount_fd`` at the directory ``path`` below ``root``."""
    target = open_target(root, path, owner=owner)
    syscalls.move_mount(mount_fd, target)
    os.close(target)


def bind_file(root: int, path: str, source: str, *, owner: int | None = None) -> None:
    """Show the host's file ``source`` (symlinks followed) read-only at ``path``, if both are files.

    With ``owner`` a target that is missing is made, as an empty file of that id.
    """
    target = open_file_target(root, path)
    if target is None and owner is not None:
        target = _make_file_target(root, path, owner)
    if target is None:
        return
    if not os.path.isfile(source):
        os.close(target)
        return
    clone = syscalls.open_tree(syscalls.AT_FDCWD, os.path.realpath(source), syscalls.OPEN_TREE_CLONE)
    read_only = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
    syscalls.mount_setattr(clone, attributes=read_only)
    syscalls.move_mount(clone, target)
    os.close(clone)
    os.close(target)


def bind_socket(root: int, path: str, source: str) -> None:
    """Show the host's socket ``source`` at ``path``, made anew in a directory that is ours. Raises OSError."""
    parent_path, _, name = path.rpartition("/")
    parent = reopen(root, parent_path)
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=parent))
        target = syscalls.openat2(parent, name, os.O_PATH | os.O_NOFOLLOW)
    finally:
        os.close(parent)
    clone = clone_plain(source, syscalls.MOUNT_ATTR_RDONLY | _INERT_ATTRIBUTES)
    syscalls.move_mount(clone, target)
    os.close(clone)
    os.close(target)


def write_protect(path: str) -> None:
    """Make the mount at ``path`` read-only, alone. Raises OSError."""
    descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.mount_setattr(descriptor, attributes=syscalls.MOUNT_ATTR_RDONLY)
    finally:
        os.close(descriptor)


def enter(overlay: int) -> None:
    """Make the overlay the root of this mount namespace and let go of the old one (pivot_root(2), NOTES).

    The namespace's own root is looked for first: where the host's root is itself a
    chroot, pivot_root would fail or leave what lies around it within reach of "..".
    """
    leave_chroot()
    os.fchdir(overlay)
    syscalls.pivot_root(".", ".")
    syscalls.umount2(".", syscalls.MNT_DETACH)
    os.chdir("/")


def leave_chroot() -> None:
    """Set root and working directory to the root of the mount namespace: ".." goes there once root is below us.

    Needs CAP_SYS_CHROOT. Where there is no chroot, nothing changes. Raises OSError.
    """
    here = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chroot("/proc")  # any directory below: ".." from outside of it is then free
        os.fchdir(here)
        while True:
            current, above = os.stat("."), os.stat("..")
            if (current.st_dev, current.st_ino) == (above.st_dev, above.st_ino):
                break
            os.chdir("..")
        os.chroot(".")
    finally:
        os.close(here)
