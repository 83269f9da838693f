"""States that a power cut can leave of a disk: mounted, converged, checked, and all that was announced is there."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm import aftercut, writelog

SEED = int(os.environ.get("ISOCHAMBER_TEST_SEED", "1"))
STATES = int(os.environ.get("ISOCHAMBER_TEST_STATES", "2000"))
RECORDINGS = 10  # at most: one life of two tenants has some 1,500 different states on ext4
SIZE = "512M"  # sparse: a base is only built where there is room for a real one
MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-m", "0", "-N", "16384", "-E", "lazy_journal_init=1,lazy_itable_init=1"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory, where there is one: a state is a file system that lives for half a second."""
    path = Path(tempfile.mkdtemp(prefix="isochamber-test-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield path
    shutil.rmtree(path)


def _recording(memory: Path, kind: str, variant: str | None = None) -> aftercut.Recording:
    for needed in (writelog.DAEMON, MAKE[kind][0]):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is missing")
    if not os.path.exists("/dev/fuse"):
        pytest.skip("/dev/fuse is missing: the recorded disk is a file by FUSE")
    if kind not in Path("/proc/filesystems").read_text():
        subprocess.run(["modprobe", kind], check=False, capture_output=True)
        if kind not in Path("/proc/filesystems").read_text():
            pytest.skip(f"this kernel has no {kind}")
    place = Path(tempfile.mkdtemp(dir=memory))
    made = aftercut.DiskWorld(place / "world")
    made.make()
    image = place / "initial.img"
    subprocess.run(["truncate", "-s", SIZE, image], check=True)
    subprocess.run([*MAKE[kind], image], check=True, capture_output=True)
    return aftercut.record(made, image, variant)


def _say(capsys: pytest.CaptureFixture[str], kind: str, recording: aftercut.Recording, found: aftercut.Found) -> None:
    flushes = sum(entry is None for entry in recording.entries)
    with capsys.disabled():
        sys.stdout.write(
            f"\n  {kind}: {len(recording.entries) - flushes} writes, {flushes} flushes; {found.states} states,"
            f" {len(found.wrong)} wrong ({found.same} more were the same as another); seed {SEED}"
        )


def test_a_sample_of_the_states_of_a_disk_after_a_cut(memory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording = _recording(memory, "ext4")
    found = aftercut.judge(recording, memory, seed=SEED, count=40)
    _say(capsys, "ext4", recording, found)
    assert not found.wrong, "\n\n".join(found.wrong)
    assert found.states == 40


@pytest.mark.parametrize(
    "variant",
    [
        "without tree sync",
        pytest.param("without file sync", marks=pytest.mark.power),
        pytest.param("without directory sync", marks=pytest.mark.power),
        pytest.param("sync after rename", marks=pytest.mark.power),
    ],
)
def test_a_sync_that_is_left_out_is_caught(memory: Path, variant: str) -> None:
    recording = _recording(memory, "ext4", variant)
    assert aftercut.judge(recording, memory, seed=SEED, count=100, until=1).wrong


@pytest.mark.power
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("kind", MAKE)
def test_two_thousand_states_of_a_disk_after_a_cut(memory: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    states = 0
    for attempt in range(RECORDINGS):
        recording = _recording(memory, kind)
        found = aftercut.judge(recording, memory, seed=SEED + attempt, count=STATES - states)
        _say(capsys, kind, recording, found)
        assert not found.wrong, "\n\n".join(found.wrong)
        states += found.states
        if states >= STATES:
            return
    pytest.fail(f"only {states} different states in {RECORDINGS} recordings")
