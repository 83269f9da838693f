"""Writes of state that a power cut leaves whole: stage, sync, rename, sync the parent.

Every write of state goes through here. The order is the one crash tests of other
stores arrived at: all contents below staging are on disk before the name is, and
the name is on disk before anyone is told. A failed sync is never retried: the
kernel may have marked the lost pages clean (fsync(2), NOTES; "fsyncgate" 2018).
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from isochamber.build import tree
from isochamber.launch import syscalls

_STAGE_PREFIX = ".tmp-"


def sync_directory(path: Path) -> None:
    """fsync(2) a directory, so that the names in it survive; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
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
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode)
        sync_directory(directory.parent)


def write_file(path: Path, content: bytes, *, mode: int = 0o600, exclusive: bool = False) -> None:
    """Replace ``path`` with ``content`` (bytes) in one step; with ``exclusive`` an existing file stays and wins.

    Readers see the former file or the new one, never a part. Raises OSError, and
    then leaves the former file as it was.
    """
    stage = path.with_name(f"{_STAGE_PREFIX}{path.name}-{secrets.token_hex(8)}")
    try:
        descriptor = os.open(stage, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        if exclusive:
            with contextlib.suppress(FileExistsError):
                os.link(stage, path)
            stage.unlink()
        else:
            stage.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            stage.unlink()
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def staging_directory(staging: Path, label: str, mode: int = 0o700) -> Iterator[Path]:
    """Give a fresh directory below ``staging``; whatever is still there at the end is removed.

    ``label`` only helps a reader of a half-made state directory. Nothing below it
    may be mounted when the block ends.
    """
    path = staging / f"{_STAGE_PREFIX}{label}-{secrets.token_hex(8)}"
    path.mkdir(mode)
    path.chmod(mode)  # whatever the umask
    try:
        yield path
    finally:
        remove_tree(path)


def commit_tree(stage: Path, target: Path) -> None:
    """Publish the directory ``stage`` as ``target``: one checked syncfs, rename, parent synced.

    Every writer below ``stage`` must have stopped. Raises OSError (FileExistsError
    or ENOTEMPTY when ``target`` is there already); the stage is then left to its owner.
    """
    descriptor = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.syncfs(descriptor)  # one call is 40 times cheaper than an fsync a file on a Debian tree
    finally:
        os.close(descriptor)
    syscalls.rename_noreplace(os.fspath(stage), os.fspath(target))
    sync_directory(target.parent)
    if stage.parent != target.parent:
        sync_directory(stage.parent)


def remove_tree(path: Path) -> None:
    """Remove a tree by descriptors, never through a symlink in it; nothing there is fine. Raises OSError.

    The tree is a tenant's: it may be deep and full of odd modes. It is renamed
    first, so that a cut in the middle leaves no half of a product under its name.
    """
    if not os.path.lexists(path):
        return
    doomed = path if path.name.startswith(_STAGE_PREFIX) else path.with_name(f"{_STAGE_PREFIX}{secrets.token_hex(8)}")
    if doomed != path:
        path.rename(doomed)
        sync_directory(path.parent)
    descriptor = os.open(doomed, tree.DIRECTORY)
    try:
        tree.remove_contents(descriptor)
    finally:
        os.close(descriptor)
    doomed.rmdir()


def stale_stages(directory: Path) -> list[str]:
    """Return the names of what a killed build or removal left in ``directory``."""
    return sorted(name for name in os.listdir(directory) if name.startswith(_STAGE_PREFIX))
