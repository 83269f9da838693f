"""The power is cut at random moments, and everything that had been announced as done is there."""

import os
import sys
from pathlib import Path

import pytest

from tests.vm import image
from tests.vm.machine import Machine, Parts
from tests.vm.power import Account, BrokenError, cut, look

SEED = int(os.environ.get("ISOCHAMBER_TEST_SEED", "1"))  # a failure names its seed: this repeats it


def cuts(parts: Parts, scratch: Path, number: int, capsys: pytest.CaptureFixture[str]) -> Account:
    """Cut the power ``number`` times, each time with the next seed, over one data disk."""
    directory = scratch / f"power-{number}"
    machine = Machine(parts, directory, image.make_data(scratch / f"power-{number}.img", None, "512M"), memory="768M")
    account = Account()
    for seed in range(SEED, SEED + number):
        cut(machine, seed, account)
    look(machine, SEED + number, account)
    with capsys.disabled():
        sys.stdout.write(
            f"\n  power cuts: {number}, of which {account.cuts_at_work} during an operation;"
            f" {account.done} operations announced, seeds from {SEED}"
        )
    return account


@pytest.mark.vm
@pytest.mark.timeout(1200)
def test_three_power_cuts_lose_nothing_that_was_announced(
    parts: Parts, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cuts(parts, scratch, 3, capsys).done >= 1


@pytest.mark.power
@pytest.mark.timeout(36000)
def test_two_hundred_power_cuts_lose_nothing_that_was_announced(
    parts: Parts, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    account = cuts(parts, scratch, int(os.environ.get("ISOCHAMBER_TEST_CUTS", "200")), capsys)
    assert account.cuts_at_work >= 1


@pytest.mark.power
@pytest.mark.timeout(3600)
def test_a_program_that_does_not_sync_is_caught(parts: Parts, scratch: Path) -> None:
    disk = image.make_data(scratch / "sabotage.img", None, "512M")
    machine = Machine(parts, scratch / "sabotage", disk, memory="768M")
    account = Account()
    with pytest.raises(BrokenError):
        for seed in range(SEED, SEED + 10):
            cut(machine, seed, account, sabotage=True)
