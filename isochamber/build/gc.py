"""Removing: one tenant with all it has, and everything that nothing refers to. Each step may be cut and done again."""

import re
from collections.abc import Iterator
from pathlib import Path

from isochamber import paths
from isochamber.build import durable, identity, locks, manifest, registry, tree
from isochamber.build.progress import Reporter
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import pins, records
from isochamber.launch import stop as stopping
from isochamber.spec import package as packages
from isochamber.spec.model import Spec

_TID = re.compile(r"[0-9a-f]{32}")

Removed = tuple[str, str, int]  # kind, name, bytes


def delete(state: State, tenant: str, reporter: Reporter) -> None:
    """Stop ``tenant`` (a name or a tid) and remove its entry, namespaces, file systems and /home.

    Raises IsochamberError (stage "delete"), also when there is no such tenant. The entry
    goes first: what a cut leaves is an orphan, which prune removes.
    """
    entry = registry.find(state, tenant)
    tid = entry["tid"] if entry else _known_tid(state, tenant)
    if tid is None:
        raise IsochamberError("there is no such tenant", stage="delete", tenant=tenant, hint="isochamber ls")
    try:
        stopping.stop(tid)
        registry.remove(state, tid)
        stopping.stop(tid)  # a supervisor may have started it again; without an entry it can't once more
        _remove_tenant(state, tid)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="delete", tenant=tenant) from error
    reporter.say(f"{tenant}: deleted")


def _known_tid(state: State, tenant: str) -> str | None:
    """Return the tid of a tenant that has directories and no entry."""
    if state.namespace is None:
        return None
    if packages.is_name(tenant):
        tid = state.tid(tenant)
    elif _TID.fullmatch(tenant):
        tid = tenant
    else:
        return None
    return tid if state.tenant_fs(tid).is_dir() or state.tenant_persist(tid).is_dir() else None


def _remove_tenant(state: State, tid: str) -> None:
    with locks.product_lock(state, f"tenant-{tid}", lambda _line: None):
        pins.remove(tid)
        durable.remove_tree(state.tenant_fs(tid))
        durable.remove_tree(state.tenant_persist(tid))
        records.forget(tid)
        Path(paths.tenant_lock(tid)).unlink(missing_ok=True)


def prune(state: State, spec: Spec, reporter: Reporter) -> list[Removed]:
    """Remove stale staging, orphaned tenants, unreferenced bases and layers, caches and old logs.

    Referenced is what containers.json names for a tenant of the spec. A tenant that
    runs is never an orphan. Returns what was removed; raises IsochamberError (stage "prune").
    """
    if state.namespace is None:
        return []
    removed: list[Removed] = []
    try:
        with locks.nobody_builds(state, reporter.say):
            removed += _prune_orphans(state, spec)
            removed += _prune_remains(state)
            removed += _prune_products(state)
            removed += _prune_filters(state)
            removed += _prune_directory(state, "staging", state.staging)
            removed += _prune_directory(state, "cache", state.root / paths.CACHE)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="prune") from error
    return removed


def _prune_orphans(state: State, spec: Spec) -> Iterator[Removed]:
    wanted = {state.tid(name) for name in spec.tenants}
    found = {
        path.name
        for directory in (paths.TENANTS_FS, paths.TENANTS_PERSIST)
        for path in (state.root / directory).iterdir()
        if _TID.fullmatch(path.name)
    }
    for tid in sorted((found | set(registry.read(state))) - wanted):
        if records.held(tid):
            continue
        size = tree.size_of(state.tenant_fs(tid)) + tree.size_of(state.tenant_persist(tid))
        name = _name_of(state, tid)
        registry.remove(state, tid)
        _remove_tenant(state, tid)
        yield "tenant", name, size


def _prune_remains(state: State) -> Iterator[Removed]:
    """Remove what a removal that was cut had renamed already, beside tenants and in them."""
    for directory in (paths.TENANTS_FS, paths.TENANTS_PERSIST):
        top = state.root / directory
        yield from _remove_stages(state, top)
        for path in sorted(top.iterdir()):
            if _TID.fullmatch(path.name):
                yield from _remove_stages(state, path)


def _remove_stages(state: State, directory: Path) -> Iterator[Removed]:
    for name in durable.stale_stages(directory):
        size = tree.size_of(directory / name)
        durable.remove_tree(directory / name)
        yield "remains", state.relative(directory / name), size


def _name_of(state: State, tid: str) -> str:
    try:
        return (state.tenant_persist(tid) / identity.NAME).read_text().strip()
    except OSError:
        return tid


def _prune_products(state: State) -> Iterator[Removed]:
    referenced = {lower.rsplit("/", 1)[0] for entry in registry.read(state).values() for lower in entry["lowers"]}
    for kind, directory in (("layer", paths.LAYERS), ("base", paths.BASES)):
        for path in sorted((state.root / directory).iterdir()):
            if state.relative(path) in referenced:
                continue
            size = tree.size_of(path)
            complete = manifest.exists(path)
            durable.remove_tree(path)
            yield kind if complete else "remains", path.name, size


def _prune_filters(state: State) -> Iterator[Removed]:
    referenced = set()
    for entry in registry.read(state).values():
        named = entry.get("seccomp", {})
        referenced |= {*named.get("filters", ()), named.get("learned")}
    for path in sorted((state.root / paths.FILTERS).iterdir()):
        if path.stem not in referenced:
            size = path.lstat().st_size
            path.unlink()
            yield "filter", path.stem, size


def _prune_directory(state: State, kind: str, directory: Path) -> Iterator[Removed]:
    for path in sorted(directory.iterdir()):
        size = tree.size_of(path) if path.is_dir() else path.lstat().st_size
        if path.is_dir() and not path.is_symlink():
            durable.remove_tree(path)
        else:
            path.unlink()
        yield kind, state.relative(path), size
