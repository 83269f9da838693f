"""Walking and removing trees that a tenant may have made: by descriptors, never through a symlink."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from isochamber.errors import IsochamberError

# A Debian root is some 20 directories deep; a tree made to exhaust us is not.
MAX_DEPTH = 256

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def stamp_of(status: os.stat_result) -> tuple[int, int, int, int, int]:
    """Return what tells a file from another one, and from itself with another content (stat(2))."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a tree: its name in the open directory ``parent``, and its path below the walk's root."""

    parent: int  # a descriptor, open while this item is being handled
    name: str
    path: str
    status: os.stat_result  # of the entry itself, symlinks not followed

    @property
    def kind(self) -> int:
        """Return the S_IFMT bits."""
        return stat.S_IFMT(self.status.st_mode)


def walk(root: int, *, stage: str, prefix: str = "") -> Iterator[Item]:
    """Yield every entry below the open directory ``root``, a directory before what is in it, names in order.

    A directory that is gone (or was replaced) when its turn comes is passed over, so
    the handler of an item may remove it. Raises IsochamberError for a tree deeper than MAX_DEPTH.
    """
    if prefix.count("/") >= MAX_DEPTH:
        raise IsochamberError(f"is deeper than {MAX_DEPTH} directories", stage=stage, path=prefix[:80])
    for name in sorted(os.listdir(root)):
        try:
            status = os.stat(name, dir_fd=root, follow_symlinks=False)
        except FileNotFoundError:
            continue
        path = f"{prefix}{name}"
        yield Item(root, name, path, status)
        if stat.S_ISDIR(status.st_mode):
            try:
                below = os.open(name, DIRECTORY, dir_fd=root)
            except (FileNotFoundError, NotADirectoryError):
                continue
            try:
                yield from walk(below, stage=stage, prefix=f"{path}/")
            finally:
                os.close(below)


def extents(descriptor: int, size: int) -> list[tuple[int, int]]:
    """Return (offset, length) of what is no hole: lseek(2), SEEK_DATA."""
    found, offset = [], 0
    while offset < size:
        try:
            begin = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        end = min(os.lseek(descriptor, begin, os.SEEK_HOLE), size)
        if end <= begin:
            break
        found.append((begin, end - begin))
        offset = end
    return found


def size_of(path: Path) -> int:
    """Return the bytes that a tree occupies on disk (blocks, not lengths); 0 when there is none."""
    try:
        root = os.open(path, DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    try:
        seen: set[tuple[int, int]] = set()
        total = 0
        for item in walk(root, stage="size"):
            key = (item.status.st_dev, item.status.st_ino)
            if key not in seen:
                seen.add(key)
                total += item.status.st_blocks * 512
        return total
    except IsochamberError:
        return 0  # too deep to be counted; it can still be removed
    finally:
        os.close(root)


def remove_contents(root: int) -> None:
    """Remove everything below the open directory ``root``; raises OSError.

    Directories found two levels down are renamed up to ``root`` first, so neither our
    stack, our descriptors nor PATH_MAX bound how deep the tree may be.
    """
    while names := _names(root):
        for name in names:
            try:
                os.unlink(name, dir_fd=root)
            except IsADirectoryError:
                _remove_directory(root, name)
            except FileNotFoundError:
                pass


def _names(directory: int) -> list[str]:
    """List an open directory as it is now: btrfs shows what it had when it was opened, or last sought."""
    os.lseek(directory, 0, os.SEEK_SET)
    return os.listdir(directory)


def _remove_directory(root: int, name: str) -> None:
    below = os.open(name, DIRECTORY, dir_fd=root)
    try:
        for child in os.listdir(below):
            try:
                os.unlink(child, dir_fd=below)
            except IsADirectoryError:
                os.rename(child, secrets.token_hex(12), src_dir_fd=below, dst_dir_fd=root)
    finally:
        os.close(below)
    os.rmdir(name, dir_fd=root)
