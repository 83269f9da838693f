"""From package to running tenant through the real command line: what the operator and the tenant may rely on."""

import shutil
from pathlib import Path

import pytest

from tests.tasks.world import World, empty_world, write_package

REPORT = "#!/bin/sh\necho greeting; echo pid $$; echo host $(hostname)\n"


@pytest.fixture
def world(root: Path, tmp_path: Path) -> World:
    """A world without tenants; a test drops packages into new_tenants/."""
    return empty_world(tmp_path / "world", root)


def _drop(world: World, name: str, config: dict[str, object], progs: dict[str, str]) -> Path:
    package = world.root / "new_tenants" / name
    if package.exists():
        shutil.rmtree(package)
    write_package(package, config, progs)
    return package


def test_run_configures_first_and_the_tenant_is_pid_1_with_its_tid_as_hostname(world: World) -> None:
    _drop(world, "hello", {}, {"main": REPORT})
    done = world.doit("run:hello")
    assert done.returncode == 0, done.stderr
    tid = world.entry("hello")["tid"]
    lines = done.stdout.splitlines()
    assert lines[-3:] == ["greeting", "pid 1", f"host {tid}"]
    assert len(tid) == 32
    again = world.doit(f"run:{tid}")
    assert again.returncode == 0
    assert again.stdout.splitlines() == lines[-3:], "the second run had something to build"


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit 0", 0),
        ("exit 7", 7),
        ("sh -c 'kill -9 $$'", 137),
        ("exec /nonexistent", 127),
        ("exec /etc/passwd", 126),
    ],
)
def test_doit_and_isochamber_exit_with_the_tenants_status(world: World, script: str, status: int) -> None:
    _drop(world, "exits", {}, {"main": f"#!/bin/sh\n{script}\n"})
    first = world.doit("run:exits")
    second = world.cli("run", "exits")
    assert (first.returncode, second.returncode) == (status, status), first.stderr


def test_an_init_that_does_not_exist_is_127_and_one_that_is_no_program_126(world: World) -> None:
    _drop(world, "missing", {"init": "/home/nothing"}, {"main": REPORT})
    done = world.doit("run:missing")
    assert done.returncode == 127, done.stderr
    assert "missing" in done.stderr
    assert "/home/nothing" in done.stderr
    assert "Traceback" not in done.stderr
    _drop(world, "data", {"init": "/home/main"}, {"main": "no program\n"})
    assert world.doit("run:data").returncode == 126


def test_an_init_string_with_arguments_and_a_list_mean_the_same(world: World) -> None:
    progs = {"with-overlay": '#!/bin/sh\necho "$0" "$@"\nexec "$@"\n', "overlay_tester": "#!/bin/sh\necho tester\n"}
    _drop(world, "words", {"init": "/home/with-overlay /home/overlay_tester"}, progs)
    _drop(world, "list", {"init": ["/home/with-overlay", "/home/overlay_tester"]}, progs)
    expected = ["/home/with-overlay /home/overlay_tester", "tester"]
    for name in ("words", "list"):
        assert world.doit(f"run:{name}").stdout.splitlines()[-2:] == expected


def test_home_persists_and_deployment_does_not_clobber_what_the_tenant_made(world: World) -> None:
    count = "#!/bin/sh\necho x >> /home/count\necho x >> /var/count\nwc -l < /home/count\nwc -l < /var/count\n"
    script = "#!/bin/sh\n: layer one\n"
    config: dict[str, object] = {"dependencies": "/home/deps.sh"}
    _drop(world, "keeper", config, {"main": count, "deps.sh": script, "settings": "ours\n"})
    assert world.doit("run:keeper").stdout.split()[-2:] == ["1", "1"]
    assert world.doit("run:keeper").stdout.split()[-2:] == ["2", "2"]
    home = world.root / "tenants_persist" / world.entry("keeper")["tid"] / "home"
    (home / "settings").write_text("changed by the tenant\n")
    # Another program and another layer: /home stays, the root file system starts afresh.
    _drop(world, "keeper", config, {"main": count + "echo new\n", "deps.sh": script + "touch /x\n", "settings": "v2\n"})
    done = world.doit("run:keeper")
    assert done.stdout.split()[-3:] == ["3", "1", "new"], done.stdout + done.stderr
    assert (home / "settings").read_text() == "changed by the tenant\n"


def test_what_the_operator_drops_into_home_belongs_to_the_tenants_root(world: World) -> None:
    _drop(
        world, "mailbox", {}, {"main": "#!/bin/sh\nstat -c %u:%g /home/drop; echo more >> /home/drop; cat /home/drop\n"}
    )
    assert world.doit("configure:mailbox").returncode == 0
    home = world.root / "tenants_persist" / world.entry("mailbox")["tid"] / "home"
    (home / "drop").write_text("from the operator\n")
    (home / "drop").chmod(0o600)
    assert world.doit("run:mailbox").stdout.splitlines()[-3:] == ["0:0", "from the operator", "more"]
    assert (home / "drop").stat().st_uid == 0


def test_a_failing_install_script_leaves_the_former_version_running(world: World) -> None:
    config: dict[str, object] = {"dependencies": "/home/deps.sh"}
    _drop(
        world, "fails", config, {"main": "#!/bin/sh\ncat /etc/made\n", "deps.sh": "#!/bin/sh\necho one > /etc/made\n"}
    )
    assert world.doit("run:fails").stdout.splitlines()[-1] == "one"
    layers, entry = world.layers(), world.entry("fails")
    _drop(
        world,
        "fails",
        config,
        {"main": "#!/bin/sh\ncat /etc/made\n", "deps.sh": "#!/bin/sh\necho last words\nexit 42\n"},
    )
    done = world.doit("configure:fails")
    assert done.returncode == 125
    assert "Traceback" not in done.stderr
    first = next(line for line in done.stderr.splitlines() if line.startswith("isochamber: fails:"))
    assert "42" in first
    assert "last words" in done.stderr
    log = world.root / "logs/layer-fails.log"
    assert str(log) in done.stderr
    assert "last words" in log.read_text()
    assert world.layers() == layers
    assert world.entry("fails") == entry
    assert world.cli("run", "fails").stdout.splitlines() == ["one"]
    assert not list((world.root / "staging").iterdir())


def test_a_tenant_with_a_broken_package_does_not_stop_another_from_running(world: World) -> None:
    _drop(world, "good", {}, {"main": REPORT})
    assert world.doit("configure:good").returncode == 0
    broken = _drop(world, "broken", {}, {"main": REPORT})
    (broken / "progs/out").symlink_to("/etc/shadow")
    before = sorted(str(path) for path in world.root.rglob("*") if "base_fs" not in path.parts)
    everything = world.doit()
    assert everything.returncode == 2
    assert "broken" in everything.stderr
    assert "Traceback" not in everything.stderr
    assert sorted(str(path) for path in world.root.rglob("*") if "base_fs" not in path.parts) == before
    assert world.doit("run:good").returncode == 0


def test_shell_runs_a_command_in_the_tenants_file_system_with_the_hosts_network(world: World) -> None:
    _drop(world, "debugged", {}, {"main": REPORT})
    assert world.doit("configure:debugged").returncode == 0
    links = Path("/proc/net/dev").read_text().splitlines()[2:]
    done = world.cli("shell", "debugged", "/bin/sh", "-c", "cat /proc/net/dev; ls /home; exit 3")
    assert done.returncode == 3, done.stderr
    for link in links:
        assert link.split(":")[0].strip() in done.stdout
    assert "main" in done.stdout
    confined = world.cli("run", "debugged", "/bin/cat", "/proc/net/dev")
    assert [line.split(":")[0].strip() for line in confined.stdout.splitlines()[2:]] == ["lo"]


def test_delete_asks_first_and_then_leaves_nothing_of_the_tenant(world: World) -> None:
    package = _drop(world, "doomed", {}, {"main": REPORT})
    _drop(world, "spared", {}, {"main": REPORT})
    assert world.doit().returncode == 0
    tid = world.entry("doomed")["tid"]
    refused = world.doit("delete:doomed")
    assert refused.returncode == 125
    assert "--yes" in refused.stderr
    assert world.entry("doomed")["tid"] == tid
    shutil.rmtree(package)
    done = world.cli("delete", "--yes", "doomed")
    assert done.returncode == 0, done.stderr
    assert not [path for path in world.root.rglob("*") if tid in path.name]
    assert "doomed" not in world.cli("ls").stdout
    assert world.cli("run", "spared").returncode == 0


def test_prune_removes_what_nothing_refers_to_and_says_how_much(world: World) -> None:
    config: dict[str, object] = {"dependencies": "/home/deps.sh"}
    package = _drop(
        world, "gone", config, {"main": REPORT, "deps.sh": "#!/bin/sh\nhead -c 100000 /dev/zero > /opt/big\n"}
    )
    _drop(world, "stays", config, {"main": REPORT, "deps.sh": "#!/bin/sh\ntouch /opt/small\n"})
    assert world.doit().returncode == 0
    kept = {Path(lower).parent.name for lower in world.entry("stays")["lowers"]}
    shutil.rmtree(package)
    done = world.doit("prune")
    assert done.returncode == 0, done.stderr
    assert "layer" in done.stdout
    assert "bytes freed" in done.stdout
    assert world.layers() == {name for name in kept if (world.root / "layers" / name).exists()}
    assert len(world.layers()) == 1
    assert world.doit("run:stays").returncode == 0
    world.doit("prune")
    assert world.doit("prune").stdout.splitlines()[-1] == "0 bytes freed"


def test_ls_show_and_check_tell_what_is_there(world: World) -> None:
    _drop(world, "seen", {}, {"main": REPORT})
    assert world.doit().returncode == 0
    entry = world.entry("seen")
    assert entry["tid"] in world.cli("ls").stdout
    shown = world.cli("show", entry["tid"])
    assert shown.returncode == 0
    assert "seen" in shown.stdout
    assert world.cli("show", "unseen").returncode == 125
    checked = world.cli("check")
    assert checked.returncode == 0, checked.stderr


def test_init_makes_a_package_that_runs(world: World) -> None:
    done = world.cli("init", "blank")
    assert done.returncode == 0, done.stderr
    assert (world.root / "new_tenants/blank/config.json").exists()
    run = world.doit("run:blank")
    assert run.returncode == 0, run.stdout + run.stderr
