"""What the disk is given, as the block layer counts it: nothing by a no-op, little by a start and a stop."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isochamber.build.state import State
from isochamber.launch import command, records, syscalls
from tests.build.products import eventually
from tests.crash.client import Server
from tests.crash.test_full import small_disk
from tests.crash.world import World

SECTOR = 512
START_AND_STOP = 256 << 10  # bytes; some 77 KB are measured, 45 of them the journal of ext4


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


def test_a_start_and_a_stop_give_the_disk_a_bounded_number_of_bytes(configured: World) -> None:
    tid = State(configured.root).tid("plain")
    rounds = 5
    for measured in (False, True):  # the first start makes what is only made once
        before = _written(configured)
        for _ in range(rounds):
            argv = command.argv("run", "--root", str(configured.root), "plain")
            done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 0, done.stderr
            assert eventually(lambda: not records.held(tid))
        each = (_written(configured) - before) // rounds
        sys.stdout.write(f"{each} bytes a start and a stop, synced once in {rounds}\n")
        assert not measured or each < START_AND_STOP
