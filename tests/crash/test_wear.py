"""What the disk is given, as the block layer counts it: nothing by a no-op, little by a start and a stop."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isochamber.build.state import State
from isochamber.launch import command, records, syscalls
from tests.build.products import eventually
from tests.crash.client import Server
from tests.crash.test_full import small_disk
from tests.crash.world import World

SECTOR = 512
ROUNDS = 5
OURS = 16 << 10  # bytes a start and a stop, beyond what the kernel writes for their overlay


@pytest.fixture
def configured(worlds: dict[str, World], crash_directory: Path) -> Iterator[World]:
    """A configured world on a disk that nobody else writes to, and the kernel only what it is told."""
    with small_disk(crash_directory, "-E", "lazy_itable_init=0,lazy_journal_init=0", mount="loop,noatime") as disk:
        yield worlds["delete"].copy(disk / "world")


def _written(world: World) -> int:
    """Return the bytes that the disk below ``world`` has been given since it is there, everything synced."""
    descriptor = os.open(world.directory, os.O_RDONLY)
    try:
        for _ in range(2):
            syscalls.syncfs(descriptor)
    finally:
        os.close(descriptor)
    device = world.directory.stat().st_dev
    fields = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
    return int(fields[6]) * SECTOR


def test_a_no_op_gives_the_disk_not_one_byte(server: Server, configured: World) -> None:
    server.do("configure", configured)
    before = _written(configured)
    for _ in range(3):
        server.do("configure", configured)
    assert _written(configured) == before
    configured.change()
    server.do("configure", configured)
    assert _written(configured) > before, "the counter shows nothing"


def _each(world: World, once: Callable[[], object]) -> int:
    """Return how many bytes one of several gives the disk; the first ones make what is only made once."""
    for _ in range(ROUNDS):
        once()
    before = _written(world)
    for _ in range(ROUNDS):
        once()
    return (_written(world) - before) // ROUNDS


def _mount_an_overlay(world: World) -> None:
    """Mount an overlay and unmount it: the kernel makes work/ anew, and syncs the upper's whole file system."""
    place = world.directory / "bare"
    for name in ("lower", "upper", "workdir", "target"):
        (place / name).mkdir(parents=True, exist_ok=True)
    options = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/workdir"
    syscalls.mount("overlay", f"{place}/target", "overlay", 0, options)
    syscalls.umount2(f"{place}/target")


def test_a_start_and_a_stop_give_the_disk_hardly_more_than_the_mount_of_their_overlay(configured: World) -> None:
    tid = State(configured.root).tid("plain")

    def start_and_stop() -> None:
        argv = command.argv("run", "--root", str(configured.root), "plain")
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        assert eventually(lambda: not records.held(tid))

    floor = _each(configured, lambda: _mount_an_overlay(configured))
    each = _each(configured, start_and_stop)
    sys.stdout.write(f"{each} bytes a start and a stop; an overlay's mount alone {floor}\n")
    assert floor, "the counter shows nothing"
    assert each < floor + OURS
