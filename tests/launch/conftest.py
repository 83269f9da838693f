"""Tenants for the launcher's tests, each checked for leftovers when its test is over."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch import tenants
from tests.launch.tenants import Tenant

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def launch_root(make_root: Callable[[], Path]) -> Path:
    """A state directory with a base, for all of these tests; each makes tenants of its own in it."""
    root = make_root()
    for name in ("layers", "staging"):
        (root / name).mkdir(exist_ok=True)
    return root


@pytest.fixture(scope="session")
def base(launch_root: Path) -> str:
    """The lower that every tenant stands on, relative to the state directory."""
    (product,) = (launch_root / "base_fs").iterdir()
    return f"base_fs/{product.name}/rootfs"


@pytest.fixture
def make_tenant(launch_root: Path, base: str) -> Iterator[Callable[..., Tenant]]:
    """Make tenants; after the test nothing of them may run, hold a lock, be mounted or have a cgroup."""
    made: list[Tenant] = []
    before = tenants.host_mounts()

    def make(**changes: Any) -> Tenant:
        tenant = Tenant(launch_root, base, next(_numbers), **changes)
        made.append(tenant)
        return tenant

    yield make
    for tenant in made:
        tenants.forget(tenant)
    ours = [target for target in tenants.host_mounts() if str(launch_root) in target]
    assert ours == [target for target in before if str(launch_root) in target]


@pytest.fixture
def tenant(make_tenant: Callable[..., Tenant]) -> Tenant:
    """One tenant."""
    return make_tenant()
