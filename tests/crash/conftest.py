"""Servers and prepared worlds, once for all of these tests."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from isochamber.launch import syscalls
from tests.conftest import SCRATCH
from tests.crash.client import Server, expected, prepare
from tests.crash.world import World


@pytest.fixture(scope="session")
def crash_directory() -> Iterator[Path]:
    """A directory on a real disk file system, for worlds."""
    path = Path(tempfile.mkdtemp(prefix="isochamber-test-", dir=SCRATCH))
    yield path
    for line in Path("/proc/self/mountinfo").read_text().splitlines():  # a disk of a test that failed
        if line.split()[4].startswith(f"{path}/"):
            syscalls.umount2(line.split()[4], syscalls.MNT_DETACH)
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def servers(run_directory: Path) -> Iterator[list[Server]]:
    """Processes that do steps; two, for two can be waited for at once."""
    made = [Server(run_directory) for _ in range(2)]
    yield made
    for server in made:
        server.close()


@pytest.fixture(scope="session")
def server(servers: list[Server]) -> Server:
    """One of them."""
    return servers[0]


@pytest.fixture(scope="session")
def worlds(server: Server, crash_directory: Path) -> dict[str, World]:
    """A world before each case; to be copied, not changed."""
    return prepare(server, crash_directory)


@pytest.fixture(scope="session")
def wanted(server: Server, worlds: dict[str, World], crash_directory: Path) -> dict[str, dict[str, str]]:
    """What each case leads to when nothing goes wrong."""
    return {case: expected(server, case, world, crash_directory) for case, world in worlds.items()}


@pytest.fixture
def fresh(server: Server, worlds: dict[str, World], crash_directory: Path) -> Iterator[World]:
    """A world of the test's own in which everything is configured."""
    world = worlds["delete"].copy(crash_directory / "fresh")
    yield world
    world.remove()
