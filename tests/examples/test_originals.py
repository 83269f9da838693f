"""The original's test tenants, rebuilt from our own sources, through configure and run."""

import os
import subprocess
import threading
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.tasks.world import World

TENANTS = PROJECT / "tests/tenants"


@pytest.fixture
def world(root: Path, tmp_path: Path) -> World:
    """A world whose tenants.yaml names every one of them; they need no IPC but the one that is about it."""
    directory = tmp_path / "world"
    directory.mkdir()
    made = World(directory, root)
    lines = ["defaults: {ipc: none, install_network: host}", "bases: {default: {packages: []}}", "tenants:"]
    for package in sorted(TENANTS.iterdir()):
        extra = f", ipc: {tmp_path / 'ipc'}" if package.name == "ipc" else ""
        lines.append(f"  {package.name}: {{package: {package}{extra}}}")
    made.tenants.write_text("\n".join(lines) + "\n")
    return made


def test_hello_greets_as_process_1_of_its_own_host_and_as_root(world: World) -> None:
    done = world.doit("run:hello")
    assert done.returncode == 0, done.stderr
    tid = world.entry("hello")["tid"]
    assert done.stdout.splitlines()[-4:] == ["greeting", "pid 1", f"host {tid}", "user 0:0"]


def test_simple_writes_into_its_root_and_its_home_and_ends(world: World) -> None:
    assert world.doit("run:simple").stdout.splitlines()[-2:] == ["root 1", "home 1"]
    assert world.doit("run:simple").stdout.splitlines()[-2:] == ["root 2", "home 2"]
    entry = world.entry("simple")
    mark = world.root / entry["home"] / "home_mark"
    assert mark.read_text() == "mark\nmark\n"
    assert (world.root / entry["upper"] / "root_mark").stat().st_uid == entry["uid_base"]
    assert not Path("/root_mark").exists()


def test_capabilities_finds_mount_sethostname_and_reboot_refused(world: World) -> None:
    done = world.doit("run:capabilities")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in lines if line.endswith("refused")] == [
        "mount: refused", "sethostname: refused", "reboot: refused",
    ]  # fmt: skip
    sets = [line.split() for line in lines if line.startswith("Cap")]
    assert len(sets) == 5
    assert {int(value, 16) for _, value in sets} == {0}
    assert "NoNewPrivs:\t1" in lines


def test_the_probe_of_capabilities_tells_when_it_is_allowed() -> None:
    """The control: the same program as root of namespaces that are thrown away, where reboot(2) is inert."""
    done = subprocess.run(
        ["unshare", "--mount", "--uts", "--pid", "--fork", "perl", TENANTS / "capabilities/progs/capabilities"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "mount: allowed" in done.stdout
    assert "sethostname: allowed" in done.stdout
    assert "reboot: refused" not in done.stdout


def test_dependencies_runs_what_apt_installed(world: World) -> None:
    done = world.doit("run:dependencies")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2:] == ["installed by apt", "installed"]
    assert len(world.layers()) == 1
    again = world.doit("run:dependencies")
    assert again.stdout.splitlines() == ["installed by apt", "installed"], "the second run had something to build"


def test_ipc_speaks_over_fifos_and_can_change_nothing(world: World, tmp_path: Path) -> None:
    directory = tmp_path / "ipc"
    directory.mkdir()
    for name in ("question", "answer"):
        os.mkfifo(directory / name)
        (directory / name).chmod(0o666)
    assert world.doit("configure:ipc").returncode == 0
    heard: list[str] = []

    def host() -> None:
        (directory / "question").write_text("how are you\n")
        heard.append((directory / "answer").read_text())

    # A daemon thread: when the tenant never opens its end, the test fails by its own time limit and not by hanging.
    thread = threading.Thread(target=host, daemon=True)
    thread.start()
    done = world.cli("run", "ipc")
    assert done.returncode == 0, done.stdout + done.stderr
    thread.join(timeout=60)
    assert heard == ["answer to how are you\n"]
    assert done.stdout.splitlines() == [
        "heard how are you", "create: refused", "remove: refused", "rename: refused", "chmod: refused",
    ]  # fmt: skip
    assert sorted(path.name for path in directory.iterdir()) == ["answer", "question"]


def test_the_probe_of_ipc_tells_when_it_is_allowed(tmp_path: Path) -> None:
    """The control: the same program over a directory that it may write to."""
    for name in ("question", "answer"):
        os.mkfifo(tmp_path / name)
    text = (TENANTS / "ipc/progs/ipc").read_text().replace("/tmp/tenant_ipc", str(tmp_path))
    with subprocess.Popen(["/bin/sh", "-c", text], stdout=subprocess.PIPE, text=True) as probe:
        (tmp_path / "question").write_text("how are you\n")
        assert (tmp_path / "answer").read_text() == "answer to how are you\n"
        out, _ = probe.communicate(timeout=60)
    assert probe.returncode == 1
    assert "create: allowed" in out
    assert "remove: allowed" in out


def test_without_the_hosts_directory_the_start_is_refused_with_one_line(world: World, tmp_path: Path) -> None:
    done = world.doit("run:ipc")
    assert done.returncode == 125
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("isochamber:")]
    assert str(tmp_path / "ipc") in line
    assert "ipc: none" in line
