"""A tenant with a disk of its own: what damage is called and what mends it, and what a restart of the machine does."""

import fcntl
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from isochamber.build import backup, disk, durable, entry, fsck, gc, registry
from isochamber.build import restore as restoring
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import disk as mounting
from tests.build.products import eventually
from tests.crash.client import Server
from tests.crash.world import World

KEPT = "stays\n"


@pytest.fixture
def given(worlds: dict[str, World], crash_directory: Path) -> Iterator[World]:
    """A world in which sensor has a disk, and something of its own on it."""
    if "disk save" not in worlds:
        pytest.skip("this machine has no loop devices")
    world = worlds["disk save"].copy(crash_directory / "with a disk")
    world.attach()
    (_home(world) / "kept").write_text(KEPT)
    yield world
    world.remove()


def _tid(world: World) -> str:
    return State(world.root).tid("sensor")


def _home(world: World) -> Path:
    return State(world.root).home(_tid(world))


def _image(world: World) -> Path:
    return disk.image(State(world.root), _tid(world))


def _found(world: World) -> list[fsck.Finding]:
    return fsck.check(State(world.root), deep=True)


def _zero(path: Path, length: int) -> None:
    with path.open("r+b") as file:
        file.write(bytes(length))


# What is damaged, whether the next ./doit mends it without fsck, and whether what the tenant wrote is there again.
DAMAGES: dict[str, tuple[Callable[[World], object], bool, bool]] = {
    "it is missing": (lambda world: _image(world).unlink(), True, False),
    "it is shorter than its file system": (lambda world: os.truncate(_image(world), (16 << 20) - 65536), False, True),
    "its superblock is lost": (lambda world: _zero(_image(world), 2048), False, True),
    "it is empty": (lambda world: os.truncate(_image(world), 0), False, False),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_disk_is_named_and_mended_or_the_tenant_is_deleted_and_its_backup_restored(
    server: Server, given: World, damage: str
) -> None:
    function, doit_mends, survives = DAMAGES[damage]
    state = State(given.root)
    server.do("save", given)
    before = given.snapshot()
    assert _found(given) == []
    given.detach()
    function(given)
    (finding,) = _found(given)
    assert str(_image(given).relative_to(given.root)) in finding.problem
    answer = server.ask("configure", given)
    assert (answer["status"] == 0) == doit_mends, answer
    assert len(answer["stderr"].splitlines()) == (0 if doit_mends else 1), answer
    if not doit_mends:
        assert [each.kind for each in _found(given)] == ["tenant"], "it is still named"
    try:
        fsck.repair(state, _found(given))
    except IsochamberError as error:
        assert damage == "it is empty"
        assert error.hint is not None
        assert "restore a backup" in error.hint
        gc.delete(state, "sensor", given.pipeline().reporter)
    server.do("configure", given)
    assert _found(given) == []
    assert (_home(given) / "kept").exists() == survives
    if not survives:
        server.do("restore", given)
        server.do("configure", given)
    assert (_home(given) / "kept").read_text() == KEPT
    now = given.snapshot()
    assert {name: now[name] for name in now if not name.endswith("/lost+found")} == before  # e2fsck makes it again


def test_errors_that_the_kernel_has_noted_are_named_and_mended(server: Server, given: World) -> None:
    given.detach()
    subprocess.run(["debugfs", "-w", "-R", "set_super_value state 2", _image(given)], check=True, capture_output=True)
    (finding,) = _found(given)
    assert "errors" in finding.problem
    fsck.repair(State(given.root), [finding])
    assert _found(given) == []
    assert (_home(given) / "kept").read_text() == KEPT


def test_after_a_restart_of_the_machine_backup_rollback_and_prune_find_what_is_on_the_disk(
    server: Server, given: World
) -> None:
    state = State(given.root)
    server.do("changed", given)
    former = entry.former_of(state, _tid(given))
    assert former is not None
    given.detach()
    server.do("prune", given)
    given.detach()
    assert _found(given) == [], "and fsck too"
    given.detach()
    server.do("save", given)
    given.detach()
    assert entry.rollback(state, "sensor") == former
    assert (_home(given) / "kept").read_text() == KEPT
    assert _found(given) == []


def test_a_backup_is_restored_onto_the_disk_in_one_step_and_the_rest_of_the_disk_stays(
    server: Server, given: World
) -> None:
    state = State(given.root)
    server.do("save", given)
    (state.home(_tid(given)) / "kept").write_text("other\n")
    (state.home(_tid(given)) / "later").write_text("later\n")
    upper = given.root / registry.read(state)[_tid(given)]["upper"]
    (upper / "mine").write_text("upper\n")
    with pytest.raises(IsochamberError, match="holds something"):
        restoring.restore(state, given.backups / "sensor")
    server.do("restore", given)
    assert (_home(given) / "kept").read_text() == KEPT
    assert not (_home(given) / "later").exists()
    assert (upper / "mine").read_text() == "upper\n"
    assert mounting.is_mounted(str(state.tenant_fs(_tid(given))))
    server.do("configure", given)
    assert _found(given) == []


def test_what_does_not_fit_on_the_disk_is_not_restored_and_nothing_is_changed(server: Server, given: World) -> None:
    state = State(given.root)
    home = state.home(state.tid("plain"))
    (home / "large").write_bytes(os.urandom(20 << 20))
    backup.backup(state, "plain", given.backups / "plain")
    before = given.snapshot()
    with pytest.raises(IsochamberError, match="exited with"):
        restoring.restore(state, given.backups / "plain", name="sensor", replace=True)
    assert given.snapshot() == before
    assert given.leftovers() == []


def test_a_backup_has_no_image_in_it_and_one_that_somebody_put_there_is_not_taken(given: World) -> None:
    """A small one is as small as what else lies beside /home, and nothing checks what is in a file system."""
    state, file = State(given.root), given.backups / "sensor"
    backup.backup(state, "sensor", file)
    plain = zstandard.ZstdDecompressor().decompressobj().decompress(file.read_bytes())
    forged = given.directory / "forged"
    (given.directory / "plain.tar").write_bytes(plain)
    with (
        tarfile.open(given.directory / "plain.tar") as old,
        tarfile.open(forged, "w", format=tarfile.PAX_FORMAT) as new,
    ):
        members = old.getmembers()
        assert not [member.name for member in members if "disk.img" in member.name]
        for member in members:
            if member.name == backup.LISTING:
                with _image(given).open("rb") as image:
                    more = tarfile.TarInfo(f"{backup.BESIDE}/disk.img")
                    more.size = 1 << 20
                    new.addfile(more, image)
            new.addfile(member, old.extractfile(member) if member.isreg() else None)
    file.write_bytes(zstandard.ZstdCompressor().compress(forged.read_bytes()))
    restoring.restore(state, file, name="plain", replace=True)
    assert not disk.image(state, state.tid("plain")).exists()
    assert (state.home(state.tid("plain")) / "kept").read_text() == KEPT


def test_a_tenant_that_was_given_a_disk_starts_only_when_it_is_configured_for_it(given: World) -> None:
    """What it wrote beside the disk would be removed with what was copied onto it: here a cut came before the entry."""
    state = State(given.root)
    registry.put(state, {**registry.read(state)[_tid(given)], "disk": None})
    argv = [sys.executable, "-m", "isochamber", "--root", str(given.root), "run", "sensor"]
    for mounted in (True, False):
        if not mounted:
            given.detach()
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 125, done
        assert "run ./doit" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    (finding,) = _found(given)
    assert "its entry says nothing of it" in finding.problem
    fsck.repair(state, [finding])
    given.pipeline().configure("sensor")
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done
    assert _found(given) == []


def test_a_deletion_that_was_cut_between_its_directories_stands_in_the_way_of_no_doit(
    server: Server, given: World
) -> None:
    state = State(given.root)
    registry.remove(state, _tid(given))
    given.detach()
    durable.remove_tree(state.tenant_fs(_tid(given)), state.staging)  # and not yet where the image is
    server.do("configure", given)
    assert (_home(given) / "kept").read_text() == KEPT
    assert _found(given) == []


def test_what_lies_beside_a_disk_is_removed_while_nobody_else_can_mount_it(given: World) -> None:
    """Else a start could mount it in between, and what is on it would be removed."""
    given.detach()
    refused: list[bool] = []

    def before() -> None:
        with _image(given).open("rb") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        refused.append(not mounting.is_mounted(str(State(given.root).tenant_fs(_tid(given)))))

    mounting.attach(str(given.root), _tid(given), before)
    assert refused == [True]
    mounting.attach(str(given.root), _tid(given), before)
    assert refused == [True], "it is mounted: nothing lies beside it"


def test_a_restore_waits_for_the_copies_that_mount_namespaces_of_others_have_of_the_disk(
    server: Server, given: World
) -> None:
    server.do("save", given)
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo ready; read end"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        failed: list[BaseException] = []

        def restore() -> None:
            try:
                restoring.restore(State(given.root), given.backups / "sensor", replace=True)
            except IsochamberError as error:
                failed.append(error)

        restoring_one = threading.Thread(target=restore)
        restoring_one.start()
        assert eventually(lambda: not mounting.is_mounted(str(State(given.root).tenant_fs(_tid(given)))))
        other.stdin.close()
        restoring_one.join()
    assert failed == []
    assert _found(given) == []
