"""/home: progs/ and what the install script left there, deployed by manifest, never over what the tenant made.

The manifest beside /home lists what we deployed, and what we were about to when a cut
came. A file there that is neither is the tenant's, and stays. The tenant may be running, and may be swapping
directories for symlinks while we work: every path is opened below /home's own
descriptor without following any link, and a file arrives by rename.
"""

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from isochamber import paths
from isochamber.build import contents, durable, locks, manifest, space, tree
from isochamber.build.inputs import Inputs
from isochamber.build.progress import Reporter
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import syscalls
from isochamber.spec import package as packages
from isochamber.spec.model import Tenant

_BENEATH = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_MANIFEST = "home.manifest.json"

LAYER = "layer "  # marks a digest whose content comes from the layer's home/
LINK = "-> "  # a symlink that an install script left: the rest is its target
REMOVED = "home_removed"  # keys of a layer's manifest.extra
LEFT = "home"

Ours = dict[str, list[str]]  # path -> digests that may be there and are ours


@dataclass(frozen=True, slots=True)
class Desired:
    """What /home is to hold: path -> digest as :mod:`contents` writes it; LAYER marks where the bytes come from."""

    files: Mapping[str, str]
    layer: str | None

    def digest(self) -> str:
        """Return the digest that the manifest records."""
        return Inputs.of(self.files).digest()


def desired(state: State, own: Mapping[str, str], layer: str | None) -> Desired:
    """Join progs/ (``own``) with what the layer's install script left in /home, which comes on top."""
    if layer is None:
        return Desired(dict(own), None)
    extra = manifest.read(state.layer(layer)).extra
    removed = set(extra.get(REMOVED, ()))
    files = {path: digest for path, digest in own.items() if path not in removed}
    for path, digest in dict(extra.get(LEFT, {})).items():
        files[path] = digest if digest == contents.DIRECTORY or digest.startswith(LINK) else LAYER + digest
    return Desired(files, layer)


def manifest_path(state: State, tid: str) -> Path:
    """Return where it stands what was deployed to the tenant's /home."""
    return state.tenant_persist(tid) / _MANIFEST


@dataclass(frozen=True, slots=True)
class Record:
    """The manifest: what is wanted was deployed whole, or (``desired`` None) is still on its way."""

    desired: str | None
    deployed: Mapping[str, str]  # path -> digest: it was there; where nothing is now, the tenant removed it
    unsure: Ours  # what a cut deployment was about to place, replace or remove


def read_record(state: State, tid: str) -> Record:
    """Return the record; a missing or damaged one knows nothing."""
    try:
        raw = json.loads(manifest_path(state, tid).read_text())
        unsure = {path: [str(digest) for digest in digests] for path, digests in raw["unsure"].items()}
        return Record(raw["desired"], {path: str(digest) for path, digest in raw["deployed"].items()}, unsure)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Record(None, {}, {})


def _write_record(state: State, tid: str, record: Record) -> None:
    content = {"desired": record.desired, "deployed": dict(record.deployed), "unsure": record.unsure}
    text = json.dumps(content, indent=1, sort_keys=True)
    durable.write_file(manifest_path(state, tid), text.encode(), staging=state.staging)


def _on_its_way(record: Record, wanted: Desired) -> Record:
    """Return the record to write before the first change: what does not change, and all that may be ours elsewhere."""
    same = {path: digest for path, digest in record.deployed.items() if wanted.files.get(path) == digest}
    unsure: Ours = {path: list(digests) for path, digests in record.unsure.items()}
    for files in (record.deployed, wanted.files):
        for path, digest in files.items():
            if path not in same and digest not in unsure.setdefault(path, []):
                unsure[path].append(digest)
    return Record(None, same, unsure)


def current(state: State, tid: str, wanted: Desired) -> bool:
    """Say whether ``wanted`` was deployed whole; /home itself is the tenant's and is not looked at."""
    return read_record(state, tid).desired == wanted.digest()


def deploy(state: State, tenant: Tenant, tid: str, wanted: Desired, reporter: Reporter) -> None:
    """Bring ``wanted`` into the tenant's /home; raises IsochamberError (stage "home").

    What we are about to write is listed before it is written, so that after a cut our
    own new file is not taken for the tenant's.
    """
    with locks.product_lock(state, f"tenant-{tid}", reporter.say):
        if not state.home(tid).is_dir():
            raise IsochamberError(
                "was removed meanwhile", stage="home", tenant=tenant.name, path=state.home(tid), hint="run ./doit again"
            )
        try:
            record = _on_its_way(read_record(state, tid), wanted)
            _write_record(state, tid, record)
            with _Deployment(state, tenant, tid, wanted, record, reporter) as deployment:
                deployment.run()
            _write_record(state, tid, Record(wanted.digest(), wanted.files, {}))
        except OSError as error:
            raise IsochamberError.from_os(error, stage="home", tenant=tenant.name) from error


class _Deployment:
    """One deployment: /home, the staging directory, and what is known of both."""

    def __init__(
        self, state: State, tenant: Tenant, tid: str, wanted: Desired, record: Record, reporter: Reporter
    ) -> None:
        self._tenant, self._wanted, self._record, self._reporter = tenant, wanted, record, reporter
        self._layer_home = state.layer(wanted.layer) / paths.LAYER_HOME if wanted.layer else None
        self._root = state.root
        self._progs = {prog.path: prog for prog in tenant.package.progs}
        self._home = os.open(state.home(tid), tree.DIRECTORY)
        self._stage_context = durable.staging_directory(state.staging_of(tid), f"home-{tid}")

    def __enter__(self) -> Self:
        self._stage = self._stage_context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._home)
        self._stage_context.__exit__(None, None, None)

    def run(self) -> None:
        """Remove what is no longer wanted, or wanted as another kind; place what is; sync.

        All that is to be placed is on disk before the first of it gets its name: a file that
        a power cut left half written would count as the tenant's own for ever.
        """
        wanted = self._wanted.files
        for path, ours in sorted(self._record.unsure.items(), reverse=True):
            is_directory = wanted.get(path) == contents.DIRECTORY
            unwanted = [digest for digest in ours if (digest == contents.DIRECTORY) != is_directory]
            if path not in wanted:
                self._withdraw(path, ours)
            elif unwanted:
                self._withdraw(path, unwanted)
        to_place: list[str] = []
        for path in sorted(wanted):
            if wanted[path] == contents.DIRECTORY:
                self._place_directory(path)
            elif self._is_to_be_placed(path, wanted[path]):
                to_place.append(path)
        size = sum(self._size_of(path) for path in to_place)
        space.require(self._root, size, names=len(to_place), stage="home", tenant=self._tenant.name)
        staged = [self._bring(path, wanted[path], self._stage / str(number)) for number, path in enumerate(to_place)]
        if staged:
            durable.sync_tree(self._stage)
        for path, file in zip(to_place, staged, strict=True):
            self._place_file(path, file)
        syscalls.syncfs(self._home)

    def _size_of(self, path: str) -> int:
        if self._layer_home is not None and self._wanted.files[path].startswith(LAYER):
            return (self._layer_home / path).lstat().st_size
        return self._progs[path].size if path in self._progs else 0

    def _note(self, path: str, what: str) -> None:
        self._reporter.say(f"{self._tenant.name}: /home/{path}: {what}")

    def _open(self, path: str, flags: int) -> int:
        return syscalls.openat2(self._home, path or ".", flags | os.O_NOFOLLOW | os.O_NONBLOCK, resolve=_BENEATH)

    def _parent(self, path: str) -> tuple[int, str] | None:
        """Open the directory that ``path`` lies in, or return None when the tenant has put something else there."""
        directory, _, name = path.rpartition("/")
        try:
            return self._open(directory, os.O_RDONLY | os.O_DIRECTORY), name
        except OSError:
            return None

    def _place_directory(self, path: str) -> None:
        found = self._parent(path)
        if found is None:
            return
        parent, name = found
        try:
            os.mkdir(name, 0o755, dir_fd=parent)
            made = os.open(name, tree.DIRECTORY, dir_fd=parent)
            os.fchmod(made, 0o755)  # whatever the umask
            os.close(made)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                self._note(path, "the tenant has something else there, it stays")
        finally:
            os.close(parent)

    def _is_to_be_placed(self, path: str, digest: str) -> bool:
        found = self._parent(path)
        if found is None:
            self._note(path, "the tenant has something else on the way there, it is not deployed")
            return False
        os.close(found[0])
        there = self._what_is(path)
        if there is None:
            return path not in self._record.deployed  # else it was deployed, and the tenant removed it
        return _plain(there) != _plain(digest) and self._is_ours(path, there)

    def _is_ours(self, path: str, there: str) -> bool:
        ours = self._record.unsure.get(path, [self._wanted.files[path]])
        if there != contents.DIRECTORY and _plain(there) in map(_plain, ours):
            return True
        self._note(path, "changed by the tenant, it stays")
        return False

    def _place_file(self, path: str, staged: Path) -> None:
        """Give a staged file its name, unless the tenant was quicker."""
        found = self._parent(path)
        if found is None:
            return
        parent, name = found
        try:
            there = self._what_is(path)
            if there is not None:
                if self._is_ours(path, there):
                    os.rename(staged, name, dst_dir_fd=parent)
                return
            try:
                os.link(staged, name, dst_dir_fd=parent, follow_symlinks=False)
            except FileExistsError:
                self._note(path, "the tenant was quicker, its own stays")
        finally:
            os.close(parent)

    def _what_is(self, path: str) -> str | None:
        """Return the digest of what is at ``path``: DIRECTORY, "other" for no file nor link, None for nothing."""
        try:
            descriptor = self._open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError:
            return self._link_at(path) or "other"  # "other": a socket, a FIFO that nobody writes
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                return contents.DIRECTORY
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
                return "other"
            return contents.digest_with_mode(manifest.hash_descriptor(descriptor), status.st_mode)
        finally:
            os.close(descriptor)

    def _link_at(self, path: str) -> str | None:
        found = self._parent(path)
        if found is None:
            return None
        parent, name = found
        try:
            return LINK + os.readlink(name, dir_fd=parent)
        except OSError:
            return None
        finally:
            os.close(parent)

    def _bring(self, path: str, digest: str, target: Path) -> Path:
        """Copy the wanted content to ``target`` in staging, checked against its digest, and return that."""
        if digest.startswith(LINK):
            target.symlink_to(digest.removeprefix(LINK))
            return target
        source = self._open_source(path, digest)
        with os.fdopen(source, "rb") as reading, target.open("xb") as writing:
            while chunk := reading.read(1 << 20):
                writing.write(chunk)
            writing.flush()
            os.fchmod(writing.fileno(), 0o755 if contents.is_executable(digest) else 0o644)
        with target.open("rb") as copied:
            if manifest.hash_descriptor(copied.fileno()) != contents.content_of(_plain(digest)):
                raise IsochamberError(
                    "changed while it was copied",
                    stage="home",
                    tenant=self._tenant.name,
                    path=path,
                    hint="run ./doit again",
                )
        return target

    def _open_source(self, path: str, digest: str) -> int:
        if digest.startswith(LAYER):
            if self._layer_home is None:
                raise RuntimeError("a layer's file without a layer")
            return os.open(self._layer_home / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        return packages.open_prog(self._tenant.package, self._progs[path])

    def _withdraw(self, path: str, ours: list[str]) -> None:
        """Remove what left progs/, if it is still what we deployed; a directory if it is empty."""
        found = self._parent(path)
        if found is None:
            return
        parent, name = found
        try:
            there = self._what_is(path)
            if there == contents.DIRECTORY and contents.DIRECTORY in ours:
                os.rmdir(name, dir_fd=parent)
            elif there is not None and _plain(there) in map(_plain, ours):
                os.unlink(name, dir_fd=parent)
            elif there is not None:
                self._note(path, "left progs/, but the tenant changed it: it stays")
        except OSError:
            pass  # not empty, or the tenant was quicker: it is its own
        finally:
            os.close(parent)


_LARGEST = 1 << 34  # bytes: a larger file was not deployed by us, so it is not hashed


def _plain(digest: str) -> str:
    return digest.removeprefix(LAYER)
