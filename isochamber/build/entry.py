"""A tenant's entry of containers.json: everything the launcher needs, decided ahead of the start."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isochamber import paths
from isochamber.build import durable, identity, limits, locks, network, registry
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
) -> Entry:
    """Return the entry of ``tenant``, keys in the contract's order. Pure: the same arguments give the same entry."""
    package = tenant.package
    filesystem, persist = state.relative(state.tenant_fs(who.tid)), state.relative(state.tenant_persist(who.tid))
    lowers = [f"{paths.BASES}/{base_product}/{paths.ROOTFS}"]
    if layer_product is not None:
        lowers.insert(0, f"{paths.LAYERS}/{layer_product}/{paths.ROOTFS}")
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
        "uid_count": identity.UID_COUNT,
        "lowers": lowers,
        "upper": f"{filesystem}/{identity.UPPER}",
        "workdir": f"{filesystem}/{identity.WORKDIR}",
        "overlay": f"{filesystem}/{identity.OVERLAY}",
        "home": f"{persist}/{identity.HOME}",
        "ipc": tenant.ipc,
        "network": tenant.network.mode,
        "net": _net(state, tenant, who, subnets),
        "capabilities": list(tenant.capabilities),
        "devices": [{"path": device.path, "read_only": device.read_only} for device in tenant.devices],
        "read_only": tenant.read_only,
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


def current(state: State, wanted: Entry) -> bool:
    """Say whether containers.json holds ``wanted`` and the tenant's upper belongs to its lowers."""
    return registry.read(state).get(wanted["tid"]) == wanted and _lowers_of_upper(state, wanted) == wanted["lowers"]


def put(state: State, wanted: Entry, reporter: Reporter) -> None:
    """Write ``wanted``; a tenant whose lowers changed gets a fresh upper first, the former one is kept once.

    An upper over other lowers than it was made for is undefined (overlayfs.rst,
    "Changes to underlying filesystems"). Raises IsochamberError (stage "configure"), also
    when the tenant would need a fresh upper and is running.
    """
    try:
        with locks.product_lock(state, f"tenant-{wanted['tid']}", reporter.say):
            if _lowers_of_upper(state, wanted) != wanted["lowers"]:
                _refresh_upper(state, wanted, reporter)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="configure", tenant=wanted["name"]) from error
    registry.put(state, wanted)


def _lowers_file(state: State, entry: Entry) -> Path:
    return state.tenant_fs(entry["tid"]) / identity.LOWERS


def _lowers_of_upper(state: State, entry: Entry) -> list[str] | None:
    try:
        return _lowers_file(state, entry).read_text().splitlines()
    except FileNotFoundError:
        return None


def _refresh_upper(state: State, entry: Entry, reporter: Reporter) -> None:
    filesystem = state.tenant_fs(entry["tid"])
    upper, former, workdir = (filesystem / name for name in (identity.UPPER, identity.FORMER_UPPER, identity.WORKDIR))
    running = records.running(entry["tid"])
    if running is not None and running.waits:
        stop.stop(entry["tid"])  # a warm sandbox: nobody's yet, and made of what is replaced here
    if records.held(entry["tid"]):
        raise IsochamberError(
            "runs on its former layers",
            stage="configure",
            tenant=entry["name"],
            hint="stop it first, then run ./doit again",
        )
    if any(upper.iterdir()):
        reporter.say(f"{entry['name']}: its layers changed: a fresh root file system, /home stays")
        durable.remove_tree(former)
        with durable.staging_directory(state.staging, f"upper-{entry['tid']}") as stage:
            identity.make_owned(stage / identity.UPPER, entry["uid_base"])
            upper.rename(former)
            durable.commit_tree(stage / identity.UPPER, upper)
    # The kernel ties a workdir to the upper it was used with.
    durable.remove_tree(workdir)
    with durable.staging_directory(state.staging, f"workdir-{entry['tid']}") as stage:
        identity.make_owned(stage / identity.WORKDIR, entry["uid_base"])
        durable.commit_tree(stage / identity.WORKDIR, workdir)
    durable.write_file(_lowers_file(state, entry), "".join(f"{lower}\n" for lower in entry["lowers"]).encode())
