"""A backup becomes a tenant's /home again, here or on another machine. The file may be anybody's work.

Nothing of it is believed: every name is checked and opened below a new directory
without following any link, owners must be ids that a tenant can have, sizes and counts
are bounded by what was announced and by the free space, and at the end what lies there
must be what the list in the file says. Only then it takes its place, in one step.
"""

import base64
import binascii
import io
import json
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import zstandard

from isochamber import paths
from isochamber.build import backup, disk, durable, identity, locks, manifest, ranges, space, tree
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import records, syscalls
from isochamber.spec import package

_BENEATH = (
    syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_XDEV
)
_CHUNK = 1 << 20
_MAX_META = 16 << 20  # bytes
_MAX_WINDOW = 1 << 27  # bytes of memory that a zstd frame may ask for
_MAX_NAME = 255
_FILE = re.compile(r"[a-z][a-z0-9_.-]{0,62}")

# What a damaged or forged file makes tarfile, zstandard and json raise.
_DAMAGED = (
    tarfile.TarError, zstandard.ZstdError, EOFError, ValueError, OverflowError, KeyError, IndexError, TypeError,
    AttributeError, RecursionError, MemoryError, binascii.Error,
)  # fmt: skip


class _RefusedError(ValueError):
    """Something in the file that no backup of ours has."""


def restore(state: State, file: Path, *, name: str | None = None, replace: bool = False) -> str:
    """Make the /home that ``file`` holds that of the tenant ``name`` (by default the one it was saved of).

    Returns the name. The tenant gets a tid and a range of ids of this machine; whatever
    else it needs ./doit makes from its package. A /home that holds something is only
    replaced with ``replace``. Raises IsochamberError (stage "restore").
    """
    state.create()
    try:
        with file.open("rb") as opened, durable.staging_directory(state.staging, "restore") as stage:
            found = _extract(state, file, opened, stage)
            wanted = name if name is not None else str(found.meta["name"])
            if not package.is_name(wanted):
                raise IsochamberError("is no name for a tenant", stage="restore", tenant=wanted, hint="--name NAME")
            _take_its_place(state, wanted, stage, replace=replace)
            return wanted
    except OSError as error:
        raise IsochamberError.from_os(error, stage="restore", tenant=name) from error


@dataclass
class _Archive:
    """What was read so far, and where it goes."""

    stage: Path
    root: int
    meta: dict[str, Any] = field(default_factory=dict)
    lines: bytes | None = None
    size: int = 0
    names: int = 0
    times: list[tuple[str, int]] = field(default_factory=list)  # of directories, set when all is in them


def _extract(state: State, file: Path, opened: IO[bytes], stage: Path) -> _Archive:
    (stage / backup.HOME).mkdir(0o700)
    root = os.open(stage / backup.HOME, tree.DIRECTORY)
    archive = _Archive(stage, root)
    try:
        _read(state, archive, opened)
        described = manifest.describe(stage / backup.HOME, holes=True)
        if archive.lines is None:
            raise _RefusedError("it was cut: its list is missing")
        if described.lines != archive.lines:
            raise _RefusedError("what it holds is not what its list says")
    except _DAMAGED as error:
        what = str(error) if isinstance(error, _RefusedError) else f"{type(error).__name__}: {error}"
        raise IsochamberError(
            f"is damaged, or no backup: {what[:200]}", stage="restore", path=file, hint="nothing was changed"
        ) from error
    finally:
        os.close(root)
    return archive


def _read(state: State, archive: _Archive, opened: IO[bytes]) -> None:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    with decompressor.stream_reader(opened, closefd=False) as stream, tarfile.open(
        fileobj=io.BufferedReader(stream, _CHUNK),
        mode="r|", errors="surrogateescape",
    ) as members:  # fmt: skip
        for member in members:
            if archive.lines is not None:
                raise _RefusedError("something follows its list")
            _take(state, archive, members, member)
    for path, moment in reversed(archive.times):
        descriptor = _open_directory(archive.root, path)
        os.utime(descriptor, (moment, moment))
        os.close(descriptor)


def _take(state: State, archive: _Archive, members: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    first, _, rest = member.name.partition("/")
    if not archive.meta:
        if member.name != backup.META:
            raise _RefusedError(f"it does not begin with {backup.META}")
        _take_meta(state, archive, _content(members, member, _MAX_META))
    elif member.name == backup.LISTING:
        archive.lines = _content(members, member, (archive.meta["names"] + 1) * 16384)
    elif first == backup.BESIDE:
        if not _FILE.fullmatch(rest) or rest == identity.NAME:
            raise _RefusedError(f"a file called {rest[:80]!r}")
        content = _content(members, member, backup.MAX_BESIDE)
        if rest != paths.DISK_IMAGE:  # former versions saved a small one, and nothing else looks at what is in it
            (archive.stage / rest).write_bytes(content)
            (archive.stage / rest).chmod(0o600)
    elif member.name == backup.HOME:
        _check_owner(member)
        _set_status(archive.root, member)
    elif first == backup.HOME:
        archive.names += 1
        if archive.names > archive.meta["names"]:
            raise _RefusedError("it holds more than it says")
        _place(archive, members, member, rest)
    else:
        raise _RefusedError(f"a member called {member.name[:80]!r}")


def _take_meta(state: State, archive: _Archive, content: bytes) -> None:
    meta = json.loads(content)
    if meta["format"] != backup.FORMAT:
        raise _RefusedError(f"its format is {meta['format']!r}, this version reads {backup.FORMAT}")
    if not isinstance(meta["name"], str) or any(
        type(meta[key]) is not int or not 0 <= meta[key] < 1 << 62 for key in ("size", "names")
    ):
        raise _RefusedError(f"{backup.META} is not as we write it")
    archive.meta = meta
    space.require(state.root, 4096 * meta["names"], names=meta["names"], stage="restore")


def _content(members: tarfile.TarFile, member: tarfile.TarInfo, largest: int) -> bytes:
    if member.type != tarfile.REGTYPE or member.sparse is not None or not 0 <= member.size <= largest:
        raise _RefusedError(f"{member.name[:80]!r} is not as we write it")
    return b"".join(_data(members, member, member.size))


def _data(members: tarfile.TarFile, member: tarfile.TarInfo, length: int, *, begin: bool = True) -> Iterator[bytes]:
    """Yield the next ``length`` bytes of a member; what tarfile gives to read one wants a file that can seek."""
    stream: Any = members.fileobj
    if begin:
        stream.seek(member.offset_data)
    while length > 0:
        chunk = stream.read(min(length, _CHUNK))
        if not chunk:
            raise _RefusedError("a file ends too early")
        length -= len(chunk)
        yield chunk


# What lies in /home.


def _open_directory(root: int, path: str) -> int:
    return syscalls.openat2(root, path or ".", os.O_RDONLY | os.O_DIRECTORY, resolve=_BENEATH)


def _check_owner(member: tarfile.TarInfo) -> None:
    if not (0 <= member.uid < ranges.UID_COUNT and 0 <= member.gid < ranges.UID_COUNT):
        raise _RefusedError(f"{member.name[:80]!r} belongs to nobody whom a tenant can be")


def _check_path(path: str) -> None:
    parts = path.split("/")
    wrong = any(part in ("", ".", "..") or "\0" in part or len(os.fsencode(part)) > _MAX_NAME for part in parts)
    if wrong or len(parts) > tree.MAX_DEPTH + 1 or len(os.fsencode(path)) > backup.MAX_PATH:
        raise _RefusedError(f"a name like {path[:80]!r}")


def _place(archive: _Archive, members: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    _check_path(path)
    _check_owner(member)
    directory, _, name = path.rpartition("/")
    parent = _open_directory(archive.root, directory)
    try:
        if member.isdir():
            os.mkdir(name, 0o700, dir_fd=parent)
            made = os.open(name, tree.DIRECTORY, dir_fd=parent)
            _set_status(made, member)
            os.close(made)
            archive.times.append((path, _time(member)))
        elif member.islnk():
            _link(archive, member, parent, name)
        elif member.issym():
            os.symlink(member.linkname, name, dir_fd=parent)
            os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
        elif member.isfifo():
            os.mkfifo(name, 0o600, dir_fd=parent)
            os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
            os.chmod(name, stat.S_IMODE(member.mode), dir_fd=parent)
        elif member.isreg():
            _write_file(archive, members, member, parent, name)
        else:
            raise _RefusedError(f"{path[:80]!r} is a device, or something that nobody knows")
    finally:
        os.close(parent)


def _link(archive: _Archive, member: tarfile.TarInfo, parent: int, name: str) -> None:
    first, _, rest = member.linkname.partition("/")
    if first != backup.HOME:
        raise _RefusedError(f"a link to {member.linkname[:80]!r}")
    _check_path(rest)
    directory, _, there = rest.rpartition("/")
    source = _open_directory(archive.root, directory)
    try:
        if not stat.S_ISREG(os.stat(there, dir_fd=source, follow_symlinks=False).st_mode):
            raise _RefusedError(f"a link to {rest[:80]!r}, which is no file")
        os.link(there, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
    finally:
        os.close(source)


def _write_file(archive: _Archive, members: tarfile.TarFile, member: tarfile.TarInfo, parent: int, name: str) -> None:
    archive.size += member.size
    if archive.size > archive.meta["size"]:
        raise _RefusedError("it holds more than it says")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    writing = os.open(name, flags, 0o600, dir_fd=parent)
    try:
        os.ftruncate(writing, member.size)
        sparse: Any = member.sparse  # (offset, length) of what is no hole
        parts = [(0, member.size)] if sparse is None else sparse
        for number, (offset, length) in enumerate(parts):
            if not 0 <= offset <= offset + length <= member.size:
                raise _RefusedError(f"{member.name[:80]!r} has data outside of itself")
            for chunk in _data(members, member, length, begin=number == 0):
                _write_at(writing, chunk, offset)
                offset += len(chunk)  # noqa: PLW2901 - where the next chunk goes
        _set_status(writing, member)
        os.utime(writing, (_time(member), _time(member)))
    finally:
        os.close(writing)


def _write_at(writing: int, chunk: bytes, offset: int) -> None:
    view = memoryview(chunk)
    while view:
        written = os.pwrite(writing, view, offset)
        offset, view = offset + written, view[written:]


def _time(member: tarfile.TarInfo) -> int:
    return min(max(int(member.mtime), 0), 1 << 33)


def _set_status(descriptor: int, member: tarfile.TarInfo) -> None:
    os.fchown(descriptor, member.uid, member.gid)
    os.fchmod(descriptor, stat.S_IMODE(member.mode))
    attributes = json.loads(member.pax_headers.get(backup.XATTRS, "{}"))
    for name, value in attributes.items():
        if not backup.kept_attribute(name):
            raise _RefusedError(f"the attribute {name[:80]!r}")
        os.setxattr(descriptor, name, base64.b64decode(value, validate=True))


def _take_its_place(state: State, name: str, stage: Path, *, replace: bool) -> None:
    tid = identity.ensure(state, name).tid
    persist = state.tenant_persist(tid)
    with locks.product_lock(state, f"tenant-{tid}", lambda _line: None):
        lock = records.lock(tid, name)  # IsochamberError when it runs
        try:
            has_image = disk.image(state, tid).exists()
            if disk.size(state, tid) is not None and not has_image:
                raise IsochamberError(
                    "has a project quota, which a restore would take away", stage="restore", tenant=name,
                    hint="delete the tenant first: ./doit gives what was restored a quota again",
                )  # fmt: skip
            if not replace and any(state.home(tid).iterdir()):
                raise IsochamberError(
                    "its /home holds something", stage="restore", tenant=name, hint="--replace gives that up"
                )
            (stage / identity.NAME).write_text(f"{name}\n")
            if has_image:
                disk.restore_home(state, name, tid, stage)
            else:
                durable.exchange_tree(stage, persist)
        finally:
            os.close(lock)
