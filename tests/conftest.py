"""Fixtures of the whole suite: state directories with a real base in them, and a host that must stay as it was."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isochamber import paths

PROJECT = Path(__file__).parents[1]

# On disk, not on a tmpfs: an upper needs trusted xattrs, and a base is 200 MB.
SCRATCH = Path(os.environ.get("ISOCHAMBER_TEST_SCRATCH", "/var/tmp"))

MINIMAL = """\
root: {root}
bases:
  default: {{packages: []}}
tenants: {{}}
"""


def run(*argv: str | Path, **options: object) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end with captured text output; never raises for its status."""
    merged: dict[str, object] = {"capture_output": True, "text": True, "timeout": 300, "stdin": subprocess.DEVNULL}
    merged.update(options)
    return subprocess.run([str(word) for word in argv], check=False, **merged)  # type: ignore[call-overload, no-any-return]


@pytest.fixture(scope="session", autouse=True)
def _root_only() -> None:
    if os.geteuid() != 0:
        pytest.exit("the tests make real namespaces and file systems: run them as root (sudo ./doit test)", 2)


@pytest.fixture(scope="session", autouse=True)
def _ignored_by_nobody() -> None:
    """Have what we start begin with signals at their default, under nohup too: what we ignore it would ignore."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGTSTP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: None)  # caught: an exec makes it the default


@pytest.fixture(scope="session", autouse=True)
def run_directory() -> Iterator[Path]:
    """Locks, pins and records of this test run, apart from the machine's own."""
    path = Path(tempfile.mkdtemp(prefix="isochamber-test-", dir="/run"))
    former = os.environ.get("ISOCHAMBER_RUN")
    os.environ["ISOCHAMBER_RUN"] = str(path)
    os.environ["ISOCHAMBER_CGROUP"] = path.name
    for name in ("ISOCHAMBER_ROOT", "ISOCHAMBER_TENANTS"):
        os.environ.pop(name, None)
    yield path
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        target = line.split()[4]
        if target.startswith(f"{path}/"):
            subprocess.run(["umount", target], check=True)
    shutil.rmtree(path)
    if former is None:
        del os.environ["ISOCHAMBER_RUN"]
    else:
        os.environ["ISOCHAMBER_RUN"] = former


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A directory on a real disk file system, for the whole session."""
    path = Path(tempfile.mkdtemp(prefix="isochamber-test-", dir=SCRATCH))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def master_root(scratch: Path) -> Path:
    """A state directory in which the project's own code built the base "default", once a test run.

    ``$ISOCHAMBER_TEST_MASTER`` names one that outlives the run: a developer's, or one that a virtual machine got
    on a disk.
    """
    kept = os.environ.get("ISOCHAMBER_TEST_MASTER")
    root = Path(kept) if kept else scratch / "master"
    if list(root.glob("base_fs/*/manifest.json")):
        return root
    tenants = scratch / "master.yaml"
    tenants.write_text(MINIMAL.format(root=root))
    done = run(
        sys.executable, "-m", "isochamber.tasks", "base_fs:default",
        env={**os.environ, "ISOCHAMBER_TENANTS": str(tenants)}, timeout=900,
    )  # fmt: skip
    if done.returncode:
        pytest.fail(f"the base could not be built:\n{done.stdout}{done.stderr}", pytrace=False)
    return root


@pytest.fixture(scope="session")
def make_root(master_root: Path, scratch: Path) -> Iterator[Callable[[], Path]]:
    """Make state directories that hold the base already: its files are hard links, which nobody writes to."""
    made: list[Path] = []

    def make() -> Path:
        root = Path(tempfile.mkdtemp(prefix="state-", dir=scratch))
        made.append(root)
        (root / "base_fs").mkdir()
        for product in (master_root / "base_fs").iterdir():
            subprocess.run(["cp", "-al", product, root / "base_fs"], check=True)
        if (master_root / "cache").is_dir():
            subprocess.run(["cp", "-a", master_root / "cache", root], check=True)
        return root

    yield make


@pytest.fixture
def root(make_root: Callable[[], Path]) -> Iterator[Path]:
    """A state directory of the test's own, base included; removed after the test."""
    path = make_root()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def debian_state(root: Path) -> object:
    """The same as a :class:`isochamber.build.state.State`, created."""
    from isochamber.build.state import State

    state = State(root)
    state.create()
    return state


def _host() -> tuple[list[str], list[str]]:
    """What a test must leave as it found it: mounts and cgroups."""
    targets = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    mounts = sorted(path for path in targets if "/isochamber-test-" not in path or "/ns/" not in path)
    top = Path("/sys/fs/cgroup")
    groups = [*top.glob(f"{paths.cgroup_parent()}/*/"), *top.glob(f"*/{paths.cgroup_parent()}/*/")]
    cgroups = sorted(str(path) for path in groups)
    return mounts, cgroups


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def unchanged_host(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compare mounts, cgroups and our descriptors before and after every test (pins belong to the session)."""
    before, open_before = _host(), _descriptors()
    yield
    assert _host() == before, "the test left something behind on the host"
    if "whole" not in request.fixturenames:  # whose machines are begun by threads, while others are looked at
        assert _descriptors() <= open_before, "the test left descriptors open"
