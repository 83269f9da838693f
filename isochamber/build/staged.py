"""The install script's /home: what of progs/ it may see, which of that it looked at, and what it left there.

Every digest is as :mod:`isochamber.build.contents` writes it. ``shown`` maps the path
of everything that the script may see to its digest.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from isochamber.build import contents, home, manifest, tree
from isochamber.build.watch import Watch
from isochamber.errors import IsochamberError
from isochamber.spec import package as packages
from isochamber.spec.model import Tenant

ITSELF = "."  # how the list of names of /home itself is called
MAX_BYTES = 64 << 30  # that a script may leave, holes counted: somebody has to hash it


def visible(tenant: Tenant, own: Mapping[str, str]) -> dict[str, str]:
    """Return what of progs/ the script may see: everything, or ``inputs`` (with all below) and the script itself."""
    package = tenant.package
    if package.inputs is None:
        return dict(own)
    wanted = {*package.inputs, package.script or ""}
    parents = {str(parent) for path in wanted for parent in Path(path).parents}
    return {
        path: digest
        for path, digest in own.items()
        if path in wanted or path in parents or any(str(parent) in wanted for parent in Path(path).parents)
    }


def seen(path: str, shown: Mapping[str, str]) -> str | None:
    """Return the digest of what an open of ``path`` shows: a file's content, a directory's list of names; or None."""
    directory = "" if path == ITSELF else path
    if directory and shown.get(path) != contents.DIRECTORY:
        return shown.get(path)
    prefix = f"{directory}/" if directory else ""
    names = sorted(name[len(prefix) :] for name in shown if name.startswith(prefix) and "/" not in name[len(prefix) :])
    return f"names {hashlib.sha256(json.dumps(names).encode()).hexdigest()}"


def observed(opened: Iterable[str], shown: Mapping[str, str], script: str | None) -> dict[str, str]:
    """Return path -> digest of what was opened ("" is /home itself), the script left out: the recipe has it."""
    paths = sorted({path or ITSELF for path in opened} - {script})
    return {path: digest for path in paths if (digest := seen(path, shown)) is not None}


def stage(tenant: Tenant, shown: Mapping[str, str], target: Path) -> None:
    """Copy what is ``shown`` into the new /home; the bytes are checked against the digests that name the layer."""
    for prog in tenant.package.progs:
        if prog.path not in shown:
            continue
        copy = target / prog.path
        if prog.kind == "directory":
            copy.mkdir(0o755)
            copy.chmod(0o755)
            continue
        with os.fdopen(packages.open_prog(tenant.package, prog), "rb") as source, copy.open("xb") as file:
            digest = hashlib.sha256()
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != contents.content_of(shown[prog.path]):
            raise IsochamberError(
                "changed while it was read", stage="layer", tenant=tenant.name, path=prog.path, hint="run ./doit again"
            )
        copy.chmod(0o755 if prog.executable or prog.path == tenant.package.script else 0o644)


@dataclass(frozen=True, slots=True)
class Left:
    """What a script made of its /home."""

    files: Mapping[str, str]  # path -> digest of what it made or changed
    removed: tuple[str, ...]  # paths it was shown that are gone
    moved: frozenset[str]  # paths it was shown whose file it gave another name, without opening it


def keep_what_was_left(staged: Path, shown: Mapping[str, str], watch: Watch) -> Left:
    """Reduce /home to what the script made or changed. Every process must be dead; raises OSError.

    IsochamberError when it left more than MAX_BYTES. Devices, FIFOs and sockets go: a
    /home is mounted nodev, and nobody would be at the other end.
    """
    files: dict[str, str] = {}
    present: set[str] = set()
    moved: set[str] = set()
    total = 0
    root = os.open(staged, tree.DIRECTORY)
    try:
        for item in tree.walk(root, stage="layer"):
            present.add(item.path)
            total += check_size(item, total)
            digest = _describe(item)
            origin = watch.path_of(item.status)
            if origin is not None and origin != item.path:
                moved.add(origin)
            if digest is None:
                os.unlink(item.name, dir_fd=item.parent)
            elif digest != shown.get(item.path):
                files[item.path] = digest
            elif digest != contents.DIRECTORY:
                os.unlink(item.name, dir_fd=item.parent)
    finally:
        os.close(root)
    return Left(files, tuple(sorted(set(shown) - present)), frozenset(moved))


def check_size(item: tree.Item, so_far: int) -> int:
    """Return the bytes that hashing ``item`` reads; raises IsochamberError when it gets more than MAX_BYTES.

    A hole costs the script nothing and us an hour.
    """
    size = item.status.st_size if item.kind == stat.S_IFREG else 0
    if so_far + size > MAX_BYTES:
        raise IsochamberError(
            f"the install script left more than {MAX_BYTES >> 30} GiB", stage="layer", path=item.path[:80],
            hint="holes in files count",
        )  # fmt: skip
    return size


def _describe(item: tree.Item) -> str | None:
    if item.kind == stat.S_IFDIR:
        return contents.DIRECTORY
    if item.kind == stat.S_IFLNK:
        return home.LINK + os.readlink(item.name, dir_fd=item.parent)
    if item.kind != stat.S_IFREG:
        return None
    descriptor = os.open(item.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=item.parent)
    try:
        os.fchown(descriptor, 0, 0)
        return contents.digest_with_mode(manifest.hash_descriptor(descriptor), item.status.st_mode)
    finally:
        os.close(descriptor)
