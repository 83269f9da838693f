"""Writes of state that a power cut leaves whole: stage, sync, rename, sync the parent.

Every write of state goes through here. The order is the one crash tests of other
stores arrived at: all contents below staging are on disk before the name is, and
the name is on disk before anyone is told. A failed sync is never retried: the
kernel may have marked the lost pages clean (fsync(2), NOTES; "fsyncgate" 2018).
When the name itself can't be synced it is taken back, so that the next run does
not find it and believe in it.

A stage is locked (flock(2)) for as long as its maker lives: what nobody holds was
left by a cut, and :mod:`isochamber.build.recover` removes it.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from isochamber.build import tree
from isochamber.launch import syscalls

STAGE_PREFIX = ".tmp-"
RESERVE = "reserve"  # below the state directory: given up when the disk is full, so that small state can be written
RESERVE_BYTES = 1 << 20

_FULL = (errno.ENOSPC, errno.EDQUOT)

# Open stages of this process: their descriptor saw every write-back error since they were made (see commit_tree).
_stages: dict[str, int] = {}


def sync_directory(path: Path) -> None:
    """fsync(2) a directory, so that the names in it survive; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """fsync(2) a file; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: Path, mode: int = 0o700) -> None:
    """Make ``path`` and its missing parents, each name synced in its own parent; raises OSError."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        try:
            directory.mkdir(mode)
        except FileExistsError:
            continue
        try:
            sync_directory(directory.parent)
        except OSError:
            with contextlib.suppress(OSError):
                directory.rmdir()
            raise


# Files.


def write_file(
    path: Path, content: bytes, *, mode: int = 0o600, exclusive: bool = False, staging: Path | None = None
) -> os.stat_result:
    """Replace ``path`` with ``content`` (bytes) in one step; with ``exclusive`` an existing file stays and wins.

    Readers see the former file or the new one, never a part. Returns the status of what
    was written. Raises OSError, and then leaves the former file as it was. On a full disk
    the reserve is given up first, when ``staging`` (the state directory's; by default the
    file is staged beside itself) has one.
    """
    try:
        return _write_file(path, content, mode, exclusive, staging or path.parent)
    except OSError as error:
        if error.errno not in _FULL or staging is None or not _give_up_reserve(staging.parent):
            raise
        return _write_file(path, content, mode, exclusive, staging)


def _write_file(path: Path, content: bytes, mode: int, exclusive: bool, directory: Path) -> os.stat_result:
    with _staged_file(directory, path.name, mode) as (stage, descriptor):
        _write_all(descriptor, content)
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)
        if exclusive:
            _link(stage, path)
        else:
            _replace(stage, path)
        return os.fstat(descriptor)


@contextlib.contextmanager
def _staged_file(directory: Path, label: str, mode: int) -> Iterator[tuple[Path, int]]:
    """Give a new locked file and its descriptor; what stands at its name at the end is removed."""
    while True:
        stage = directory / f"{STAGE_PREFIX}{label}-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(stage, flags, mode)
        if _claimed(descriptor, stage):
            break
        os.close(descriptor)
    try:
        yield stage, descriptor
    finally:
        with contextlib.suppress(OSError):
            stage.unlink()
        os.close(descriptor)


def _claimed(descriptor: int, path: Path) -> bool:
    """Lock a new stage; False when somebody who cleans up was quicker and has removed it."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _write_all(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def _link(stage: Path, path: Path) -> None:
    try:
        os.link(stage, path)
    except FileExistsError:
        return
    try:
        sync_directory(path.parent)
    except OSError:
        path.unlink()
        raise


def _replace(stage: Path, path: Path) -> None:
    """Exchange ``stage`` with ``path``, so that the former file can be put back when its directory can't be synced."""
    existed = os.path.lexists(path)
    if existed:
        syscalls.rename_exchange(os.fspath(stage), os.fspath(path))
    else:
        stage.rename(path)
    try:
        _sync_both(path.parent, stage.parent)
    except OSError:
        if existed:
            syscalls.rename_exchange(os.fspath(stage), os.fspath(path))
        else:
            path.rename(stage)
        raise


def _sync_both(target: Path, source: Path) -> None:
    sync_directory(target)
    if source != target:
        sync_directory(source)


@contextlib.contextmanager
def output(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write; it stands at ``path`` whole when the block ends well, else ``path`` is as before."""
    with _staged_file(path.parent, path.name, 0o600) as (stage, descriptor):
        with os.fdopen(os.dup(descriptor), "wb") as file:
            yield file
        os.fsync(descriptor)
        _replace(stage, path)


# Trees.


@contextlib.contextmanager
def staging_directory(staging: Path, label: str, mode: int = 0o700) -> Iterator[Path]:
    """Give a fresh directory below ``staging``; whatever is still there at the end is removed.

    ``label`` only helps a reader of a half-made state directory. Nothing below it
    may be mounted when the block ends.
    """
    while True:
        path = staging / f"{STAGE_PREFIX}{label}-{secrets.token_hex(8)}"
        path.mkdir(mode)
        try:
            descriptor = os.open(path, tree.DIRECTORY)
        except FileNotFoundError:
            continue  # removed by who cleans up
        if _claimed(descriptor, path):
            break
        os.close(descriptor)
    _stages[os.fspath(path)] = descriptor
    try:
        path.chmod(mode)  # whatever the umask
        yield path
    finally:
        try:
            with contextlib.suppress(OSError):  # it is found and removed the next time
                remove_tree(path)
        finally:
            del _stages[os.fspath(path)]
            os.close(descriptor)


def sync_tree(stage: Path) -> None:
    """Put everything below ``stage`` on disk: one checked syncfs(2). Every writer must have stopped; raises OSError.

    One call is 40 times cheaper than an fsync a file on a Debian tree. It reports
    write-back errors since its descriptor was opened, so one opened at the end could miss
    an error that another process's sync has been told of: the stage's own is used.
    """
    for directory in (stage, *stage.parents):
        if os.fspath(directory) in _stages:
            syscalls.syncfs(_stages[os.fspath(directory)])
            return
    descriptor = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.syncfs(descriptor)
    finally:
        os.close(descriptor)


def commit_tree(stage: Path, target: Path) -> None:
    """Publish the directory ``stage`` as ``target``: one checked syncfs, rename, both parents synced.

    Every writer below ``stage`` must have stopped. Raises OSError (FileExistsError
    when ``target`` is there already); the stage is then left to its owner.
    """
    sync_tree(stage)
    syscalls.rename_noreplace(os.fspath(stage), os.fspath(target))
    try:
        _sync_both(target.parent, stage.parent)
    except OSError:
        syscalls.rename_noreplace(os.fspath(target), os.fspath(stage))
        raise


def exchange_tree(stage: Path, target: Path) -> None:
    """Put ``stage`` where ``target`` is, and that where ``stage`` was, in one step. Raises OSError, then as before."""
    sync_tree(stage)
    syscalls.rename_exchange(os.fspath(stage), os.fspath(target))
    try:
        _sync_both(target.parent, stage.parent)
    except OSError:
        syscalls.rename_exchange(os.fspath(target), os.fspath(stage))
        raise


def remove_tree(path: Path, staging: Path | None = None) -> None:
    """Remove a tree by descriptors, never through a symlink in it; nothing there is fine. Raises OSError.

    The tree is a tenant's: it may be deep and full of odd modes. It is renamed first
    (into ``staging`` if given, where a cut leaves it to be found), so that there is
    no moment with half of a product under its name.
    """
    try:
        descriptor = os.open(path, tree.DIRECTORY)
    except FileNotFoundError:
        return
    try:
        doomed = path
        if not path.name.startswith(STAGE_PREFIX):
            doomed = (staging or path.parent) / f"{STAGE_PREFIX}removed-{secrets.token_hex(8)}"
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.rename(doomed)
            _sync_both(path.parent, doomed.parent)
        tree.remove_contents(descriptor)
    finally:
        os.close(descriptor)
    with contextlib.suppress(FileNotFoundError):
        doomed.rmdir()


def stale_stages(directory: Path) -> list[str]:
    """Return the names of what a killed build or removal left in ``directory``; none when somebody removes that too."""
    try:
        return sorted(name for name in os.listdir(directory) if name.startswith(STAGE_PREFIX))
    except FileNotFoundError:
        return []


def remove_any(path: Path) -> None:
    """Remove a tree, or a file or link by its name; nothing there is fine. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)


def remove_file(path: Path) -> None:
    """Unlink a file and sync its directory; nothing there is fine. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        sync_directory(path.parent)


def remove_stale_stages(directory: Path, *, only_ours: bool = True) -> tuple[str, ...]:
    """Remove what killed builds left in ``directory`` and nobody holds; returns the names.

    With ``only_ours`` false anything counts, whatever its name. What can't be removed
    now (a dying process may still write there) is left for the next time.
    """
    removed = []
    try:
        found = [entry.name for entry in os.scandir(directory)]
    except FileNotFoundError:
        return ()
    for name in sorted(found):
        if name.startswith(STAGE_PREFIX) or not only_ours:
            with contextlib.suppress(OSError):
                if _remove_stale(directory / name):
                    removed.append(name)
    return tuple(removed)


def is_stale(path: Path) -> bool:
    """Say whether a stage is there and nobody holds it."""
    try:
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
            return True
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return path.exists()


def _remove_stale(path: Path) -> bool:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
        path.unlink()
        return True
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: it is being made
        # Only now: who held it may have given it another name, a tenant's or a product's, before the lock was ours.
        if not os.path.samestat(os.fstat(descriptor), path.lstat()):
            return False
        if stat.S_ISREG(status.st_mode):
            path.unlink()
            return True
        tree.remove_contents(descriptor)
        path.rmdir()
    finally:
        os.close(descriptor)
    return True


# The reserve.


def make_reserve(root: Path) -> None:
    """Set RESERVE_BYTES aside when there is room for them twice; what fails is no error: there is no room."""
    path = root / RESERVE
    if path.exists():
        return
    status = os.statvfs(root)
    if status.f_bavail * status.f_frsize < 2 * RESERVE_BYTES:
        return
    with contextlib.suppress(OSError), _staged_file(root, RESERVE, 0o600) as (stage, descriptor):
        os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
        os.fsync(descriptor)
        _link(stage, path)


def _give_up_reserve(root: Path) -> bool:
    try:
        (root / RESERVE).unlink()
        sync_directory(root)
    except OSError:
        return False
    return True
