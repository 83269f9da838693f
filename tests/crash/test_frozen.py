"""A tenant that writes all the time is saved as it was at one moment, and no backup leaves it frozen."""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from isochamber.build import backup, restore
from isochamber.build.state import State
from tests.build.products import eventually
from tests.launch.conftest import base, launch_root, make_tenant
from tests.launch.tenants import Started, Tenant

__all__ = ["base", "launch_root", "make_tenant"]

# Two files that must agree: the second is never ahead, and never more than one behind. What lies
# between them in the order of names makes a copy take longer than many rounds.
WRITER = """
mkdir -p /home/m; i=0; while [ $i -lt 300 ]; do echo $i > /home/m/$i; i=$((i+1)); done
echo 0 > /home/a; echo 0 > /home/z; echo ready
i=0
while :; do
    i=$((i+1))
    echo $i > /home/a.new; mv /home/a.new /home/a
    echo $i > /home/z.new; mv /home/z.new /home/z
done
"""


@pytest.fixture
def running(launch_root: Path, make_tenant: Callable[..., Tenant]) -> Iterator[Started]:
    State(launch_root).create()  # before the first tenant: a namespace that came after it would not be its own
    tenant = make_tenant()
    if tenant.group is None:
        pytest.skip("this machine has no cgroup v2 tree: a running tenant can't be frozen")
    with tenant.started(WRITER) as started:
        yield started


def _pair(home: Path) -> tuple[int, int]:
    return int((home / "a").read_text()), int((home / "z").read_text())


def _agree(pair: tuple[int, int]) -> bool:
    return pair[1] in (pair[0], pair[0] - 1)


def _frozen(started: Started) -> bool:
    assert started.record.cgroup is not None
    return Path(started.record.cgroup, "cgroup.freeze").read_text().strip() == "1"


def _goes_on(started: Started) -> bool:
    first = (started.tenant.home / "a").read_text()
    return eventually(lambda: (started.tenant.home / "a").read_text() != first)


def test_a_backup_under_load_holds_two_files_that_agree_and_a_copy_without_freezing_does_not(
    running: Started, crash_directory: Path
) -> None:
    file, state = crash_directory / "busy", State(running.tenant.root)
    for number in range(3):
        backup.backup(state, running.tenant.name, file)
        assert not _frozen(running)
        assert _goes_on(running)
        other = State(crash_directory / f"of-busy-{number}")
        restore.restore(other, file)
        assert _agree(_pair(other.home(other.tid(running.tenant.name))))
        shutil.rmtree(other.root)
    torn = False
    for number in range(20):
        copy = crash_directory / f"torn-{number}"
        with contextlib.suppress(FileNotFoundError):  # a new file that got its name in between
            backup.copy_tree(running.tenant.home, copy, [])
            torn = torn or not _agree(_pair(copy))
        shutil.rmtree(copy)
    assert torn, "the tenant is too slow for this test to show anything"
    file.unlink()


def _frozen_or_ended(started: Started, child: int) -> bool:
    return _frozen(started) or os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def test_a_backup_that_is_killed_leaves_nobody_frozen(running: Started, crash_directory: Path) -> None:
    state = State(running.tenant.root)
    for _ in range(5):
        child = os.fork()
        if child == 0:
            try:
                backup.backup(state, running.tenant.name, crash_directory / "killed")
            finally:
                os._exit(0)
        assert eventually(partial(_frozen_or_ended, running, child))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert eventually(lambda: not _frozen(running))
        assert _goes_on(running)
    (crash_directory / "killed").unlink(missing_ok=True)
