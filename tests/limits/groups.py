"""A tenant's control groups as the host sees them, whichever kind this machine has."""

from pathlib import Path

import pytest

from isochamber.launch import cgroup
from tests.launch.tenants import Tenant


def require(*controllers: str) -> None:
    """Skip where this machine has a controller neither as v1 nor as v2."""
    found = cgroup.trees()
    v2 = (Path(found.v2) / "cgroup.controllers").read_text().split() if found.v2 else []
    for controller in controllers:
        if controller not in found.v1 and {"blkio": "io"}.get(controller, controller) not in v2:
            pytest.skip(f"this machine has no {controller} controller")


def group(tenant: Tenant, controller: str) -> Path:
    """Return the tenant's group for ``controller``; it is there while the tenant runs."""
    found = cgroup.groups_of(tenant.tid, [controller], cgroup.trees())
    path = found.v1.get(controller, found.v2)
    assert path is not None
    return Path(path)


def is_v1(controller: str) -> bool:
    """Say which kind counts here."""
    return controller in cgroup.trees().v1


def read(tenant: Tenant, controller: str, v1: str, v2: str) -> str:
    """Return what the file reads, under the name it has here."""
    return (group(tenant, controller) / (v1 if is_v1(controller) else v2)).read_text().strip()


def members(tenant: Tenant, controller: str) -> set[int]:
    """Return who is in the tenant's group."""
    return {int(pid) for pid in (group(tenant, controller) / "cgroup.procs").read_text().split()}


def stat(tenant: Tenant, controller: str, file: str) -> dict[str, int]:
    """Return a file of "name number" lines."""
    lines = (group(tenant, controller) / file).read_text().splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


def everywhere(tenant: Tenant) -> list[Path]:
    """Return every group of the tenant that is there, of any controller."""
    trees = cgroup.trees()
    names = cgroup.groups_of(tenant.tid, trees.v1, trees)
    found = {*names.v1.values(), *([names.v2] if names.v2 else [])}
    return sorted(Path(path) for path in found if Path(path).is_dir())
