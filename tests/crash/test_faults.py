"""Cut, or refused, at the Nth call: the next run leads to the same state, and nothing is left."""

import os
import queue
import sys
import threading
from pathlib import Path

import pytest

from tests.crash import faults
from tests.crash.client import CASES, Server
from tests.crash.world import World

SEED = int(os.environ.get("ISOCHAMBER_TEST_SEED", "1"))
SAMPLE = 100  # all are some 4,100: ./doit test:crash


def _judge_all(
    servers: list[Server],
    points: list[faults.Point],
    worlds: dict[str, World],
    wanted: dict[str, dict[str, str]],
    directory: Path,
) -> list[str]:
    waiting: queue.SimpleQueue[tuple[int, faults.Point]] = queue.SimpleQueue()
    for number, point in enumerate(points):
        waiting.put((number, point))
    wrong: list[str] = []

    def work(server: Server) -> None:
        while True:
            try:
                number, point = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                found = faults.judge(server, point, worlds[point.case], wanted[point.case], directory / f"p{number}")
            except Exception as error:
                found = [f"{point}: {error!r}"]
            wrong.extend(found)
            for line in found:
                sys.stdout.write(f"{line}\n")  # at once: a whole run takes a quarter of an hour

    threads = [threading.Thread(target=work, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


@pytest.fixture(scope="session")
def points(server: Server, worlds: dict[str, World], crash_directory: Path) -> list[faults.Point]:
    return list(faults.points(server, worlds, crash_directory))


def test_a_sample_of_cuts_and_errors_converges(
    servers: list[Server],
    points: list[faults.Point],
    worlds: dict[str, World],
    wanted: dict[str, dict[str, str]],
    crash_directory: Path,
) -> None:
    chosen = faults.sample(points, SAMPLE, SEED)
    assert {point.kind for point in chosen} == set(faults.KINDS)
    assert _judge_all(servers, chosen, worlds, wanted, crash_directory) == [], f"seed {SEED}"


@pytest.mark.crash
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("case", CASES)
def test_every_cut_and_every_error_converges(
    servers: list[Server],
    points: list[faults.Point],
    worlds: dict[str, World],
    wanted: dict[str, dict[str, str]],
    crash_directory: Path,
    case: str,
) -> None:
    chosen = [point for point in points if point.case == case]
    assert len(points) > 1500
    assert len(chosen) > 10, "the trace of this case was not understood"
    assert _judge_all(servers, chosen, worlds, wanted, crash_directory) == []
    sys.stdout.write(f"{case}: {len(chosen)} points, none broken\n")
