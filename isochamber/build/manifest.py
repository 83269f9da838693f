"""The manifest of a base or a layer: what it is, what it was made of, and the digest of what came out."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isochamber import paths
from isochamber.build import tree
from isochamber.build.inputs import Inputs
from isochamber.errors import IsochamberError

_FORMAT = 1
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Manifest:
    """What stands in manifest.json, beside the rootfs it speaks of."""

    kind: str  # "base" or "layer"
    name: str  # of the base, or of the tenant that a layer was first built for
    inputs: Inputs
    tree: str  # see describe_tree
    size: int  # bytes of file content
    extra: Mapping[str, Any] = field(default_factory=dict)


def write(directory: Path, manifest: Manifest) -> None:
    """Write the manifest into a staging directory; committing the directory is what makes it durable."""
    content = {
        "format": _FORMAT,
        "kind": manifest.kind,
        "name": manifest.name,
        "inputs": [list(pair) for pair in manifest.inputs.items],
        "tree": manifest.tree,
        "size": manifest.size,
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
            size=raw["size"],
            extra=raw["extra"],
        )
    except OSError as error:
        raise IsochamberError.from_os(error, stage="manifest", path=path) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IsochamberError(
            "is damaged", stage="manifest", path=path, hint=f"remove {directory} and run ./doit: it is built again"
        ) from error


def exists(directory: Path) -> bool:
    """Say whether a product is there; it has its name only when it is complete."""
    return (directory / paths.MANIFEST).is_file()


def describe_tree(root: Path) -> tuple[str, int]:
    """Return the digest of a tree and the bytes of its files' content.

    The digest covers every name, type, mode, owner, file content, link target, device
    number and file capability, and nothing that differs between two builds of the same
    thing on the same inputs by time alone (times and inode numbers are left out).
    Nothing may be writing below ``root``. Raises OSError, IsochamberError.
    """
    digest, total = hashlib.sha256(), 0
    descriptor = os.open(root, tree.DIRECTORY)
    try:
        for item in tree.walk(descriptor, stage="manifest"):
            status = item.status
            content = ""
            if item.kind == stat.S_IFREG:
                content = _hash_file(item)
                total += status.st_size
            elif item.kind == stat.S_IFLNK:
                content = os.readlink(item.name, dir_fd=item.parent)
            elif item.kind in (stat.S_IFCHR, stat.S_IFBLK):
                content = str(status.st_rdev)
            line = (item.path, status.st_mode, status.st_uid, status.st_gid, content)
            digest.update(json.dumps(line).encode("ascii") + b"\n")
    finally:
        os.close(descriptor)
    return digest.hexdigest(), total


def _hash_file(item: tree.Item) -> str:
    descriptor = os.open(item.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=item.parent)
    try:
        text = hash_descriptor(descriptor)
        try:
            return text + os.getxattr(descriptor, "security.capability").hex()
        except OSError:
            return text  # none, or no such attributes on this file system
    finally:
        os.close(descriptor)


def hash_descriptor(descriptor: int) -> str:
    """Return the SHA-256 (hex) of an open file from its beginning; raises OSError."""
    digest, offset = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, _CHUNK, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()
