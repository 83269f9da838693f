"""The state directory's own identity: made once, by whoever is first, and read whole by everybody else."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isochamber.build.state import State
from isochamber.errors import IsochamberError

AT_ONCE = 4
ROUNDS = 200  # several failed in each run while the directory was looked at a second time after the read


def test_whoever_creates_it_at_once_agrees_and_none_fails(tmp_path: Path) -> None:
    together = threading.Barrier(AT_ONCE)

    def create(root: Path) -> str:
        together.wait()
        State(root).create()
        return str(State(root).namespace)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number in range(ROUNDS):
            assert len(set(pool.map(create, [tmp_path / f"state-{number}"] * AT_ONCE))) == 1


@pytest.mark.parametrize("damaged", [b"", b"not a UUID\n"])
def test_one_file_is_enough_and_two_damaged_ones_are_said(tmp_path: Path, damaged: bytes) -> None:
    made = State(tmp_path / "state")
    made.create()
    first, copy = made.namespace_files()
    first.write_bytes(damaged)
    assert State(made.root).namespace == made.namespace
    copy.write_bytes(damaged)
    with pytest.raises(IsochamberError, match="does not hold a UUID"):
        State(made.root).create()
    assert (first.read_bytes(), copy.read_bytes()) == (damaged, damaged)
