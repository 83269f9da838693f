"""Several builds at once: in one doit, and in two doit processes."""

import json
import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.tasks.world import World, empty_world, write_package

# Notes that it ran (in its own layer), and takes a moment so that two would meet.
SLOW_SCRIPT = "#!/bin/sh\necho ran >> /home/ran\ncat /home/gate > /dev/null\necho done\n"


@pytest.fixture
def world(root: Path, tmp_path: Path) -> World:
    made = empty_world(tmp_path / "world", root)
    for number in range(4):
        write_package(
            root / f"new_tenants/t{number}",
            {"dependencies": "/home/deps.sh"},
            {"main": "#!/bin/sh\n", "gate": "same\n", "deps.sh": SLOW_SCRIPT},
        )
    return made


def test_parallel_tasks_build_one_layer_for_one_digest(world: World) -> None:
    done = world.doit("run", "-n", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(world.layers()) == 1
    entries = json.loads((world.root / "containers.json").read_text())
    assert len(entries) == 4
    ranges = {entry["uid_base"] for entry in entries}
    assert len(ranges) == 4, "two tenants share a uid range"


def test_parallel_tasks_build_different_layers_side_by_side(world: World) -> None:
    for number in range(4):
        script = world.root / f"new_tenants/t{number}/progs/deps.sh"
        script.write_text(SLOW_SCRIPT + f"# {number}\n")
    done = world.doit("run", "-n", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(world.layers()) == 4
    assert world.executed() == set()


def test_two_doit_processes_build_a_layer_once_and_the_second_says_what_it_waits_for(world: World) -> None:
    # The script of t0 waits on a FIFO that it makes itself, so that the first process surely holds the lock.
    gate = "#!/bin/sh\nmkfifo /home/fifo\necho gate made\nread line < /home/fifo\n"
    for name in ("t0", "t1"):
        (world.root / f"new_tenants/{name}/progs/deps.sh").write_text(gate)

    def start(target: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "isochamber.tasks", target],
            env=world.environment, cwd=world.directory, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    said: dict[str, list[str]] = {"t0": [], "t1": []}
    lines: queue.Queue[tuple[str, str]] = queue.Queue()

    def listen(name: str, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put((name, line))
        lines.put((name, ""))

    with start("configure:t0") as first, start("configure:t1") as second:
        # Whichever comes first builds; the other one waits.
        threads = [threading.Thread(target=listen, args=pair) for pair in (("t0", first), ("t1", second))]
        for thread in threads:
            thread.start()
        try:
            while not _one_builds_and_the_other_waits(said):
                name, line = lines.get(timeout=120)
                assert line, f"one of them ended: {said}"
                said[name].append(line)
            _open_the_gate(world)
            assert (first.wait(120), second.wait(120)) == (0, 0), f"{said}{list(lines.queue)}"
        finally:
            for process in (first, second):
                process.kill()
            for thread in threads:
                thread.join()
    assert len(world.layers()) == 1
    assert world.executed("configure:t0", "configure:t1") == set()


def _one_builds_and_the_other_waits(said: dict[str, list[str]]) -> bool:
    words = ["".join(lines) for lines in said.values()]
    return any("gate made" in text for text in words) and any("waiting for layer-" in text for text in words)


def _open_the_gate(world: World) -> None:
    fifo = next(world.root.glob("staging/**/fifo"))
    with fifo.open("w") as gate:  # waits for the script to open it
        gate.write("go\n")


# One doit that stands still between two tasks: the layer is made, and nothing refers to it yet.
STANDS_STILL = """
import sys
from isochamber.build.pipeline import Pipeline
from isochamber.tasks import __main__ as entry
make_home = Pipeline.make_home
def stand_still(pipeline, name):
    print("between", flush=True)
    sys.stdin.readline()
    make_home(pipeline, name)
Pipeline.make_home = stand_still
sys.exit(entry.main(["configure:t0"]))
"""


def test_a_prune_beside_takes_nothing_that_a_run_made_and_does_not_refer_to_yet(world: World) -> None:
    def start(*words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, *words], env=world.environment, cwd=world.directory, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    with start("-c", STANDS_STILL) as running:
        assert running.stdout is not None
        while (line := running.stdout.readline()) != "between\n":
            assert line, "it ended before it stood still"
        made = world.layers()
        assert len(made) == 1
        with start("-m", "isochamber.tasks", "prune") as pruning:
            assert pruning.stdout is not None
            while "waiting for builds" not in (line := pruning.stdout.readline()):
                assert line, "prune did not wait"
            assert world.layers() == made
            assert running.communicate("on\n", timeout=60)[0] is not None
            assert running.returncode == 0
            assert pruning.communicate(timeout=60)[0] is not None
            assert pruning.returncode == 0
    assert world.layers() == made
    assert world.entry("t0")["lowers"][0].split("/")[1] in made
