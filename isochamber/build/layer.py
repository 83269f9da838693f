"""Dependency layers: one run of an install script over one base, sealed, shared by every tenant with the same inputs.

A layer's name is ``<recipe>-<observed>``. The recipe is what is known before the run:
base, script, environment. The rest is what the script was seen to open of progs/, so
a program that it never opened does not rebuild it. Looking a layer up means asking,
for every layer of the recipe, whether what it was seen to open is still the same.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping

from isochamber import paths
from isochamber.build import base, debcache, durable, home, locks, manifest, seal, space, staged, tree
from isochamber.build.identity import Identity
from isochamber.build.inputs import Inputs
from isochamber.build.process import Outcome
from isochamber.build.progress import Product, Reporter
from isochamber.build.sandbox import Sandbox
from isochamber.build.state import State
from isochamber.build.watch import Watch
from isochamber.errors import IsochamberError
from isochamber.spec.model import Tenant

_FORMAT = "1"  # of what is done to a layer besides running the script: another number is another layer
_OBSERVED = "observed"  # key of a layer's manifest.extra: path -> digest as it was seen
_FILE = "/home/"  # begins the name of an input that is a file: no package can have one called "base"
# What a failing script may have missed.
_NETWORKS = {
    "bridge": "; it reached no service of this host (install_network)",
    "none": "; it had no network (install_network)",
    "host": "",
}
_TOLD = 20  # things left out of a layer that are named one by one


def recipe(tenant: Tenant, base_product: str, own: Mapping[str, str]) -> Inputs | None:
    """Return what a layer of ``tenant`` is made of as far as it is known before the run; None: nothing to install.

    The environment is ``install_env`` alone: what the package's program gets at run time
    is not for the script, and changes nothing here. Values stand as digests, because
    they may be passwords.
    """
    package = tenant.package
    if package.script is None:
        return None
    return Inputs.of(
        {
            "format": _FORMAT,
            "base": base_product,
            _FILE + package.script: own[package.script],
            "inputs": "all" if package.inputs is None else json.dumps(package.inputs),
            **{f"environment {name}": _digest(value) for name, value in tenant.install_env.items()},
        }
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def find(state: State, tenant: Tenant, made_of: Inputs, own: Mapping[str, str]) -> str | None:
    """Return the layer that a run now would make, or None: of the same recipe, and nothing it opened has changed."""
    shown = staged.visible(tenant, own)
    prefix = f"{made_of.digest()}-"
    for entry in sorted(_names(state)):
        if entry.startswith(prefix) and manifest.usable(state.layer(entry)):
            observed = manifest.read(state.layer(entry)).extra[_OBSERVED]
            if all(staged.seen(path, shown) == digest for path, digest in observed.items()):
                return entry
    return None


def _names(state: State) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(state.root / paths.LAYERS)]
    except FileNotFoundError:
        return []


def build(
    state: State,
    tenant: Tenant,
    base_product: str,
    own: Mapping[str, str],
    who: Identity,
    reporter: Reporter,
    *,
    former_product: str | None = None,
) -> str | None:
    """Run the install script of ``tenant`` and seal its layer, unless that layer is there; returns its product name.

    None when the package has no install script. A script that fails raises
    IsochamberError (stage "layer") with its exit code, its last lines and its log, and
    leaves no layer. Two processes never run the same recipe: the second waits.
    """
    made_of = recipe(tenant, base_product, own)
    if made_of is None:
        return None
    with contextlib.ExitStack() as stack:
        stack.enter_context(locks.product_lock(state, f"layer-{made_of.digest()}", reporter.say))
        found = find(state, tenant, made_of, own)
        if found is not None:
            return found
        # One run a tenant: its former recipe may still be running, with the same ids.
        stack.enter_context(locks.product_lock(state, f"install-{who.tid}", reporter.say))
        shown = staged.visible(tenant, own)
        reporter.reasons(_title(tenant), _reasons(state, made_of, shown, former_product))
        _require_space(state, tenant, former_product)
        try:
            stage = stack.enter_context(durable.staging_directory(state.staging, f"layer-{tenant.name}"))
            sandbox = Sandbox(state, stage, who, base_product, tenant.install_network, tenant.subnets)
            sandbox.make()
            staged.stage(tenant, shown, sandbox.home)
            watch = stack.enter_context(Watch(sandbox.home))
            with reporter.product(_title(tenant)) as progress:
                _install(state, tenant, sandbox, progress)
                progress.phase("sealing")
                return _commit(state, tenant, sandbox, made_of, shown, watch, reporter)
        except OSError as error:
            raise IsochamberError.from_os(error, stage="layer", tenant=tenant.name) from error
        except IsochamberError as error:
            error.tenant = error.tenant or tenant.name
            raise


def _require_space(state: State, tenant: Tenant, former_product: str | None) -> None:
    """Raise IsochamberError unless there is room for as much as the tenant's former layer took, and for progs/."""
    size, names = sum(prog.size for prog in tenant.package.progs), len(tenant.package.progs)
    if former_product is not None and manifest.exists(state.layer(former_product)):
        former = manifest.read(state.layer(former_product))
        size, names = size + former.size, names + former.names
    space.require(state.root, size, names=names, stage="layer", tenant=tenant.name)


def _title(tenant: Tenant) -> str:
    return f"layer of {tenant.name}"


def _reasons(state: State, made_of: Inputs, shown: Mapping[str, str], former_product: str | None) -> tuple[str, ...]:
    """Compare with the layer the tenant stands on now: what changed since."""
    if former_product is None or not manifest.exists(state.layer(former_product)):
        return ()
    former = manifest.read(state.layer(former_product))
    now = dict(made_of.items)
    for path in former.extra[_OBSERVED]:
        digest = staged.seen(path, shown)
        if digest is not None:
            now[_FILE + path] = digest
    return tuple(phrase.removeprefix(_FILE) for phrase in Inputs.of(now).changed_from(former.inputs))


def _install(state: State, tenant: Tenant, sandbox: Sandbox, progress: Product) -> None:
    """Run the script; raises IsochamberError when it fails. What it downloaded and is genuine stays either way."""
    path = tenant.package.dependencies
    script = sandbox.home / (tenant.package.script or "")
    with script.open("rb") as file:
        argv = [path] if file.read(2) == b"#!" else ["/bin/sh", path]
    log = state.log(f"layer-{tenant.name}")
    limit = tenant.limits.install_seconds
    cache = base.deb_cache(state, sandbox.base_product)
    debcache.show(cache, sandbox.packages)
    outcome = sandbox.run(
        argv, dict(tenant.install_env), bounds=tenant.limits, tenant=tenant.name, log=log, product=progress
    )
    late = progress.seconds >= limit
    with contextlib.suppress(OSError):  # a cache that can't be kept costs time and nothing else
        _keep_debs(state, sandbox)
    if outcome.status:
        raise _failure(tenant, outcome, log, late=late, limit=limit)


def _keep_debs(state: State, sandbox: Sandbox) -> None:
    rootfs = state.base(sandbox.base_product) / paths.ROOTFS
    upper, lower = os.open(sandbox.upper, tree.DIRECTORY), os.open(rootfs, tree.DIRECTORY)
    try:
        debcache.keep(base.deb_cache(state, sandbox.base_product), upper, lower)
    finally:
        os.close(upper)
        os.close(lower)


def _failure(tenant: Tenant, outcome: Outcome, log: os.PathLike[str], *, late: bool, limit: int) -> IsochamberError:
    what = f"{tenant.package.dependencies} exited with {outcome.status}"
    if late:
        what = f"{tenant.package.dependencies} was killed after {limit} s (limits: install_seconds)"
    return IsochamberError(
        what,
        stage="layer",
        tenant=tenant.name,
        path=log,
        hint="the last lines of its log follow; the tenant's former version is untouched"
        + _NETWORKS[tenant.install_network],
        notes=outcome.last_lines,
    )


def _commit(
    state: State,
    tenant: Tenant,
    sandbox: Sandbox,
    made_of: Inputs,
    shown: Mapping[str, str],
    watch: Watch,
    reporter: Reporter,
) -> str:
    """Seal, describe, publish; returns the product name. Every process of the run is dead."""
    opened = watch.opened()  # before we open anything ourselves
    left = staged.keep_what_was_left(sandbox.home, shown, watch)
    observed = staged.observed({*opened, *left.moved}, shown, tenant.package.script)
    name = f"{made_of.digest()}-{Inputs.of(observed).digest()}"
    if manifest.usable(state.layer(name)):
        return name  # a run that was seen to open something else first came to the same
    upper = os.open(sandbox.upper, tree.DIRECTORY)
    try:
        dropped = seal.seal(upper, sandbox.who.uid_base)
    finally:
        os.close(upper)
    for phrase in dropped[:_TOLD]:
        reporter.say(f"{_title(tenant)}: {phrase}")
    if len(dropped) > _TOLD:
        reporter.say(f"{_title(tenant)}: and {len(dropped) - _TOLD} more")
    with durable.staging_directory(state.staging, f"sealed-{tenant.name}") as product:
        sandbox.upper.rename(product / paths.ROOTFS)
        sandbox.home.rename(product / paths.LAYER_HOME)
        extra = {_OBSERVED: observed, home.LEFT: dict(left.files), home.REMOVED: list(left.removed)}
        inputs = Inputs.of({**dict(made_of.items), **{_FILE + path: seen for path, seen in observed.items()}})
        manifest.complete(product, "layer", tenant.name, inputs, extra)
        product.chmod(0o755)
        durable.remove_tree(state.layer(name), state.staging)  # a torn one
        durable.commit_tree(product, state.layer(name))
    return name
