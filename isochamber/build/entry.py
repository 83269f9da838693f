"""A tenant's entry of containers.json: everything the launcher needs, decided ahead of the start."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isochamber import paths
from isochamber.build import disk as limited
from isochamber.build import durable, identity, limits, locks, network, ranges, registry
from isochamber.build.identity import Identity
from isochamber.build.inputs import Inputs
from isochamber.build.progress import Reporter
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import records, stop
from isochamber.spec.model import Service, Subnets, Tenant

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": PATH, "HOME": "/home", "LANG": "C.UTF-8", "container": "isochamber"}

Entry = dict[str, Any]


def make(
    state: State,
    tenant: Tenant,
    who: Identity,
    base_product: str,
    layer_product: str | None,
    contents: Mapping[str, str],
    seccomp: Mapping[str, object],
    subnets: Subnets | None = None,
    slot: str = "",
    disk: int | None = None,
) -> Entry:
    """Return the entry of ``tenant``, keys in the contract's order. Pure: the same arguments give the same entry."""
    package = tenant.package
    filesystem = state.relative(state.tenant_fs(who.tid))
    entry: Entry = {
        "tid": who.tid,
        "cname": package.cname,
        "dependencies": package.dependencies,
        "init": package.init if isinstance(package.init, str) else list(package.init),
        "version": registry.VERSION,
        "name": tenant.name,
        "argv": list(package.argv),
        "env": {**ENVIRONMENT, **dict(package.env)},
        "cwd": "/",
        "hostname": who.tid,
        "uid": package.user[0],
        "gid": package.user[1],
        "uid_base": who.uid_base,
        "uid_count": ranges.UID_COUNT,
        "lowers": lowers(base_product, layer_product),
        "upper": f"{filesystem}/{identity.UPPER}{slot}",
        "workdir": f"{filesystem}/{identity.WORKDIR}{slot}",
        "overlay": f"{filesystem}/{identity.OVERLAY}",
        "home": state.relative(state.home(who.tid)),
        "ipc": tenant.ipc,
        "network": tenant.network.mode,
        "net": _net(state, tenant, who, subnets),
        "capabilities": list(tenant.capabilities),
        "devices": [{"path": device.path, "read_only": device.read_only} for device in tenant.devices],
        "read_only": tenant.read_only,
        "disk": disk,
        "seccomp": dict(seccomp),
        "tmpfs": limits.tmpfs(tenant.limits),
        "rlimits": limits.rlimits(tenant.limits),
        "limits": limits.groups(tenant.limits),
        "limits_required": limits.required(tenant.limits),
        "service": _service(tenant.service),
        "package": os.fspath(package.directory),
        "inputs": [
            list(pair)
            for pair in Inputs.of(
                {"base": base_product, "layer": layer_product or "none", "progs": Inputs.of(contents).digest()}
            ).items
        ],
    }
    entry["digest"] = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:40]
    return entry


def _service(service: Service) -> Entry:
    health = service.health
    return {
        "restart": service.restart,
        "retries": service.retries,
        "after": list(service.after),
        "ready": service.ready,
        "health": None if health is None else {**dataclasses.asdict(health), "argv": list(health.argv)},
        "stop": {"signal": service.stop_signal, "grace": service.stop_grace},
        "warm": service.warm,
        "logs": {"size": service.log_size, "count": service.log_count, "journald": service.journald},
    }


def _net(state: State, tenant: Tenant, who: Identity, subnets: Subnets | None) -> dict[str, Any] | None:
    if tenant.network.mode != "bridge":
        return None
    return network.make(state.identifier, who.tid, who.uid_base, tenant.network, subnets or Subnets())


def layer_product(entry: Mapping[str, Any]) -> str | None:
    """Return the layer that an entry stands on, or None."""
    return next((lower.split("/")[1] for lower in entry["lowers"] if lower.startswith(f"{paths.LAYERS}/")), None)


def lowers(base_product: str, layer_product: str | None) -> list[str]:
    """Return the read-only directories that a tenant stands on, topmost first."""
    base = f"{paths.BASES}/{base_product}/{paths.ROOTFS}"
    return [base] if layer_product is None else [f"{paths.LAYERS}/{layer_product}/{paths.ROOTFS}", base]


def current(state: State, wanted: Entry) -> bool:
    """Say whether containers.json holds ``wanted`` and the tenant's upper belongs to its lowers."""
    found = registry.read(state, salvage=True).get(wanted["tid"])
    return (
        found == wanted
        and registry.is_whole(state)
        and _lowers_of(state, wanted["tid"], slot_of(wanted)) == wanted["lowers"]
    )


# An upper over other lowers than it was made for is undefined (overlayfs.rst, "Changes to underlying filesystems").
# A tenant has two slots for an upper. New lowers get a fresh upper in the slot that is not used; then the entry is
# replaced, which is the one step that switches both: whenever it is cut, the tenant starts, as it was or as it will be.


def slot_of(entry: Mapping[str, Any]) -> str:
    """Return which slot an entry's upper is in."""
    return str(entry["upper"]).rpartition("/")[2].removeprefix(identity.UPPER)


def choose_slot(state: State, tid: str, wanted: list[str]) -> str:
    """Return the slot whose upper a tenant over the lowers ``wanted`` uses, or is to get."""
    entry = registry.read(state, salvage=True).get(tid)
    used = None if entry is None else slot_of(entry)
    if used in identity.SLOTS:
        fits = _belongs_to(state, tid, used, entry) == wanted
        return used if fits else next(slot for slot in identity.SLOTS if slot != used)
    known = {slot: _belongs_to(state, tid, slot, entry) for slot in identity.SLOTS}
    for slot in identity.SLOTS:
        if known[slot] == wanted:
            return slot
    unused = [slot for slot in identity.SLOTS if known[slot] is None]
    return unused[0] if unused else min(identity.SLOTS, key=lambda slot: _lowers_file(state, tid, slot).stat().st_mtime)


def put(state: State, wanted: Entry, reporter: Reporter) -> None:
    """Write ``wanted``; a tenant whose lowers changed gets a fresh upper first, the former one is kept once.

    Raises IsochamberError (stage "configure"), also when the tenant would need a fresh
    upper and is running, or when something it stands on was removed meanwhile.
    """
    tid = wanted["tid"]
    try:
        with locks.product_lock(state, f"tenant-{tid}", reporter.say):
            _check_parts(state, wanted)
            former = registry.read(state, salvage=True).get(tid)
            slot = slot_of(wanted)
            switches = former is not None and slot_of(former) != slot
            if switches or _belongs_to(state, tid, slot, former) != wanted["lowers"]:
                _refresh_upper(state, wanted, former, reporter)
            if _lowers_of(state, tid, slot) != wanted["lowers"]:
                _write_lowers(state, wanted)
            registry.put(state, wanted)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="configure", tenant=wanted["name"]) from error


def _check_parts(state: State, wanted: Entry) -> None:
    """Raise IsochamberError when a part was deleted or pruned since ``wanted`` was made."""
    for path in (*wanted["lowers"], wanted["overlay"], wanted["home"]):
        if not (state.root / path).is_dir():
            raise IsochamberError(
                "was removed meanwhile", stage="configure", tenant=wanted["name"], path=path, hint="run ./doit again"
            )


def _lowers_file(state: State, tid: str, slot: str) -> Path:
    return state.tenant_fs(tid) / f"{identity.LOWERS}{slot}"


def _lowers_of(state: State, tid: str, slot: str) -> list[str] | None:
    try:
        return _lowers_file(state, tid, slot).read_text().splitlines()
    except (OSError, ValueError):
        return None


def _belongs_to(state: State, tid: str, slot: str, entry: Entry | None) -> list[str] | None:
    """Return the lowers of the slot's upper: what its file says, or, when that is lost, the entry that uses it."""
    told = _lowers_of(state, tid, slot)
    if told is None and entry is not None and slot_of(entry) == slot:
        return [str(lower) for lower in entry["lowers"]]
    return told


def _refresh_upper(state: State, entry: Entry, former: Entry | None, reporter: Reporter) -> None:
    tid, slot = entry["tid"], slot_of(entry)
    upper = state.root / entry["upper"]
    # The second slot has no upper yet when the first configure was cut, and the layers changed before the next.
    if former is None and _lowers_of(state, tid, slot) is None and upper.is_dir() and not any(upper.iterdir()):
        return  # just made
    running = records.running(tid)
    if running is not None and running.waits:
        stop.stop(tid)  # a warm sandbox: nobody's yet, and made of what is replaced here
    if records.held(tid):
        raise IsochamberError(
            "runs on its former layers",
            stage="configure",
            tenant=entry["name"],
            hint="stop it first, then run ./doit again",
        )
    if former is not None:
        reporter.say(f"{entry['name']}: its layers changed: a fresh root file system, /home stays")
        _keep_both(state, former, entry)
    make_slot(state, tid, slot, entry["uid_base"])


def _write_lowers(state: State, entry: Entry) -> None:
    content = "".join(f"{lower}\n" for lower in entry["lowers"]).encode()
    durable.write_file(
        _lowers_file(state, entry["tid"], slot_of(entry)), content, staging=state.staging_of(entry["tid"])
    )


def make_slot(state: State, tid: str, slot: str, uid_base: int) -> None:
    """Give the slot an empty upper and workdir (the kernel ties a workdir to the upper it was used with)."""
    durable.remove_file(_lowers_file(state, tid, slot))
    for name in (f"{identity.UPPER}{slot}", f"{identity.WORKDIR}{slot}"):
        path = state.tenant_fs(tid) / name
        durable.remove_tree(path, state.staging_of(tid))
        with durable.staging_directory(state.staging_of(tid), f"{name}-{tid}") as stage:
            identity.make_owned(stage / name, uid_base)
            durable.commit_tree(stage / name, path)


# Going back.


def former_file(state: State, tid: str) -> Path:
    """Return where the entries are kept that a tenant had before its lowers changed, and after."""
    return state.tenant_fs(tid) / identity.FORMER


def _keep_both(state: State, first: Entry, second: Entry) -> None:
    """Keep the entries of both slots: whichever containers.json does not name is the former one."""
    text = json.dumps(sorted([first, second], key=slot_of))
    durable.write_file(former_file(state, first["tid"]), text.encode(), staging=state.staging_of(first["tid"]))


def former_of(state: State, tid: str) -> Entry | None:
    """Return the entry that :func:`rollback` would go back to; None when there is none, or it can't be started."""
    found = registry.read(state, salvage=True).get(tid)
    try:
        kept = json.loads(former_file(state, tid).read_bytes())
        others = [entry for entry in kept if found is None or slot_of(entry) != slot_of(found)]
        (former,) = registry.decode(json.dumps(others[:1]).encode()).values()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if _lowers_of(state, tid, slot_of(former)) != former["lowers"] or former["tid"] != tid:
        return None
    return former if all((state.root / path).is_dir() for path in (*former["lowers"], former["upper"])) else None


def rollback(state: State, name: str) -> Entry:
    """Give the tenant its former layers and its former upper again, in one step; returns the entry it has now.

    /home is not touched. The next ./doit configures what tenants.yaml and the package
    say again. Raises IsochamberError (stage "rollback").
    """
    found = registry.find(state, name)
    if found is None:
        raise IsochamberError("is not configured", stage="rollback", tenant=name, hint="isochamber ls")
    tid = found["tid"]
    try:
        with locks.product_lock(state, f"tenant-{tid}", lambda _line: None):
            now = registry.read(state).get(tid)
            if now is None:  # while this waited for the tenant's lock
                raise IsochamberError("was removed meanwhile", stage="rollback", tenant=name, hint="isochamber ls")
            limited.attach(state, tid)
            former = former_of(state, tid)
            if former is None:
                raise IsochamberError(
                    "there is nothing to go back to", stage="rollback", tenant=name,
                    hint="one former version is kept, until prune --until-free takes it",
                )  # fmt: skip
            if records.held(tid):
                raise IsochamberError("is running", stage="rollback", tenant=name, hint="stop it first")
            _keep_both(state, former, now)
            registry.put(state, former)
            return former
    except OSError as error:
        raise IsochamberError.from_os(error, stage="rollback", tenant=name) from error
