"""One tenant in one file: its /home, what we keep beside it, its entry; a tar in zstd, digests at its end.

Written: ``isochamber.json`` first, then ``home`` and all below it, ``beside/*``, and
``files.list`` last (as in a product, see :mod:`isochamber.build.manifest`): a file
that was cut has no list, and one that was changed does not agree with it. Owners
stand as on disk, 0-based, so the file means the same on a machine that gives the
tenant another range of ids.

While it is copied the tenant stands still (its cgroup is frozen), or can't be
started; the file is written from the copy. Reading one back is in
:mod:`isochamber.build.restore`.
"""

import base64
import contextlib
import fcntl
import io
import json
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from isochamber import paths
from isochamber.build import disk, durable, identity, locks, manifest, registry, space, tree
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import cgroup, records

FORMAT = 1
META, HOME, BESIDE, LISTING = "isochamber.json", "home", "beside", paths.LISTING
XATTRS = "ISOCHAMBER.xattrs"  # PAX keyword: JSON, name -> base64
NOT_BESIDE = (identity.NAME, paths.DISK_IMAGE)  # given by who restores; a whole file system, which nobody could check
MAX_BESIDE = 16 << 20  # bytes of one file that we keep beside /home
MAX_PATH = 3500  # bytes: the kernel takes 4096 (PATH_MAX) at once

_FICLONE = 0x40049409  # ioctl_ficlone(2)
_KEPT = ("security.capability", "system.posix_acl_access", "system.posix_acl_default")
_CHUNK = 1 << 20


def kept_attribute(name: str) -> bool:
    """Say whether an extended attribute is the tenant's own: what it could have set itself."""
    return name in _KEPT or name.startswith("user.")


@dataclass
class Saved:
    """What was written."""

    size: int = 0  # bytes of content
    names: int = 0
    left_out: list[str] = field(default_factory=list)  # a phrase each: sockets, devices, what is too deep


def backup(state: State, tenant: str, target: Path) -> Saved:
    """Write ``tenant`` (name or tid) to ``target``, which is there whole or not at all.

    Raises IsochamberError (stage "backup").
    """
    found = registry.find(state, tenant)
    if found is None:
        raise IsochamberError("is not configured", stage="backup", tenant=tenant, hint="isochamber ls")
    tid, name = str(found["tid"]), str(found["name"])
    saved = Saved()
    try:
        persist = state.tenant_persist(tid)
        with durable.staging_directory(state.staging, f"backup-{tid}") as stage:
            with locks.product_lock(state, f"tenant-{tid}", lambda _line: None), still(tid, name):
                disk.attach(state, tid)
                found = registry.find(state, tid)
                if found is None or not state.home(tid).is_dir():  # while this waited for the tenant's lock
                    raise IsochamberError("was removed meanwhile", stage="backup", tenant=name, hint="isochamber ls")
                space.require(state.root, tree.size_of(state.home(tid)), stage="backup", tenant=name)
                copy_tree(state.home(tid), stage / HOME, saved.left_out)
                beside = _beside(persist)
            listed = manifest.describe(stage / HOME, holes=True)
            saved.size, saved.names = listed.size, listed.names
            meta = {
                "format": FORMAT, "name": name, "tid": tid, "namespace": str(state.require_namespace()),
                "entry": found, "size": listed.size, "names": listed.names, "left_out": saved.left_out,
            }  # fmt: skip
            with durable.output(target) as file:
                _write(file, meta, stage / HOME, beside, listed.lines)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="backup", tenant=name) from error
    return saved


def _beside(persist: Path) -> dict[str, bytes]:
    """Return the files beside /home: manifests, what was learned. Ours, and small."""
    found = {}
    for path in sorted(persist.iterdir()):
        status = path.lstat()
        is_ours = stat.S_ISREG(status.st_mode) and path.name not in NOT_BESIDE and not path.name.startswith(".")
        if is_ours and status.st_size <= MAX_BESIDE:
            found[path.name] = path.read_bytes()
    return found


# Standing still.


@contextlib.contextmanager
def still(tid: str, name: str) -> Iterator[None]:
    """Keep the tenant from changing anything: frozen when it runs, not to be started when it does not."""
    while True:
        record = records.settled(tid)
        if record is not None:
            if record.cgroup is None:
                raise IsochamberError(
                    "runs, and can't be frozen: there is no cgroup v2 tree", stage="backup", tenant=name,
                    hint="stop it first",
                )  # fmt: skip
            with _frozen(record.cgroup, name):
                yield
            return
        try:
            lock = records.lock(tid, name)
        except IsochamberError:
            if records.held(tid):
                continue  # started in between
            raise
        try:
            yield
        finally:
            os.close(lock)
        return


@contextlib.contextmanager
def _frozen(group: str, name: str) -> Iterator[None]:
    if _or_ended(lambda: cgroup.is_frozen(group), group, name):
        yield  # by the operator's Ctrl-Z: it is not ours to thaw
        return
    # Thawed by a child that waits for our end, however we end: nobody else would.
    alive, held = os.pipe()
    watcher = os.fork()
    if watcher == 0:
        try:
            os.close(held)
            os.read(alive, 1)
            cgroup.freeze(group, frozen=False)
        finally:
            os._exit(0)
    os.close(alive)
    try:
        if not _or_ended(lambda: _freeze(group), group, name):
            raise IsochamberError("can't be frozen", stage="backup", tenant=name, path=group, hint="stop it first")
        yield
    finally:
        os.close(held)
        os.waitpid(watcher, 0)


def _freeze(group: str) -> bool:
    cgroup.freeze(group, frozen=True)
    return cgroup.wait_until(group, b"frozen 1")


def _or_ended(look: Callable[[], bool], group: str, name: str) -> bool:
    """Return what ``look`` returns; raises IsochamberError when the tenant, and its group, are gone."""
    try:
        return look()
    except FileNotFoundError as error:
        raise IsochamberError("ended meanwhile", stage="backup", tenant=name, path=group, hint="try again") from error


# Copying what a tenant made.


def copy_tree(source: Path, target: Path, left_out: list[str]) -> None:
    """Copy a tree by descriptors: holes, hard links, owners, modes, times and the tenant's attributes stay.

    What can't be in a file is left out, with a phrase in ``left_out``. Raises OSError.
    """
    target.mkdir(0o700)
    links: dict[tuple[int, int], Path] = {}
    reading, writing = os.open(source, tree.DIRECTORY), os.open(target, tree.DIRECTORY)
    try:
        _copy_directory(reading, writing, target, "", links, left_out)
        _copy_status(reading, writing)
    finally:
        os.close(reading)
        os.close(writing)


def _copy_directory(
    source: int, target: int, root: Path, prefix: str, links: dict[tuple[int, int], Path], left_out: list[str]
) -> None:
    if prefix.count("/") >= tree.MAX_DEPTH - 1:
        left_out.append(f"{prefix[:80]}...: deeper than {tree.MAX_DEPTH} directories")
        return
    for name in sorted(os.listdir(source)):
        path = f"{prefix}{name}"
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        kind = stat.S_IFMT(status.st_mode)
        if len(os.fsencode(path)) > MAX_PATH:
            left_out.append(f"{path[:80]}...: a path of more than {MAX_PATH} bytes")
        elif kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=target)
            below, copy = os.open(name, tree.DIRECTORY, dir_fd=source), os.open(name, tree.DIRECTORY, dir_fd=target)
            try:
                _copy_directory(below, copy, root, f"{path}/", links, left_out)
                _copy_status(below, copy)
            finally:
                os.close(below)
                os.close(copy)
        elif kind == stat.S_IFREG:
            known = links.get((status.st_dev, status.st_ino))
            if known is not None:
                os.link(known, name, dst_dir_fd=target)
                continue
            _copy_file(source, target, name)
            if status.st_nlink > 1:
                links[status.st_dev, status.st_ino] = root / path
        elif kind == stat.S_IFLNK:
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
            os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
        elif kind == stat.S_IFIFO:
            os.mkfifo(name, 0o600, dir_fd=target)
            os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
            os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=target)
        else:
            left_out.append(f"{path[:80]}: a socket or a device")


def _copy_file(source: int, target: int, name: str) -> None:
    reading = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        writing = os.open(name, flags, 0o600, dir_fd=target)
        try:
            try:
                fcntl.ioctl(writing, _FICLONE, reading)
            except OSError:
                _copy_extents(reading, writing)
            _copy_status(reading, writing)
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def _copy_extents(reading: int, writing: int) -> None:
    size = os.fstat(reading).st_size
    os.ftruncate(writing, size)
    for begin, length in tree.extents(reading, size):
        left, offset = length, begin
        while left > 0:
            chunk = os.pread(reading, min(left, _CHUNK), offset)
            if not chunk:
                break
            written = os.pwrite(writing, chunk, offset)
            offset += written
            left -= written


def _copy_status(reading: int, writing: int) -> None:
    status = os.fstat(reading)
    os.fchown(writing, status.st_uid, status.st_gid)
    os.fchmod(writing, stat.S_IMODE(status.st_mode))
    for name in filter(kept_attribute, os.listxattr(reading)):
        os.setxattr(writing, name, os.getxattr(reading, name))
    os.utime(writing, ns=(status.st_atime_ns, status.st_mtime_ns))


# Writing the file.


def _write(file: BinaryIO, meta: dict[str, Any], home: Path, beside: dict[str, bytes], lines: bytes) -> None:
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
    with (
        compressor.stream_writer(file, closefd=False) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, errors="surrogateescape") as archive,
    ):
        _add_bytes(archive, META, json.dumps(meta, indent=1).encode())
        root = os.open(home, tree.DIRECTORY)
        try:
            archive.addfile(_header(HOME, os.fstat(root), f"/proc/self/fd/{root}"))
            _add_tree(archive, root)
        finally:
            os.close(root)
        for name, content in beside.items():
            _add_bytes(archive, f"{BESIDE}/{name}", content)
        _add_bytes(archive, LISTING, lines)


def _add_bytes(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o600
    archive.addfile(member, io.BytesIO(content))


def _header(name: str, status: os.stat_result, path: str | None) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.mode, member.uid, member.gid = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
    member.mtime = int(status.st_mtime)
    member.type = {
        stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE, stat.S_IFIFO: tarfile.FIFOTYPE,
    }.get(stat.S_IFMT(status.st_mode), tarfile.REGTYPE)  # fmt: skip
    if path is not None:
        attributes = {
            key: base64.b64encode(os.getxattr(path, key)).decode() for key in filter(kept_attribute, os.listxattr(path))
        }
        if attributes:
            member.pax_headers = {XATTRS: json.dumps(attributes)}
    return member


def _add_tree(archive: tarfile.TarFile, root: int) -> None:
    links: dict[tuple[int, int], str] = {}
    for item in tree.walk(root, stage="backup"):
        name, key = f"{HOME}/{item.path}", (item.status.st_dev, item.status.st_ino)
        if item.kind == stat.S_IFLNK:
            member = _header(name, item.status, None)
            member.linkname = os.readlink(item.name, dir_fd=item.parent)
            archive.addfile(member)
        elif item.kind == stat.S_IFREG and key in links:
            member = _header(name, item.status, None)
            member.type, member.linkname = tarfile.LNKTYPE, links[key]
            archive.addfile(member)
        elif item.kind == stat.S_IFREG:
            if item.status.st_nlink > 1:
                links[key] = name
            _add_file(archive, name, item)
        else:
            path = f"/proc/self/fd/{item.parent}/{item.name}"
            archive.addfile(_header(name, item.status, None if item.kind == stat.S_IFIFO else path))


def _add_file(archive: tarfile.TarFile, name: str, item: tree.Item) -> None:
    descriptor = os.open(item.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=item.parent)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        member = _header(name, item.status, f"/proc/self/fd/{descriptor}")
        size = item.status.st_size
        parts = tree.extents(descriptor, size)
        if sum(length for _, length in parts) == size:
            member.size = size
            os.lseek(descriptor, 0, os.SEEK_SET)
            archive.addfile(member, file)
            return
        # tar(5), "GNU tar pax sparse", 1.0: the map stands before the data.
        numbers = [len(parts), *(number for part in parts for number in part)]
        table = "".join(f"{number}\n" for number in numbers).encode()
        table += b"\0" * (-len(table) % tarfile.BLOCKSIZE)
        member.pax_headers = {
            **member.pax_headers,
            "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name, "GNU.sparse.realsize": str(size),
        }  # fmt: skip
        member.size = len(table) + sum(length for _, length in parts)
        archive.addfile(member, _Sparse(table, descriptor, parts))  # type: ignore[arg-type] # it only reads


class _Sparse:
    """A map and then the data of a file with holes, as one stream."""

    def __init__(self, table: bytes, descriptor: int, parts: list[tuple[int, int]]) -> None:
        self._table, self._descriptor = table, descriptor
        self._parts = list(reversed(parts))

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes, fewer at the end."""
        found = bytearray(self._table[:size])
        self._table = self._table[size:]
        while len(found) < size and self._parts:
            offset, length = self._parts.pop()
            chunk = os.pread(self._descriptor, min(length, size - len(found)), offset)
            if not chunk:
                break
            if len(chunk) < length:
                self._parts.append((offset + len(chunk), length - len(chunk)))
            found += chunk
        return bytes(found)
