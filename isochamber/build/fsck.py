"""What is broken in a state directory, and removing exactly that: the next ./doit makes it anew.

Checking only reads, but for the disk of a tenant, which is mounted as by a start. It
may run beside builds and running tenants: what is being made is locked, and what looks
wrong about a tenant is looked at again in its lock.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isochamber import paths
from isochamber.build import disk, diskcheck, durable, entry, home, identity, locks, manifest, recover, registry
from isochamber.build import state as states
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import pins, records

_TOLD = 5  # differences of one product that are named


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is broken: its kind and name, what is wrong with it, and what repairing does."""

    kind: str  # "namespace", "containers.json", "base", "layer", "tenant", "leftover", "network"
    name: str
    problem: str
    repair: str
    repairable: bool = True

    def line(self) -> str:
        """Return it as one line."""
        return f"{self.kind} {self.name}: {self.problem}: {self.repair}"


def check(state: State, *, deep: bool) -> list[Finding]:
    """Return everything that is broken; with ``deep`` every file of every product is read. Raises IsochamberError."""
    namespace = list(_namespace(state))
    if any(not finding.repairable for finding in namespace):
        return namespace  # every other name is made in it
    if state.namespace is None:
        return []
    with locks.building(state, lambda _line: None):
        return [*namespace, *_containers(state), *_tenants(state), *_products(state, deep=deep), *_leftovers(state)]


def repair(state: State, findings: Iterable[Finding]) -> None:
    """Remove what is broken; ./doit then makes it anew. Raises IsochamberError."""
    wanted = [finding for finding in findings if finding.repairable]
    if not wanted:
        return
    try:
        state.create()
        for finding in wanted:
            _repair(state, finding)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="fsck") from error


def _repair(state: State, finding: Finding) -> None:
    if finding.kind in ("base", "layer"):
        directory = state.base(finding.name) if finding.kind == "base" else state.layer(finding.name)
        with locks.nobody_builds(state, lambda _line: None):
            durable.remove_tree(directory, state.staging)
    elif finding.kind == "containers.json":
        registry.rewrite(state)
    elif finding.kind == "tenant":
        _repair_tenant(state, finding)
    elif finding.kind == "leftover":
        recover.clean(state, every=True)


def _repair_tenant(state: State, finding: Finding) -> None:
    found = registry.read(state, salvage=True).get(finding.name)
    name = str(found["name"]) if found else state.name_of(finding.name)
    if finding.repair == diskcheck.MEND:
        with locks.product_lock(state, f"tenant-{finding.name}", lambda _line: None):
            disk.repair(state, name or finding.name, finding.name)
    if name is not None and state.tid(name) == finding.name:
        identity.ensure(state, name)
    with locks.product_lock(state, f"tenant-{finding.name}", lambda _line: None):
        if finding.repair == _REDEPLOY:
            durable.remove_file(home.manifest_path(state, finding.name))
        elif finding.repair == _RECONFIGURE:
            registry.remove(state, finding.name)
        elif finding.repair == _UNPIN:
            lock = records.lock(finding.name, name or finding.name)
            try:
                pins.remove(finding.name)
            finally:
                os.close(lock)


_REDEPLOY = "it is removed and written anew"
_RECONFIGURE = "its entry is removed and written anew"
_REMAKE = "they are made anew, /home stays"
_UNPIN = "unpinned, the next start pins others"
_REBUILD = "removed and built again"


def _namespace(state: State) -> Iterator[Finding]:
    files = state.namespace_files()
    existed = any(os.path.lexists(file) for file in files)  # before the read: somebody may be creating it now
    found = [states.read_uuid(file) for file in files]
    present = [uuid for uuid in found if uuid is not None]
    persisted = [path for path in (state.root / paths.TENANTS_PERSIST).glob("*") if len(path.name) == 32]
    if not present:
        if persisted or existed:
            problem = "is lost or damaged, and so is its copy"
            yield Finding("namespace", str(files[0]), problem, "put it back from a backup", repairable=False)
        return
    if len(set(present)) > 1:
        problem = f"differs from its copy {files[1]}"
        yield Finding("namespace", str(files[0]), problem, "remove the wrong one by hand", repairable=False)
    elif len(present) < len(files):
        lost = files[found.index(None)]
        yield Finding("namespace", str(lost), "is lost or damaged", "written anew from its copy")


def _containers(state: State) -> Iterator[Finding]:
    try:
        entries = registry.read(state)
    except IsochamberError as error:
        yield Finding("containers.json", paths.CONTAINERS, error.what, "what stands on whole lines is kept")
        entries = registry.read(state, salvage=True)
    known: dict[str, str] = {}
    for tid, found in entries.items():
        if state.tid(found["name"]) != tid:
            yield Finding("tenant", tid, f"{found['name']} has another tid here", _RECONFIGURE)
        other = known.setdefault(str(found["uid_base"]), tid)
        if other != tid:
            yield Finding("tenant", tid, f"has the same uid range as {other}", "delete one of them", repairable=False)


def _tenants(state: State) -> Iterator[Finding]:
    for tid in registry.read(state, salvage=True):
        if not _seems_whole(state, tid):
            with locks.product_lock(state, f"tenant-{tid}", lambda _line: None):
                yield from _of_tenant(state, tid, locked=True)
    for path in (state.root / paths.TENANTS_PERSIST).iterdir():
        if len(path.name) != 32 or path.name in registry.read(state, salvage=True):
            continue
        if state.name_of(path.name) is None and path.is_dir():
            yield Finding("tenant", path.name, "has no name", "delete it by its tid", repairable=False)


def _seems_whole(state: State, tid: str) -> bool:
    """Look without the tenant's lock; what is removed meanwhile does not."""
    try:
        return next(_of_tenant(state, tid), None) is None
    except FileNotFoundError:
        return False


def _of_tenant(state: State, tid: str, *, locked: bool = False) -> Iterator[Finding]:
    found = registry.read(state, salvage=True).get(tid)
    if found is None:
        return
    problems = diskcheck.problems(state, tid, found, locked=locked)
    on_disk = [Finding("tenant", tid, f"{found['name']}: {problem}", repaired) for problem, repaired in problems]
    yield from on_disk or _of_parts(state, tid, found)  # all of them may lie there


def _of_parts(state: State, tid: str, found: registry.Entry) -> Iterator[Finding]:
    name = found["name"]
    try:
        missing = [path for path in _directories(found) if not (state.root / path).is_dir()]
        digest = hashlib.sha256(
            json.dumps({key: value for key, value in found.items() if key != "digest"}, sort_keys=True).encode()
        ).hexdigest()[:40]
    except (KeyError, TypeError, AttributeError):
        yield Finding("tenant", tid, f"the entry of {name} is damaged", _RECONFIGURE)
        return
    if digest != found.get("digest"):
        yield Finding("tenant", tid, f"the entry of {name} is not as it was written", _RECONFIGURE)
    for path in missing:
        yield Finding("tenant", tid, f"{name}: {path} is missing", _REMAKE)
    gone = [lower for lower in found["lowers"] if not (state.root / lower).is_dir()]
    for lower in gone:
        yield Finding("tenant", tid, f"{name}: {lower} is missing", "built again")
    named = found.get("seccomp") or {}
    for digest in filter(None, (*named.get("filters", ()), named.get("learned"))):
        if not state.filter(digest).is_file():
            yield Finding("tenant", tid, f"{name}: the filter {digest} is missing", _RECONFIGURE)
    if not missing and not gone:
        if not entry.current(state, found):
            yield Finding("tenant", tid, f"{name}: it is not known what its upper belongs to", "written anew")
        owner = (state.root / found["upper"]).lstat().st_uid
        if owner != found["uid_base"]:
            yield Finding("tenant", tid, f"{name}: its upper belongs to uid {owner}", "chown it", repairable=False)
    if home.manifest_path(state, tid).exists() and home.read_record(state, tid).desired is None:
        yield Finding("tenant", tid, f"{name}: /home was not deployed whole, or its manifest is damaged", _REDEPLOY)
    pinned = pins.problem(tid, int(found["uid_base"]), int(found["uid_count"]))
    if pinned is not None and not records.held(tid):
        yield Finding("tenant", tid, f"{name}: {pinned}", _UNPIN)
    if state.name_of(tid) != name:
        yield Finding("tenant", tid, f"{name}: tenants_persist/{tid}/{identity.NAME} is lost", "written anew")


def _directories(found: Mapping[str, Any]) -> Iterator[str]:
    for key in ("upper", "workdir", "overlay", "home"):
        yield str(found[key])


def _products(state: State, *, deep: bool) -> Iterator[Finding]:
    for kind, directory in (("base", paths.BASES), ("layer", paths.LAYERS)):
        for path in sorted((state.root / directory).iterdir()):
            if path.name.startswith(durable.STAGE_PREFIX):
                continue
            try:
                found = list(itertools.islice(manifest.differences(path, contents=deep), _TOLD + 1))
            except IsochamberError as error:
                found = [f"{paths.MANIFEST}: {error.what}"]
            except OSError as error:
                found = [f"{error.filename}: {error.strerror}"]
            if found and path.exists():
                more = ", and more" if len(found) > _TOLD else ""
                yield Finding(kind, path.name, f"{'; '.join(found[:_TOLD])}{more}", _REBUILD)


def _leftovers(state: State) -> Iterator[Finding]:
    for directory in (state.staging, *recover.stage_directories(state, every=True)):
        for path in _names(directory):
            if (directory == state.staging or path.name.startswith(durable.STAGE_PREFIX)) and durable.is_stale(path):
                yield Finding("leftover", state.relative(path), "was left by a build that was cut", "removed")
    for path in _names(Path(paths.run_directory()) / "tenants"):
        tid = path.name.removesuffix(".json")
        if path.suffix == ".json" and not records.held(tid) and path.exists():
            yield Finding("leftover", f"record of {tid}", "its keeper was killed", "removed")


def _names(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []
