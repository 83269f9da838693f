"""What is broken is named, and only that is made anew; a tenant goes back to its former version in one step."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from isochamber import paths
from isochamber.build import entry, fsck, registry
from isochamber.build.state import State
from isochamber.launch import command, pins, records, syscalls
from tests.build.products import eventually
from tests.crash.client import Server
from tests.crash.world import World


def _found(world: World, *, deep: bool = False) -> list[fsck.Finding]:
    return fsck.check(State(world.root), deep=deep)


def _product(world: World, kind: str) -> Path:
    (path,) = (world.root / kind).iterdir()
    return path


def _entry(world: World) -> dict[str, object]:
    return next(dict(found) for found in registry.read(State(world.root)).values() if found["name"] == "sensor")


def _of(world: World, key: str) -> Path:
    return world.root / str(_entry(world)[key])


def _cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _change_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# What is damaged, how it is called, and whether only a deep look sees it.
DAMAGES: dict[str, tuple[Callable[[World], object], str, bool]] = {
    "a file of the base is gone": (lambda w: (_product(w, "base_fs") / "rootfs/usr/bin/sh").unlink(), "base", False),
    "an empty file": (
        lambda w: os.truncate(_product(w, "base_fs") / "rootfs/usr/bin/sh", 0),
        "base",
        False,
    ),
    "a bit of the base": (lambda w: _change_byte(_product(w, "base_fs") / "rootfs/usr/bin/sh"), "base", True),
    "the base's root": (lambda w: shutil.rmtree(_product(w, "base_fs") / "rootfs"), "base", False),
    "the base's list": (lambda w: _cut_file(_product(w, "base_fs") / "files.list"), "base", False),
    "the base's manifest": (lambda w: os.truncate(_product(w, "base_fs") / "manifest.json", 0), "base", False),
    "a bit of the layer": (lambda w: _change_byte(_product(w, "layers") / "rootfs/etc/made"), "layer", True),
    "a mode in the layer": (lambda w: (_product(w, "layers") / "rootfs/etc/made").chmod(0o600), "layer", False),
    "something more in the layer": (lambda w: (_product(w, "layers") / "rootfs/etc/more").touch(), "layer", False),
    "what the script left": (lambda w: (_product(w, "layers") / "home/left").unlink(), "layer", False),
    "containers.json": (lambda w: _cut_file(w.root / "containers.json"), "containers.json", False),
    "the namespace": (lambda w: (w.root / "namespace").unlink(), "namespace", False),
    "the namespace's copy": (lambda w: os.truncate(w.root / "namespace.copy", 0), "namespace", False),
    "an upper": (lambda w: shutil.rmtree(_of(w, "upper")), "tenant", False),
    "a workdir": (lambda w: shutil.rmtree(_of(w, "workdir")), "tenant", False),
    "what an upper belongs to": (lambda w: (_of(w, "upper").parent / "lowers").unlink(), "tenant", False),
    "a name": (lambda w: (_of(w, "home").parent / "name").unlink(), "tenant", False),
    "what was deployed": (lambda w: _cut_file(_of(w, "home").parent / "home.manifest.json"), "tenant", False),
    "a stage that nobody holds": (lambda w: (w.root / "staging/.tmp-x").mkdir(), "leftover", False),
    "a staged file in a tenant": (lambda w: (_of(w, "home").parent / ".tmp-x").touch(), "leftover", False),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_next_doit_or_repair_makes_only_that_anew(
    server: Server, fresh: World, damage: str
) -> None:
    function, kind, only_deep = DAMAGES[damage]
    assert _found(fresh, deep=True) == []
    before = fresh.snapshot()
    entries = registry.read(State(fresh.root))
    function(fresh)
    if only_deep:
        assert _found(fresh) == []
    found = _found(fresh, deep=True)
    assert kind in {finding.kind for finding in found}, found
    assert all(finding.line().isprintable() for finding in found)
    if not only_deep and kind != "leftover" and damage != "a mode in the layer":
        # The tenants' ids are the same again, whatever was lost.
        shutil.rmtree(os.environ["ISOCHAMBER_RUN"] + "/whole", ignore_errors=True)  # as after a boot
        server.do("configure", fresh)
        assert {tid: each["uid_base"] for tid, each in registry.read(State(fresh.root)).items()} == {
            tid: each["uid_base"] for tid, each in entries.items()
        }
    fsck.repair(State(fresh.root), _found(fresh, deep=True))
    server.do("configure", fresh)
    assert _found(fresh, deep=True) == []
    assert fresh.snapshot() == before
    (fresh.root / "containers.json.damaged").unlink(missing_ok=True)


def test_a_namespace_that_is_lost_with_its_copy_is_never_replaced_while_there_are_tenants(
    server: Server, fresh: World
) -> None:
    for name in ("namespace", "namespace.copy"):
        (fresh.root / name).unlink()
    (finding,) = _found(fresh)
    assert not finding.repairable
    answer = server.ask("base", fresh)
    assert answer["status"] == 125
    assert "namespace" in answer["stderr"]
    assert len(list((fresh.root / "tenants_persist").iterdir())) == 2


@pytest.mark.parametrize("kind", ["user", "net"])
def test_a_namespace_that_is_not_pinned_whole_is_named_unpinned_and_pinned_by_the_next_start(
    fresh: World, kind: str
) -> None:
    argv = command.argv("run", "--root", str(fresh.root), "sensor")
    tid = str(_entry(fresh)["tid"])

    def start() -> None:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stdout) == (0, "here\n"), done
        assert eventually(lambda: not records.held(tid))

    try:
        start()
        assert _found(fresh) == []
        syscalls.umount2(paths.namespace_pin(tid, kind), syscalls.MNT_DETACH)  # an empty file stays, as after a cut
        (finding,) = _found(fresh)
        assert f"its {kind} namespace is not pinned" in finding.problem
        fsck.repair(State(fresh.root), [finding])
        assert _found(fresh) == []
        start()
        Path(paths.namespace_pin(tid, "map")).write_text("")
        (finding,) = _found(fresh)
        assert "were cut while they were made" in finding.problem
        start()
        assert _found(fresh) == [], "the next start does it too"
    finally:
        pins.remove(tid)


def test_what_is_being_made_is_no_leftover_and_is_not_cleaned_up(fresh: World) -> None:
    from isochamber.build import durable, recover

    state = State(fresh.root)
    with durable.staging_directory(state.staging, "held") as stage:
        assert _found(fresh) == []
        recover.clean(state)
        assert stage.is_dir()
    (state.staging / ".tmp-left").mkdir()
    assert [finding.kind for finding in _found(fresh)] == ["leftover"]
    recover.clean(state)
    assert list(state.staging.iterdir()) == []


def test_rollback_goes_back_to_the_former_layers_and_upper_and_forth_again(server: Server, fresh: World) -> None:
    state = State(fresh.root)
    before = _entry(fresh)
    (_of(fresh, "upper") / "etc").mkdir()
    (_of(fresh, "upper") / "etc/mine").write_text("of the former version\n")
    (_of(fresh, "home") / "kept").write_text("stays\n")
    server.do("changed", fresh)
    changed = _entry(fresh)
    assert changed["lowers"] != before["lowers"]
    assert list(_of(fresh, "upper").iterdir()) == [], "a fresh upper"
    assert entry.rollback(state, "sensor") == before
    assert _entry(fresh) == before
    assert (_of(fresh, "upper") / "etc/mine").read_text() == "of the former version\n"
    assert (_of(fresh, "home") / "kept").read_text() == "stays\n"
    assert _found(fresh, deep=True) == []
    assert entry.rollback(state, "sensor") == changed
    entry.rollback(state, "sensor")
    server.do("configure", fresh)  # what the package says
    assert _entry(fresh)["lowers"] == changed["lowers"]
    assert _found(fresh, deep=True) == []


def test_a_first_configure_that_was_cut_before_its_entry_does_not_stand_in_the_way_of_other_layers(
    server: Server, fresh: World
) -> None:
    """The upper's lowers were written, the entry was not, and then the package changed: the second slot is new."""
    tid = str(_entry(fresh)["tid"])
    (fresh.root / "containers.json").unlink()
    (fresh.root / "tenants_fs" / tid / "former.json").unlink(missing_ok=True)
    fresh.change(7)
    server.do("configure", fresh)
    assert str(_entry(fresh)["upper"]).endswith(".b")
    assert _of(fresh, "upper").is_dir()
    assert not _found(fresh, deep=True)


def test_fsck_speaks_json_and_its_exit_code_tells(server: Server, fresh: World) -> None:
    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        argv = [sys.executable, "-m", "isochamber", "--file", str(fresh.file), "--root", str(fresh.root), *words]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)

    clean = run("fsck", "--json")
    assert clean.returncode == 0, clean.stderr
    assert json.loads(clean.stdout) == {"clean": True, "findings": []}
    os.truncate(_product(fresh, "layers") / "rootfs/etc/made", 0)
    broken = run("fsck")
    assert broken.returncode == 1
    assert broken.stdout.startswith("layer ")
    repaired = run("fsck", "--deep", "--repair", "--json")
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    assert [finding["repaired"] for finding in json.loads(repaired.stdout)["findings"]][:1] == [True]
    assert _product(fresh, "layers").is_dir(), "it was built again at once"
