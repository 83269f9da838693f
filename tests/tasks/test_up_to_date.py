"""Change X, and exactly these tasks run: counted from the tasks that doit executed, never from its output."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tasks.world import SCRIPT, World, make_world, write_package, write_tenants

EVERY_TENANT = ("plain", "sensor", "twin")


@pytest.fixture(scope="module")
def world(make_root: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One world for the module; every test leaves it current, and starts by checking that it is."""
    root = make_root()
    made = make_world(tmp_path_factory.mktemp("world"), root)
    made.executed()
    yield made
    shutil.rmtree(root)


@pytest.fixture(autouse=True)
def _current(world: World) -> Iterator[None]:
    write_tenants(world)
    world.executed()
    assert world.executed() == set(), "the world was not current to begin with"
    yield


def _rewrite(path: Path, text: str) -> None:
    path.write_text(text)


def test_a_fresh_state_directory_runs_every_task_and_one_layer_serves_both_twins(
    make_root: Callable[[], Path], tmp_path: Path
) -> None:
    root = make_root()
    fresh = make_world(tmp_path / "w", root)
    executed = fresh.executed()
    # The base is there already: its digest is in its name, whoever built it.
    assert executed == {f"{task}:{name}" for task in ("dirs", "home", "configure") for name in EVERY_TENANT} | {
        "install_deps:sensor"
    }
    assert len(fresh.layers()) == 1
    shutil.rmtree(root)


def test_one_byte_in_progs_deploys_it_and_nothing_else(world: World) -> None:
    _rewrite(world.prog("plain", "data"), "two\n")
    assert world.executed() == {"home:plain", "configure:plain"}


def test_a_new_mtime_is_no_change(world: World) -> None:
    os.utime(world.prog("plain", "data"))
    os.utime(world.prog("sensor", "install_deps.sh"))
    assert world.executed() == set()


def test_the_execute_bit_is_a_change(world: World) -> None:
    file = world.prog("plain", "data")
    file.chmod(file.stat().st_mode ^ 0o111)
    assert world.executed() == {"home:plain", "configure:plain"}


def test_a_changed_script_rebuilds_its_own_layer_only(world: World) -> None:
    _rewrite(world.prog("sensor", "install_deps.sh"), SCRIPT + "# changed\n")
    assert world.executed() == {"install_deps:sensor", "home:sensor", "configure:sensor"}
    assert len({tuple(world.entry(name)["lowers"]) for name in ("sensor", "twin")}) == 2


def test_a_file_the_script_reads_rebuilds_the_layer(world: World) -> None:
    file = world.prog("twin", "settings.conf")
    _rewrite(file, file.read_text() + "more=1\n")
    assert world.executed() == {"install_deps:twin", "home:twin", "configure:twin"}


def test_a_file_the_script_does_not_read_only_deploys(world: World) -> None:
    _rewrite(world.prog("sensor", "unread"), f"{world.prog('sensor', 'unread').read_text()}more\n")
    assert world.executed() == {"home:sensor", "configure:sensor"}


def test_a_name_new_in_a_directory_the_script_lists_rebuilds_the_layer(world: World) -> None:
    count = len(list(world.prog("sensor", "conf.d").iterdir()))
    _rewrite(world.prog("sensor", f"conf.d/new{count}"), "")
    assert world.executed() == {"install_deps:sensor", "home:sensor", "configure:sensor"}


def test_content_below_a_directory_the_script_only_lists_does_not(world: World) -> None:
    file = world.prog("sensor", "conf.d/a")
    _rewrite(file, file.read_text() + "a\n")
    assert world.executed() == {"home:sensor", "configure:sensor"}


def test_a_former_script_finds_its_former_layer(world: World) -> None:
    script = world.prog("sensor", "install_deps.sh")
    before, layers = script.read_text(), world.layers()
    _rewrite(script, before + "# for a while\n")
    world.executed()
    _rewrite(script, before)
    assert world.executed() == {"home:sensor", "configure:sensor"}
    assert layers <= world.layers()


def test_a_comment_in_tenants_yaml_is_no_change(world: World) -> None:
    write_tenants(world, extra="# a comment\n")
    assert world.executed() == set()


def test_another_init_writes_the_entry_only(world: World) -> None:
    config = world.package("plain") / "config.json"
    _rewrite(config, config.read_text().replace('"/home/main"', '"/home/main --again"'))
    assert world.executed() == {"configure:plain"}
    assert world.entry("plain")["argv"] == ["/home/main", "--again"]


def test_a_grant_writes_the_entry_only(world: World) -> None:
    extra = "  granted: {package: packages/plain, limits: {open_files: %d}}\n"
    write_tenants(world, extra=extra % 100)
    assert world.executed() == {"dirs:granted", "home:granted", "configure:granted"}
    write_tenants(world, extra=extra % 200)
    assert world.executed() == {"configure:granted"}
    assert world.entry("granted")["rlimits"]["NOFILE"] == 200


def test_the_scripts_environment_is_an_input_of_its_layer(world: World) -> None:
    extra = "  env: {package: packages/sensor, install_env: {MODE: %s}}\n"
    write_tenants(world, extra=extra % "one")
    world.executed()
    write_tenants(world, extra=extra % "two")
    assert world.executed() == {"install_deps:env", "configure:env"}


def test_a_tenant_added_runs_its_own_tasks(world: World) -> None:
    if not world.package("added").exists():
        write_package(world.package("added"), {}, {"main": "#!/bin/sh\n"})
    write_tenants(world, extra="  added: {package: packages/added}\n")
    assert world.executed() == {"dirs:added", "home:added", "configure:added"}


def test_a_package_dropped_into_new_tenants_is_a_tenant(world: World) -> None:
    dropped = world.root / "new_tenants/dropped"
    write_package(dropped, {}, {"main": "#!/bin/sh\n"})
    try:
        assert world.executed() == {"dirs:dropped", "home:dropped", "configure:dropped"}
    finally:
        shutil.rmtree(dropped)


def test_a_tenant_removed_disturbs_nobody(world: World) -> None:
    write_tenants(world, without=("plain",))
    assert world.executed() == set()


def test_deleting_doits_database_rebuilds_nothing(world: World) -> None:
    database = Path(os.environ["ISOCHAMBER_RUN"]) / "doit.sqlite3"
    assert database.exists()
    database.unlink()
    assert world.executed() == set()


def test_deleting_the_cache_rebuilds_nothing(world: World) -> None:
    shutil.rmtree(world.root / "cache")
    assert world.executed() == set()


def test_a_deleted_layer_is_built_again_and_the_entry_stays(world: World) -> None:
    before = (world.root / "containers.json").read_bytes()
    world.executed()
    for name in world.layers():
        shutil.rmtree(world.root / "layers" / name)
    executed = world.executed()
    assert {"install_deps:sensor"} <= executed <= {"install_deps:sensor", "install_deps:twin"}
    assert (world.root / "containers.json").read_bytes() == before


def test_a_deleted_base_is_built_again_alone(world: World) -> None:
    for product in (world.root / "base_fs").iterdir():
        shutil.rmtree(product)
    assert world.executed() == {"base_fs:default"}


def test_a_deleted_containers_json_comes_back_the_same(world: World) -> None:
    file = world.root / "containers.json"
    # Entries of tenants that the other tests removed are not this test's business.
    file.unlink()
    world.executed()
    before = file.read_bytes()
    file.unlink()
    assert world.executed() == {f"configure:{name}" for name in EVERY_TENANT}
    assert file.read_bytes() == before


def test_the_bases_package_list_rebuilds_all_that_stands_on_it(world: World) -> None:
    write_tenants(world, base="    files: {/etc/marker: marker}")
    _rewrite(world.directory / "marker", "one\n")
    executed = world.executed()
    assert "base_fs:default" in executed
    write_tenants(world, base="    files: {/etc/marker: marker}".replace("[]", ""))
    text = world.tenants.read_text().replace("packages: []", "packages: [bc]")
    _rewrite(world.tenants, text)
    layers = {"install_deps:sensor", "install_deps:twin"}
    executed = world.executed()
    assert executed - layers == {"base_fs:default", *(f"configure:{name}" for name in EVERY_TENANT)}
    assert executed & layers
    _rewrite(world.directory / "marker", "two\n")
    executed = world.executed()
    assert executed - layers == {"base_fs:default", *(f"configure:{name}" for name in EVERY_TENANT)}


def test_a_kill_in_the_middle_of_a_layer_leaves_a_stage_that_the_next_run_ignores(world: World) -> None:
    script = world.prog("twin", "install_deps.sh")
    before, layers = script.read_text(), world.layers()
    _rewrite(script, "#!/bin/sh\necho started >&2\nexec sleep 1000\n")
    building = subprocess.Popen(
        [sys.executable, "-m", "isochamber.tasks", "install_deps:twin"],
        env=world.environment, cwd=world.directory, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert building.stdout is not None
    with building, building.stdout:
        for line in building.stdout:
            if line.rstrip().endswith("started"):
                break
        else:
            pytest.fail("the script never started")
        os.killpg(building.pid, signal.SIGKILL)
    assert list((world.root / "staging").iterdir()), "nothing was half made: the test shows nothing"
    assert world.layers() == layers
    _rewrite(script, before)
    assert world.executed() == set()
    assert world.doit("prune").returncode == 0
    assert not list((world.root / "staging").iterdir())


def test_a_no_op_writes_nothing_to_the_state_directory(world: World) -> None:
    def snapshot() -> dict[str, tuple[int, int]]:
        # The products themselves are covered by their directories' times: nothing in them is ever rewritten.
        return {
            str(path): (path.lstat().st_mtime_ns, path.lstat().st_ctime_ns)
            for pattern in ("*", "*/*", "cache/**/*", "tenants_persist/**/*")
            for path in world.root.glob(pattern)
        }

    world.executed()
    before = snapshot()
    assert world.executed() == set()
    assert snapshot() == before
