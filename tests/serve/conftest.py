"""A supervisor a test, over the base that the session built once."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isochamber.build.state import State
from tests.launch.tenants import Tenant
from tests.serve.world import World

_numbers = itertools.count(5000)


@pytest.fixture(scope="session")
def serve_root(make_root: Callable[[], Path]) -> Path:
    """A state directory with a base; each test has its own tenants in it."""
    root = make_root()
    State(root).create()
    return root


@pytest.fixture
def world(serve_root: Path) -> Iterator[World]:
    """A world without a supervisor yet: what it holds is ended and checked after the test."""
    (product,) = (serve_root / "base_fs").iterdir()
    made = World(serve_root, f"base_fs/{product.name}/rootfs")
    yield made
    made.close()


@pytest.fixture
def add(world: World) -> Callable[..., Tenant]:
    """Add tenants to the world."""

    def make(**changes: Any) -> Tenant:
        return world.add(next(_numbers), **changes)

    return make
