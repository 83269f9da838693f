"""Removing: one tenant with all it has, and everything that nothing refers to. Each step may be cut and done again."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from isochamber import paths
from isochamber.build import disk as limited
from isochamber.build import durable, entry, locks, registry, sandbox, space, tree
from isochamber.build.progress import Reporter
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import disk, pins, records
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
    tid = entry["tid"] if entry else known_tid(state, tenant)
    if tid is None:
        raise IsochamberError("there is no such tenant", stage="delete", tenant=tenant, hint="isochamber ls")
    try:
        _remove_tenant(state, tid, tenant)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="delete", tenant=tenant) from error
    reporter.say(f"{tenant}: deleted")


def known_tid(state: State, tenant: str) -> str | None:
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


def _remove_tenant(state: State, tid: str, name: str) -> None:
    """Stop it, keep others from starting or configuring it, and remove all of it."""
    with locks.product_lock(state, f"tenant-{tid}", lambda _line: None):
        stopping.stop(tid)
        registry.remove(state, tid)
        lock = _stopped(tid, name)  # a supervisor may have started it again; without an entry it can't once more
        try:
            pins.remove(tid)
            _remove_build_pins(tid, name)
            disk.detach(str(state.root), tid)
            limited.lift(state, tid)
            durable.remove_tree(state.tenant_fs(tid), state.staging)
            durable.remove_tree(state.tenant_persist(tid), state.staging)
            registry.remove(state, tid)  # a ./doit that held it back may have written it in between
            records.forget(tid)
            Path(paths.tenant_lock(tid)).unlink(missing_ok=True)
        finally:
            os.close(lock)


def _remove_build_pins(tid: str, name: str) -> None:
    """Remove the pins of its install script's last run, where that was killed; a run that goes on keeps them."""
    run = sandbox.build_tid(tid)
    with contextlib.suppress(IsochamberError):  # it runs
        lock = records.lock(run, name)
        try:
            pins.remove(run)
            Path(paths.tenant_lock(run)).unlink(missing_ok=True)
        finally:
            os.close(lock)


def _stopped(tid: str, name: str) -> int:
    """Stop the tenant and return its lock; somebody who started it in between is stopped too."""
    while True:
        stopping.stop(tid)
        try:
            return records.lock(tid, name)
        except IsochamberError:
            if not records.held(tid):
                raise


def prune(state: State, spec: Spec, reporter: Reporter, *, until_free: int | None = None) -> list[Removed]:
    """Remove stale staging, orphaned tenants, unreferenced bases and layers, and caches.

    Referenced is what containers.json names for a tenant of the spec, and what rollback
    would need. A tenant that runs is never an orphan. With ``until_free`` (bytes) one thing
    after the other goes until so much is free, what is easily made again first, what
    rollback needs too, and orphans with their /home last. Returns what was removed;
    raises IsochamberError (stage "prune").
    """
    if state.namespace is None:
        return []
    removed: list[Removed] = []
    try:
        registry.settle(state)  # while it waits another prune may come first, which reads the file
        with locks.nobody_builds(state, reporter.say):
            _attach_disks(state, reporter)
            for gone in _prunable(state, spec, least=until_free is not None):
                removed.append(gone)
                if until_free is not None and space.free(state.root)[0] >= until_free:
                    break
    except OSError as error:
        raise IsochamberError.from_os(error, stage="prune") from error
    return removed


def _attach_disks(state: State, reporter: Reporter) -> None:
    """Mount the disks of tenants that have one: what a rollback would go back to stands on them."""
    for tid, found in registry.read(state, salvage=True).items():
        if found.get("disk") is not None and not disk.is_mounted(str(state.tenant_fs(tid))):
            try:
                with locks.product_lock(state, f"tenant-{tid}", lambda _line: None):
                    limited.attach(state, tid)
            except IsochamberError as error:  # what stands on it can't be had; the rest is pruned all the same
                reporter.say(error.line())


def _prunable(state: State, spec: Spec, *, least: bool) -> Iterator[Removed]:
    """Remove one thing and say what it was, then the next."""
    yield from _prune_staging(state)
    yield from _prune_remains(state)
    yield from _prune_directory(state, "cache", state.root / paths.CACHE)
    if least:
        yield from _prune_products(state)
        yield from _prune_former(state)
    yield from _prune_orphans(state, spec)
    yield from _prune_products(state)
    yield from _prune_filters(state)
    _forget_locks(state)


def _forget_locks(state: State) -> None:
    """Remove the locks of tenants that are gone: a removal that was cut had no time to."""
    directory = Path(paths.run_directory()) / "tenants"
    for path in sorted(directory.glob("*.lock")) if directory.is_dir() else ():
        tid = path.stem
        if state.tenant_fs(tid).exists() or state.tenant_persist(tid).exists() or records.held(tid):
            continue
        with contextlib.suppress(IsochamberError):  # started in between
            lock = records.lock(tid, tid)
            path.unlink(missing_ok=True)
            os.close(lock)


def _prune_former(state: State) -> Iterator[Removed]:
    """What rollback would go back to: the other upper of every tenant, and the layers it stands on."""
    for tid in registry.read(state, salvage=True):
        if entry.former_of(state, tid) is None:
            continue
        with locks.product_lock(state, f"tenant-{tid}", lambda _line: None):
            former = entry.former_of(state, tid)
            if former is None or tid not in registry.read(state, salvage=True):
                continue  # deleted, or gone back to, while this waited
            size = tree.size_of(state.root / former["upper"])
            durable.remove_file(entry.former_file(state, tid))
            entry.make_slot(state, tid, entry.slot_of(former), former["uid_base"])
        yield "former version of", state.name_of(tid) or tid, size
    yield from _prune_products(state)


def _prune_orphans(state: State, spec: Spec) -> Iterator[Removed]:
    wanted = {state.tid(name) for name in spec.tenants}
    found = {
        path.name
        for directory in (paths.TENANTS_FS, paths.TENANTS_PERSIST)
        for path in (state.root / directory).iterdir()
        if _TID.fullmatch(path.name)
    }
    for tid in sorted((found | set(registry.read(state, salvage=True))) - wanted):
        if records.held(tid) or (state.root / paths.NEW_TENANTS / (state.name_of(tid) or tid)).is_dir():
            continue  # the second was dropped after the spec was read
        size = tree.size_of(state.tenant_fs(tid)) + tree.size_of(state.tenant_persist(tid))
        name = state.name_of(tid) or tid
        _remove_tenant(state, tid, name)
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
        durable.remove_tree(directory / name, state.staging)
        yield "remains", state.relative(directory / name), size


def _prune_products(state: State) -> Iterator[Removed]:
    entries = registry.read(state, salvage=True)
    kept = [*entries.values(), *filter(None, (entry.former_of(state, tid) for tid in entries))]  # for rollback
    referenced = {lower.rsplit("/", 1)[0] for found in kept for lower in found["lowers"]}
    for kind, directory in (("layer", paths.LAYERS), ("base", paths.BASES)):
        for path in sorted((state.root / directory).iterdir()):
            if state.relative(path) in referenced:
                continue
            size = tree.size_of(path)
            complete = (path / paths.MANIFEST).is_file()
            durable.remove_tree(path, state.staging)
            yield kind if complete else "remains", path.name, size


def _prune_filters(state: State) -> Iterator[Removed]:
    referenced = set()
    entries = registry.read(state, salvage=True)
    for found in (*entries.values(), *filter(None, (entry.former_of(state, tid) for tid in entries))):
        named = found.get("seccomp", {})
        referenced |= {*named.get("filters", ()), named.get("learned")}
    for path in sorted((state.root / paths.FILTERS).iterdir()):
        if path.stem not in referenced:
            size = path.lstat().st_size
            path.unlink()
            yield "filter", path.stem, size


def _prune_staging(state: State) -> Iterator[Removed]:
    """What killed builds left; what is being made now is held, and stays."""
    sizes = {path.name: tree.size_of(path) for path in state.staging.iterdir()}
    for name in durable.remove_stale_stages(state.staging, only_ours=False):
        yield "staging", f"{paths.STAGING}/{name}", sizes.get(name, 0)


def _prune_directory(state: State, kind: str, directory: Path) -> Iterator[Removed]:
    for path in sorted(directory.iterdir()):
        size = tree.size_of(path) if path.is_dir() else path.lstat().st_size
        if path.is_dir() and not path.is_symlink():
            durable.remove_tree(path, state.staging)
        else:
            path.unlink()
        yield kind, state.relative(path), size
