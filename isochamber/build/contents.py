"""Content digests of progs/ and of an operator's files, hashed once and remembered by what fstat(2) says.

The memory lies in cache/ and may be deleted at any time. A file is remembered by
(device, inode, size, mtime, ctime): a tenant can set back the mtime and not the
ctime. One that was changed so recently that a second change could leave the same
ctime (the kernel's clock ticks every 4 ms at worst) is waited for.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path

from isochamber import paths
from isochamber.build import durable, manifest, tree
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.spec import package as packages
from isochamber.spec.model import Package

DIRECTORY = "directory"
_EXECUTABLE = "+x"
_TICK = 0.02  # seconds

_Memory = dict[str, list[object]]  # name -> [*identity, digest]


def digests(state: State, package: Package) -> Mapping[str, str]:
    """Return path -> digest for every entry of ``package``'s progs/.

    A digest is the SHA-256 of the content, with ``+x`` for an executable file; a
    directory's is "directory". Raises IsochamberError when a file is not what the
    walk saw any more.
    """
    memory = _Cache(state, str(package.directory))
    found: dict[str, str] = {}
    for prog in package.progs:
        if prog.kind == "directory":
            found[prog.path] = DIRECTORY
            continue
        digest = memory.get(prog.path, prog.identity)
        if digest is None:
            _wait_for_clock(prog.identity[4])
            descriptor = packages.open_prog(package, prog)
            try:
                digest = manifest.hash_descriptor(descriptor)
                _check_unchanged(descriptor, prog.identity, package.directory / "progs" / prog.path)
            finally:
                os.close(descriptor)
        memory.put(prog.path, prog.identity, digest)
        found[prog.path] = digest + (_EXECUTABLE if prog.executable else "")
    memory.save()
    return found


def digest_with_mode(content: str, mode: int) -> str:
    """Return the digest of a file with this content digest and st_mode: the execute bit counts."""
    return content + (_EXECUTABLE if mode & 0o111 else "")


def content_of(digest: str) -> str:
    """Return the SHA-256 of the content alone."""
    return digest.removesuffix(_EXECUTABLE)


def is_executable(digest: str) -> bool:
    """Say whether a digest of :func:`digests` is that of an executable file."""
    return digest.endswith(_EXECUTABLE)


def file_digest(state: State, path: Path) -> str:
    """Return the digest of one file of the operator's (symlinks followed: it is his); raises IsochamberError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise IsochamberError.from_os(
            error, stage="base", path=path, hint="named under files: in tenants.yaml"
        ) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise IsochamberError("is not a regular file", stage="base", path=path, hint="named under files:")
        memory = _Cache(state, f"file {path}")
        known = tree.stamp_of(status)
        digest = memory.get("", known)
        if digest is None:
            _wait_for_clock(known[4])
            digest = manifest.hash_descriptor(descriptor)
            _check_unchanged(descriptor, known, path)
        memory.put("", known, digest)
        memory.save()
        return digest_with_mode(digest, status.st_mode)
    finally:
        os.close(descriptor)


def _check_unchanged(descriptor: int, identity: tuple[int, ...], path: Path) -> None:
    if tree.stamp_of(os.fstat(descriptor)) != identity:
        raise IsochamberError("changed while it was read", stage="contents", path=path, hint="run ./doit again")


def _wait_for_clock(ctime_ns: int) -> None:
    age = time.time() - ctime_ns / 1e9
    if 0 <= age < _TICK:
        time.sleep(_TICK - age)


class _Cache:
    """What is remembered of one package or file; damaged means empty, unchanged is not written."""

    def __init__(self, state: State, key: str) -> None:
        self._directory = state.root / paths.CACHE / "contents"
        self._staging = state.staging
        self._file = self._directory / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.json"
        self._former = self._load()
        self._now: _Memory = {}

    def _load(self) -> _Memory:
        try:
            loaded = json.loads(self._file.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    def get(self, name: str, identity: tuple[int, ...]) -> str | None:
        """Return the digest remembered for ``name`` as it was when it had this ``identity``."""
        known = self._former.get(name)
        if isinstance(known, list) and known[:-1] == list(identity) and isinstance(known[-1], str):
            return known[-1]
        return None

    def put(self, name: str, identity: tuple[int, ...], digest: str) -> None:
        """Remember a digest, unless the file's clock runs ahead of ours."""
        if identity[4] / 1e9 <= time.time():
            self._now[name] = [*identity, digest]

    def save(self) -> None:
        """Write what changed; a state directory that is not there yet (or not ours to write) remembers nothing."""
        if self._now == self._former or not self._directory.parent.is_dir():
            return
        try:
            durable.make_directories(self._directory)
            durable.write_file(self._file, json.dumps(self._now).encode(), staging=self._staging)
        except OSError:
            return  # a memory that can't be kept costs time and nothing else
