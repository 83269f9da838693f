"""Mixed operations of four processes with random kills, against a model: nothing lost, doubled, stuck or left."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PROJECT

SEED = int(os.environ.get("ISOCHAMBER_TEST_SEED", "1"))
EVERY = {"configure", "run", "delete", "backup", "restore", "rollback", "prune", "thin", "fsck", "repair", "write"}
SHORT, LONG = 320, 10_000


def _chaos(directory: Path, run: Path, operations: int, timeout: float) -> dict[str, Any]:
    argv = [sys.executable, "-m", "tests.crash.chaos", str(SEED), str(operations), str(directory), str(run)]
    done = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    sys.stdout.write(f"{json.dumps({**found, 'wrong': len(found['wrong'])})}\n")
    return found


def _judge(found: dict[str, Any], operations: int) -> None:
    assert not found["wrong"], f"seed {found['seed']}:\n" + "\n".join(found["wrong"])
    assert found["operations"] == operations
    assert found["killed"] > operations // 20, "hardly anything was killed"
    assert found["refused"] < operations // 2, "hardly anything was done"


def test_some_operations_of_four_processes_with_random_kills_lose_double_and_leave_nothing(
    crash_directory: Path, run_directory: Path
) -> None:
    _judge(_chaos(crash_directory / "chaos", run_directory / "chaos", SHORT, 300), SHORT)


@pytest.mark.chaos
@pytest.mark.timeout(14400)
def test_ten_thousand_operations_of_four_processes_with_random_kills_lose_double_and_leave_nothing(
    crash_directory: Path, run_directory: Path
) -> None:
    found = _chaos(crash_directory / "chaos-long", run_directory / "chaos-long", LONG, 14000)
    _judge(found, LONG)
    assert set(found["each"]) == EVERY
