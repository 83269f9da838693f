"""A tenant's disk: its directory has a project quota, or an image of its own is mounted where its upper and /home lie.

The image is a sparse file with an ext4 in it. Like a pinned namespace it is mounted
once, on the host, and stays until the tenant is deleted or the machine restarts: the
builder and every start use the same mount. The loop device frees itself with the last
mount (loop(4), LO_FLAGS_AUTOCLEAR).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.launch import quota, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# loop(4) and include/uapi/linux/loop.h
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A  # Linux 5.8
_LOOP_GET_STATUS64 = 0x4C05
_AUTOCLEAR = 4
_INFO64 = "=QQQQQIIII64s64s32sQQ"  # struct loop_info64
_CONFIG = "=II232s64x"  # struct loop_config: descriptor, block size, loop_info64
_DIRECT = 16  # not through two page caches

_OPTIONS = "discard,noinit_itable,errors=remount-ro"  # discard: what is deleted inside is a hole outside
_FLAGS = syscalls.MS_NOSUID | syscalls.MS_NODEV | 1024  # MS_NOATIME


def image_of(root: str, tid: str) -> str:
    """Return where a tenant's image is, there or not."""
    return f"{root}/{paths.TENANTS_PERSIST}/{tid}/{paths.DISK_IMAGE}"


def project_of(root: str, tid: str) -> int:
    """Return the project that is the tenant's own, 0 when it has none: one of all tenants limits nobody."""
    parent = f"{root}/{paths.TENANTS_FS}"
    project = quota.project_of(f"{parent}/{tid}")
    return 0 if project == quota.project_of(parent) else project


def where(root: str, tid: str) -> str:
    """Return what holds the tenant's disk limit, for people."""
    directory = f"{root}/{paths.TENANTS_FS}/{tid}"
    project = project_of(root, tid)
    return f"project quota {project} on {directory}" if project else image_of(root, tid)


def _nothing() -> None:
    pass


def attach(root: str, tid: str, before: Callable[[], None] = _nothing) -> None:
    """See that the quota is in force, or mount the image if it is not mounted here. Raises IsochamberError ("disk").

    ``before`` it is mounted something may be done that nobody else mounts it during.
    """
    target = f"{root}/{paths.TENANTS_FS}/{tid}"
    image = image_of(root, tid)
    project = project_of(root, tid)
    if project:
        _require(target, project)
        return
    try:
        lock = lock_image(image)
        try:
            if not is_mounted(target):
                before()
                file = os.open(image, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    mount(file, image, target)
                finally:
                    os.close(file)
        finally:
            os.close(lock)
    except OSError as error:
        raise IsochamberError.from_os(
            error, stage="disk", path=image, hint="its /home is in there; does the kernel have loop devices and ext4?"
        ) from error


def lock_image(image: str) -> int:
    """Return a lock until it is closed: two loop devices over one file would be two file systems. Raises OSError.

    It is no descriptor for the loop device, which keeps the one that it is given: a lock on that would stay.
    """
    lock = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def check_unused(root: str, tid: str) -> None:
    """Raise IsochamberError (stage "disk") when the tenant, configured without a disk, has been given one since.

    What it wrote beside that would be removed with what was copied onto the disk.
    """
    if os.path.exists(image_of(root, tid)) or os.path.exists(f"{root}/{paths.TENANTS_FS}/{tid}/home"):
        raise IsochamberError(
            "was given a disk and is not configured for it yet", stage="disk", path=f"{root}/{paths.TENANTS_FS}/{tid}",
            hint="run ./doit: it was cut before its end",
        )  # fmt: skip


def _require(target: str, project: int) -> None:
    """Raise IsochamberError (stage "disk") unless the file system limits ``project``."""
    try:
        if quota.enforced(target) and quota.limit(target, project)[0]:
            return
        problem = IsochamberError("no limit is in force", stage="disk", path=target)
    except OSError as error:
        problem = IsochamberError.from_os(error, stage="disk", path=target)
    problem.hint = "its limit is a project quota: mount the file system with prjquota, then run ./doit again"
    raise problem


def detach(root: str, tid: str) -> None:
    """Unmount the tenant's image; one that is not mounted is fine. Raises OSError."""
    target = f"{root}/{paths.TENANTS_FS}/{tid}"
    while is_mounted(target):
        syscalls.umount2(target, syscalls.MNT_DETACH)


def is_mounted(target: str) -> bool:
    """Say whether the directory ``target`` is a mount point."""
    try:
        return os.stat(target).st_dev != os.stat(f"{target}/..").st_dev
    except FileNotFoundError:
        return False


def mount(file: int, image: str, target: str) -> None:
    """Mount the open ``file`` at ``target``; the caller has locked it. Raises OSError."""
    device = attached(file)
    if device is None:
        device, loop = _configure(file, image)
    else:
        loop = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        syscalls.mount(device, target, "ext4", _FLAGS, _OPTIONS)
    finally:
        os.close(loop)  # until here: with nobody on it the device would free itself


def attached(file: int) -> str | None:
    """Return the loop device over the open ``file``, or None."""
    status = os.fstat(file)
    for name in os.listdir("/sys/block"):
        if not name.startswith("loop") or not os.path.exists(f"/sys/block/{name}/loop"):
            continue
        try:
            loop = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # freed in between
        try:
            info = struct.unpack(_INFO64, fcntl.ioctl(loop, _LOOP_GET_STATUS64, b"\0" * 232))
        except OSError:
            continue
        finally:
            os.close(loop)
        if (info[0], info[1]) == (status.st_dev, status.st_ino):
            return f"/dev/{name}"
    return None


def _configure(file: int, image: str) -> tuple[str, int]:
    """Put a free loop device over ``file``; returns its path and an open descriptor."""
    name = os.fsencode(image)[-63:]  # for losetup's list only
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for flags in (_AUTOCLEAR | _DIRECT, _AUTOCLEAR):
            info = struct.pack(_INFO64, 0, 0, 0, 0, 0, 0, 0, 0, flags, name, b"", b"", 0, 0)
            while True:
                number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
                loop = os.open(f"/dev/loop{number}", os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.ioctl(loop, _LOOP_CONFIGURE, struct.pack(_CONFIG, file, 0, info))
                    return f"/dev/loop{number}", loop
                except OSError as error:
                    os.close(loop)
                    if error.errno == errno.EINVAL:
                        break  # no direct IO on this file system
                    if error.errno != errno.EBUSY:  # EBUSY: somebody was quicker
                        raise
        raise OSError(errno.EINVAL, "no loop device takes it", image)
    finally:
        os.close(control)
