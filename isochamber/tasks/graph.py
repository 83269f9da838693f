"""spec -> doit task dicts, nothing else: every task is a name, a check and a step of the pipeline."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from isochamber.build import space
from isochamber.build.pipeline import Pipeline
from isochamber.errors import IsochamberError, printable
from isochamber.launch import command
from isochamber.net import lifecycle
from isochamber.serve import run as supervised
from isochamber.tasks import foreground
from isochamber.tasks.action import action, up_to_date

Task = dict[str, Any]

_LIVE = {"verbosity": 2, "io": {"capture": False}}  # progress and prompts go to the real terminal


def tasks(pipeline: Pipeline) -> Iterator[Task]:
    """Yield every task of ``pipeline``'s bases and tenants."""
    yield from base_tasks(pipeline)
    yield from tenant_tasks(pipeline)
    yield from foreground_tasks(pipeline)
    yield from housekeeping_tasks(pipeline)


def _product(
    basename: str, name: str, doc: str, check: Callable[..., bool], step: Callable[..., object], task_dep: list[str]
) -> Task:
    return {
        "basename": basename,
        "name": name,
        "doc": doc,
        "uptodate": [up_to_date(check, name)],
        "actions": [action(step, name)],
        "task_dep": task_dep,
        **_LIVE,
    }


def base_tasks(pipeline: Pipeline) -> Iterator[Task]:
    """Yield ``base_fs:<base>``."""
    yield {"basename": "base_fs", "name": None, "doc": "lowest lowerdir, shared by all tenants of that base"}
    for name in pipeline.spec.bases:
        yield _product("base_fs", name, f"bootstrap the base {name}", pipeline.base_current, pipeline.make_base, [])


def tenant_tasks(pipeline: Pipeline) -> Iterator[Task]:
    """Yield the products of every tenant: ``dirs``, ``install_deps``, ``home``, ``configure``, ``net``."""
    for basename, doc in (
        ("dirs", "tid, uid range and directories of every tenant"),
        ("install_deps", "the dependency layer of every tenant, built in its sandbox"),
        ("home", "progs/ deployed to /home of every tenant"),
        ("configure", "everything a tenant needs, and its entry in containers.json"),
        ("net", "the network of every tenant that is granted one of its own"),
    ):
        yield {"basename": basename, "name": None, "doc": doc}
    networks = lifecycle.Networks(pipeline)
    for name, tenant in pipeline.spec.tenants.items():
        base = f"base_fs:{tenant.base}"
        dirs, deps, home = f"dirs:{name}", f"install_deps:{name}", f"home:{name}"
        yield _product(
            "dirs",
            name,
            f"directories of {name}",
            pipeline.dirs_current,
            pipeline.make_dirs,
            [],
        )
        yield _product(
            "install_deps",
            name,
            f"dependency layer of {name}",
            pipeline.layer_current,
            pipeline.make_layer,
            [base, dirs],
        )
        yield _product("home", name, f"/home of {name}", pipeline.home_current, pipeline.make_home, [dirs, deps])
        yield _product(
            "configure",
            name,
            f"entry of {name}",
            pipeline.configured,
            partial(lifecycle.configure, pipeline),
            [base, dirs, deps, home],
        )
        if tenant.network.mode == "bridge":
            yield _product(
                "net",
                name,
                f"network of {name}, as the kernel has it",
                networks.current,
                networks.make,
                [f"configure:{name}"],
            )


def foreground_tasks(pipeline: Pipeline) -> Iterator[Task]:
    """Yield ``run:<name>``, ``run:<tid>`` and ``shell:<name>``: configured first, then run when the graph is done."""
    yield {"basename": "run", "name": None, "doc": "run a tenant in the foreground (name or tid)"}
    yield {"basename": "shell", "name": None, "doc": "a root shell in a tenant's file system, with the host's network"}
    root = str(pipeline.spec.root)
    run = supervised.argv("run", "--root", root, "--")
    shell = command.argv("run", "--root", root, "--shell", "--")
    for name, tenant in pipeline.spec.tenants.items():
        names = [name]
        needed = [f"net:{name}"] if tenant.network.mode == "bridge" else []
        if pipeline.state.namespace is not None:
            names.append(pipeline.state.tid(name))
        for alias in names:
            yield foreground.task("run", alias, name, [*run, name], needed)
        yield foreground.task("shell", name, name, [*shell, name])


def housekeeping_tasks(pipeline: Pipeline) -> Iterator[Task]:
    """Yield ``delete:<name>`` and ``prune``."""
    yield {"basename": "delete", "name": None, "doc": "stop a tenant and remove all of it, its /home too; asks first"}
    for name in pipeline.spec.tenants:
        yield {
            "basename": "delete",
            "name": name,
            "doc": f"stop {name} and remove all of it; asks first",
            "actions": [action(delete_after_asking, pipeline, name)],
            **_LIVE,
        }
    yield {
        "basename": "prune",
        "doc": "remove bases, layers, caches and orphaned tenants that nothing refers to",
        "actions": [action(prune, pipeline)],
        **_LIVE,
    }


def delete_after_asking(pipeline: Pipeline, name: str, *, yes: bool = False) -> None:
    """Delete ``name`` if the operator at the terminal says so (or ``yes`` did); raises IsochamberError."""
    if not yes:
        foreground.confirm(f"Stop {name} and remove its file systems and its /home?", stage="delete", tenant=name)
    lifecycle.delete(pipeline.state, name, pipeline.reporter)


def prune(pipeline: Pipeline, *, until_free: int | None = None) -> None:
    """Remove what nothing refers to, and print each thing with its size in bytes.

    With ``until_free`` (bytes) no more than it takes; raises IsochamberError when all of it does not do.
    """
    total = 0
    if until_free is None or space.free(pipeline.state.root)[0] < until_free:
        for kind, name, size in lifecycle.prune(
            pipeline.state, pipeline.spec, pipeline.reporter, until_free=until_free
        ):
            sys.stdout.write(f"removed {kind} {printable(name)}: {size} bytes\n")
            total += size
    sys.stdout.write(f"{total} bytes freed\n")
    left = space.free(pipeline.state.root)[0]
    if until_free is not None and left < until_free:
        raise IsochamberError(
            f"{left} bytes are free, and nothing is left to remove", stage="prune", path=pipeline.state.root,
            hint="delete tenants, or give it a larger disk",
        )  # fmt: skip
