"""The power is cut at random moments, and everything that had been announced as done is there."""

import itertools
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.vm import image, warm
from tests.vm.machine import Machine, Parts, Saved
from tests.vm.power import Account, BrokenError, cut, look

SEED = int(os.environ.get("ISOCHAMBER_TEST_SEED", "1"))  # a failure names its seed: this repeats it
SIZE, MEMORY, OPTIONS = "512M", "768M", "rw,noatime"


def lane(parts: Parts, directory: Path, seeds: range, saved: Saved | None) -> Account:
    """Cut the power once for each seed, over one data disk, and look at the end."""
    directory.mkdir()
    disk = image.make_data(directory / "data.img", None, SIZE)
    machine = Machine(parts, directory, disk, data_options=OPTIONS, memory=MEMORY, saved=saved)
    account = Account()
    for seed in seeds:
        cut(machine, seed, account)
        logging.getLogger(__name__).info(
            "cut %d, %s", seed, f"during {account.began[0]}" if account.at_work else "idle"
        )
    look(machine, seeds.stop, account)
    return account


def cuts(
    parts: Parts,
    scratch: Path,
    number: int,
    capsys: pytest.CaptureFixture[str],
    *,
    lanes: int = 1,
    saved: Saved | None = None,
) -> list[Account]:
    """Cut the power ``number`` times, on ``lanes`` machines side by side, and say how it went."""
    firsts = [SEED + number * index // lanes for index in range(lanes + 1)]
    with ThreadPoolExecutor(lanes) as pool:
        jobs = [
            pool.submit(lane, parts, scratch / f"power-{first}", range(first, end), saved)
            for first, end in itertools.pairwise(firsts)
        ]
        accounts = [job.result() for job in jobs]
    with capsys.disabled():
        sys.stdout.write(
            f"\n  power cuts: {number}, of which {sum(each.cuts_at_work for each in accounts)} during an operation;"
            f" {sum(each.done for each in accounts)} operations announced, seeds from {SEED}, {lanes} machines"
        )
    return accounts


@pytest.mark.vm
@pytest.mark.timeout(1200)
def test_three_power_cuts_lose_nothing_that_was_announced(
    parts: Parts, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (account,) = cuts(parts, scratch, 3, capsys)
    assert account.done >= 1


@pytest.mark.power
@pytest.mark.timeout(36000)
def test_two_hundred_power_cuts_lose_nothing_that_was_announced(
    parts: Parts, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = warm.save(parts, scratch / "warm", size=SIZE, memory=MEMORY)
    accounts = cuts(parts, scratch, int(os.environ.get("ISOCHAMBER_TEST_CUTS", "200")), capsys, lanes=2, saved=saved)
    assert all(account.cuts_at_work >= 1 for account in accounts)


@pytest.mark.power
@pytest.mark.timeout(3600)
def test_a_program_that_does_not_sync_is_caught(parts: Parts, scratch: Path) -> None:
    disk = image.make_data(scratch / "sabotage.img", None, "512M")
    machine = Machine(parts, scratch / "sabotage", disk, memory="768M")
    account = Account()
    with pytest.raises(BrokenError):
        for seed in range(SEED, SEED + 10):
            cut(machine, seed, account, sabotage=True)
