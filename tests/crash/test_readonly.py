"""A disk that turns read-only in the middle of a step, as ext4 does after an error: one line, and well after a boot."""

import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash import faults
from tests.crash.client import CASES, DISK_CASES, Server, step_of
from tests.crash.test_full import small_disk
from tests.crash.world import World

SEED = int(os.environ.get("ISOCHAMBER_TEST_SEED", "1"))
SAMPLE = 8
TURN = ("mount", "-o", "remount,abort")  # ext4(5): the journal is aborted, as by an error, whoever writes


def _judge(server: Server, point: faults.Point, world: World, wanted: dict[str, str], directory: Path) -> list[str]:
    """Do the case while its disk turns read-only after a call, mount it as a boot does, and go on."""
    directory.mkdir()
    step = step_of(point.case)
    with small_disk(directory) as disk:
        copy = world.copy(disk / "world")
        subprocess.run(["sync", "-f", disk], check=True)
        inject = f"inject={point.call}:signal=STOP:when={point.number}"
        strace = ["-o", "/dev/null", "-e", f"trace={point.call}", "-e", inject]
        said = server.ask(step, copy, strace=strace, stopped=[*TURN, str(disk)])
        wrong = []
        if said["status"] not in (0, 125) or len(said["stderr"].splitlines()) > 1:
            wrong.append(f"no single line: {said}")
        if said["status"] == 125 and not any(name in said["stderr"] for name in ("(EROFS)", "(EIO)")):
            wrong.append(f"does not say why: {said}")
        image = directory / "disk.img"
        subprocess.run(["umount", disk], check=True)
        # Not -p: what was removed and still open when the journal was aborted is more than that mends.
        checked = subprocess.run(["fsck.ext4", "-f", "-y", image], capture_output=True, check=False)
        assert checked.returncode in (0, 1), checked
        subprocess.run(["mount", "-o", "loop", image, disk], check=True)
        server.do("again", copy, case=step)
        found = copy.snapshot()
        wrong += [f"{name}: {found.get(name)} instead of {wanted.get(name)}" for name in wanted.keys() | found.keys()
                  if found.get(name) != wanted.get(name)][:5]  # fmt: skip
        wrong += [f"left over: {name}" for name in copy.leftovers()]
        server.do("check", copy)
    return [f"{point}, {said}: {what}" for what in wrong]


def _points(server: Server, worlds: dict[str, World], directory: Path) -> list[faults.Point]:
    """Return a point for every call of every step that has no disk of its own in it."""
    own = {case: world for case, world in worlds.items() if case not in DISK_CASES}
    return [point for point in faults.points(server, own, directory) if point.kind == "EIO"]


def test_a_disk_that_turns_read_only_in_the_middle_of_a_step_is_one_line_and_all_is_well_after_a_boot(
    server: Server, worlds: dict[str, World], wanted: dict[str, dict[str, str]], crash_directory: Path
) -> None:
    chosen = faults.sample(_points(server, worlds, crash_directory), SAMPLE, SEED)
    wrong = [
        line
        for number, point in enumerate(chosen)
        for line in _judge(server, point, worlds[point.case], wanted[point.case], crash_directory / f"ro{number}")
    ]
    assert wrong == [], f"seed {SEED}"


@pytest.mark.crash
@pytest.mark.timeout(7200)
def test_a_disk_that_turns_read_only_at_every_call_of_every_step(
    server: Server, worlds: dict[str, World], wanted: dict[str, dict[str, str]], crash_directory: Path
) -> None:
    every = _points(server, worlds, crash_directory)
    wrong = []
    for number, point in enumerate(every):
        wrong += _judge(server, point, worlds[point.case], wanted[point.case], crash_directory / f"every{number}")
    each = collections.Counter(point.case for point in every)
    sys.stdout.write(f"read-only in the middle: {dict(each)}\n")
    assert each.keys() == CASES.keys() - DISK_CASES.keys()
    assert wrong == []
