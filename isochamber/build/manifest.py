"""The manifest of a base or a layer: what it is, what it was made of, and a list of what came out, with digests.

Beside manifest.json stands files.list: a JSON array a line for every name of the
rootfs, ``[path, mode, uid, gid, size, content]``; size is 0 for what is no regular
file, content the SHA-256 of a file (and its file capability), the target of a
symlink, the number of a device. ``tree`` of the manifest is the SHA-256 of that list.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isochamber import paths
from isochamber.build import tree
from isochamber.build.inputs import Inputs
from isochamber.errors import IsochamberError

_FORMAT = 2
_CHUNK = 1 << 20
_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Manifest:
    """What stands in manifest.json, beside the rootfs it speaks of."""

    kind: str  # "base" or "layer"
    name: str  # of the base, or of the tenant that a layer was first built for
    inputs: Inputs
    tree: str  # SHA-256 of the list of files
    size: int  # bytes of file content
    names: int  # how many files, directories and the rest
    extra: Mapping[str, Any] = field(default_factory=dict)


def write(directory: Path, manifest: Manifest) -> None:
    """Write the manifest into a staging directory, last; committing the directory is what makes it durable."""
    content = {
        "format": _FORMAT,
        "kind": manifest.kind,
        "name": manifest.name,
        "inputs": [list(pair) for pair in manifest.inputs.items],
        "tree": manifest.tree,
        "size": manifest.size,
        "names": manifest.names,
        "extra": dict(manifest.extra),
    }
    (directory / paths.MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def read(directory: Path) -> Manifest:
    """Return the manifest of a product; raises IsochamberError when it is missing or damaged."""
    path = directory / paths.MANIFEST
    try:
        raw = json.loads(path.read_text())
        if raw["format"] != _FORMAT:
            raise ValueError(raw["format"])
        return Manifest(
            kind=raw["kind"],
            name=raw["name"],
            inputs=Inputs(tuple((name, value) for name, value in raw["inputs"])),
            tree=raw["tree"],
            size=int(raw["size"]),
            names=int(raw["names"]),
            extra=raw["extra"],
        )
    except OSError as error:
        raise IsochamberError.from_os(error, stage="manifest", path=path) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IsochamberError(
            "is damaged", stage="manifest", path=path, hint=f"remove {directory} and run ./doit: it is built again"
        ) from error


def exists(directory: Path) -> bool:
    """Say whether a product is there, and whole as far as a glance tells: its manifest, its list and its rootfs.

    A product has its name only when it is complete. What a broken file system makes of
    it later is looked for in :func:`torn`, and by fsck.
    """
    try:
        found = read(directory)
        listing = (directory / paths.LISTING).stat()
    except (IsochamberError, OSError):
        return False
    # A line has at least 20 characters: a list that was cut is noticed without being read.
    return listing.st_size >= 20 * found.names and (directory / paths.ROOTFS).is_dir()


@dataclass(frozen=True, slots=True)
class Described:
    """What a tree holds."""

    lines: bytes  # of files.list
    size: int  # bytes of file content
    names: int

    @property
    def tree(self) -> str:
        """The digest of the tree: every name, type, mode, owner, content and file capability."""
        return hashlib.sha256(self.lines).hexdigest()


def describe(root: Path, *, contents: bool = True, holes: bool = False) -> Described:
    """List a tree; without ``contents`` the last field of each line is empty, and no file is read.

    With ``holes`` what is no data is not read either (a tenant can make a file of 8 EiB),
    and the digest of a file is one of its blocks that are not empty.

    Nothing that differs between two builds of the same thing on the same inputs by time
    alone is in it (times and inode numbers). Nothing may be writing below ``root``.
    Raises OSError, IsochamberError.
    """
    lines, total = [], 0
    descriptor = os.open(root, tree.DIRECTORY)
    try:
        for item in tree.walk(descriptor, stage="manifest"):
            total += item.status.st_size if item.kind == stat.S_IFREG else 0
            lines.append(_line(item, contents=contents, holes=holes))
    finally:
        os.close(descriptor)
    return Described(b"".join(lines), total, len(lines))


def _line(item: tree.Item, *, contents: bool, holes: bool) -> bytes:
    status, content = item.status, ""
    size = status.st_size if item.kind == stat.S_IFREG else 0
    if contents:
        if item.kind == stat.S_IFREG:
            content = _hash_file(item, holes=holes)
        elif item.kind == stat.S_IFLNK:
            content = os.readlink(item.name, dir_fd=item.parent)
        elif item.kind in (stat.S_IFCHR, stat.S_IFBLK):
            content = str(status.st_rdev)
    fields = (item.path, status.st_mode, status.st_uid, status.st_gid, size, content)
    return json.dumps(fields, separators=(",", ":")).encode("ascii") + b"\n"


def describe_tree(root: Path) -> tuple[str, int]:
    """Return the digest of a tree and the bytes of its files' content; see :func:`describe`."""
    found = describe(root)
    return found.tree, found.size


def complete(stage: Path, kind: str, name: str, inputs: Inputs, extra: Mapping[str, Any] | None = None) -> None:
    """List ``stage``/rootfs and write the list and then the manifest beside it. Raises OSError, IsochamberError."""
    found = describe(stage / paths.ROOTFS)
    (stage / paths.LISTING).write_bytes(found.lines)
    write(stage, Manifest(kind, name, inputs, found.tree, found.size, found.names, extra or {}))


def differences(directory: Path, *, contents: bool) -> Iterator[str]:
    """Yield a phrase for everything below the product's rootfs that is not as its list says; whole: nothing.

    With ``contents`` every file is read. Raises IsochamberError when the manifest is missing or damaged.
    """
    wanted = read(directory)
    try:
        raw = (directory / paths.LISTING).read_bytes()
    except OSError as error:
        yield f"{paths.LISTING}: {error.strerror}"
        return
    if hashlib.sha256(raw).hexdigest() != wanted.tree:
        yield f"{paths.LISTING} is not the one that the manifest was written with"
        return
    try:
        now = _fields(describe(directory / paths.ROOTFS, contents=contents).lines)
    except OSError as error:
        yield f"{paths.ROOTFS}: {error.strerror}"
        return
    yield from _differences_of_home(directory, wanted.extra.get("home", {}), contents=contents)
    then = _fields(raw)
    for path in sorted(set(then) | set(now)):
        before, after = then.get(path), now.get(path)
        if before is None or after is None:
            yield f"{paths.ROOTFS}/{path} is {'missing' if after is None else 'not of it'}"
        elif before[:5] != after[:5]:
            yield f"{paths.ROOTFS}/{path}: {_changed(before, after)} changed"
        elif contents and before[5] != after[5]:
            yield f"{paths.ROOTFS}/{path}: content changed"


def _differences_of_home(directory: Path, listed: Mapping[str, str], *, contents: bool) -> Iterator[str]:
    """Compare what a layer's install script left in /home with the digests in its manifest."""
    for path, digest in listed.items():
        file = directory / paths.LAYER_HOME / path
        name = f"{paths.LAYER_HOME}/{path}"
        if not os.path.lexists(file):
            yield f"{name} is missing"
        elif not contents or file.is_dir() or file.is_symlink():
            continue
        else:
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if hash_descriptor(descriptor) != digest.removesuffix("+x"):
                    yield f"{name}: content changed"
            finally:
                os.close(descriptor)


def _fields(lines: bytes) -> dict[str, list[Any]]:
    return {fields[0]: fields for fields in map(json.loads, lines.splitlines())}


def _changed(before: list[Any], after: list[Any]) -> str:
    names = ("name", "mode", "uid", "gid", "size")
    return ", ".join(name for name, old, new in zip(names, before, after, strict=False) if old != new)


_whole: set[str] = set()  # what this process has found whole


def _key(directory: Path) -> str | None:
    """Name this very product, which another of the same name is not; None when there is none."""
    try:
        status = (directory / paths.MANIFEST).stat()
    except OSError:
        return None
    return f"{directory}|{status.st_dev}|{status.st_ino}|{status.st_ctime_ns}"


def torn(directory: Path) -> bool:
    """Say whether a product's names, types, modes and sizes differ from its list; looked at once a boot.

    After a power cut a file system may have lost what it had promised. What was found
    whole is noted in the run-time directory, which the next boot starts without.
    """
    try:
        key = _key(directory)
        if key is None:
            return True
        mark = Path(paths.run_directory()) / "whole" / hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
        if mark.exists():
            _whole.add(key)
            return False
        if next(differences(directory, contents=False), None) is not None:
            return True
    except (OSError, IsochamberError):
        return True
    _whole.add(key)
    with contextlib.suppress(OSError):
        mark.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mark.touch()
    return False


def usable(directory: Path) -> bool:
    """Say whether a product is there and not torn."""
    if _key(directory) in _whole:
        return True
    return exists(directory) and not torn(directory)


def _hash_file(item: tree.Item, *, holes: bool) -> str:
    descriptor = os.open(item.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=item.parent)
    try:
        text = _hash_blocks(descriptor, item.status.st_size) if holes else hash_descriptor(descriptor)
        try:
            return text + os.getxattr(descriptor, "security.capability").hex()
        except OSError:
            return text  # none, or no such attributes on this file system
    finally:
        os.close(descriptor)


def _hash_blocks(descriptor: int, size: int) -> str:
    """Return the SHA-256 (hex) of the blocks that are not empty, each after its offset."""
    digest, done = hashlib.sha256(), 0
    for begin, length in tree.extents(descriptor, size):
        for offset in range(max(begin - begin % _BLOCK, done), begin + length, _BLOCK):
            done = offset + _BLOCK
            block = os.pread(descriptor, _BLOCK, offset)
            if block.count(0) != len(block):
                digest.update(offset.to_bytes(8, "little"))
                digest.update(block)
    return digest.hexdigest()


def hash_descriptor(descriptor: int) -> str:
    """Return the SHA-256 (hex) of an open file from its beginning; raises OSError."""
    digest, offset = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, _CHUNK, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()
