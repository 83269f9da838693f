"""A full disk, no inodes left, a disk that turns read-only: one line, the state as before, on when there is room."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from isochamber.build import durable, fsck, gc, registry, space
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from tests.crash.client import Server
from tests.crash.world import World

STEPS = ("layer", "home", "configure", "save", "changed", "rollback", "restore", "prune", "delete")


@contextlib.contextmanager
def small_disk(directory: Path, *options: str, size: str = "512M", mount: str = "loop") -> Iterator[Path]:
    """Mount a small ext4 of its own; skipped where there are no loop devices."""
    image, target = directory / "disk.img", directory / "disk"
    target.mkdir()
    subprocess.run(["truncate", "-s", size, image], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", *options, image], check=True)
    done = subprocess.run(["mount", "-o", mount, image, target], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop devices here: {done.stderr.strip()}")
    try:
        yield target
    finally:
        subprocess.run(["umount", target], check=True)
        image.unlink()
        target.rmdir()


@pytest.fixture
def built(worlds: dict[str, World], crash_directory: Path) -> Iterator[World]:
    """A world with a base, on a disk of 512 MB."""
    with small_disk(crash_directory) as disk:
        yield worlds["layer"].copy(disk / "world")


def _ballast(root: Path, left: int) -> Path:
    """Fill the disk but for ``left`` bytes, to the last block when it is 0."""
    file = root.parent / "ballast"  # not in the state directory: prune would take it
    wanted = max(space.free(root)[0] - max(left, 256 << 10), 0)  # the file system wants some blocks for the map
    with file.open("wb", buffering=0) as opened:
        if wanted:
            os.posix_fallocate(opened.fileno(), 0, wanted)
        opened.seek(0, os.SEEK_END)
        with contextlib.suppress(OSError):
            while left == 0 and opened.write(b"x" * 1024):
                pass
    return file


def _as_before(world: World, before: dict[str, str]) -> list[str]:
    now = world.snapshot()
    # A step may have got some of the way: each product is there whole, or not at all.
    return [name for name in before if now.get(name) != before[name] and "home.manifest.json" not in name]


def test_a_build_that_can_not_fit_is_refused_with_the_bytes_it_needs(server: Server, built: World) -> None:
    shutil.rmtree(built.root / "base_fs")
    _ballast(built.root, 8 << 20)
    answer = server.ask("base", built)
    assert answer["status"] == 125
    assert f"needs {(300 << 20) + space.MARGIN_BYTES} bytes, " in answer["stderr"]
    assert "(ENOSPC)" in answer["stderr"]
    assert len(answer["stderr"].splitlines()) == 1
    assert list((built.root / "staging").iterdir()) == []


@pytest.mark.parametrize("left", [0, 64 << 10, 512 << 10, 3 << 20])
def test_a_disk_that_is_full_stops_every_step_with_one_line_and_all_goes_on_when_there_is_room(
    server: Server, built: World, wanted: dict[str, dict[str, str]], left: int
) -> None:
    for case in STEPS:
        step = "configure" if case == "changed" else case
        if case == "changed":
            built.change()
        before = built.snapshot()
        ballast = _ballast(built.root, left)
        answer = server.ask(step, built)
        assert answer["status"] in (0, 125), answer
        assert len(answer["stderr"].splitlines()) == (1 if answer["status"] else 0), answer
        assert _as_before(built, before) == [] or answer["status"] == 0
        ballast.unlink()
        server.do(step, built)
        assert built.leftovers() == []
        assert fsck.check(State(built.root), deep=True) == []
        if case in ("layer", "home", "configure"):
            assert built.snapshot() == wanted[case], case


def test_without_inodes_it_is_the_same(
    server: Server, worlds: dict[str, World], crash_directory: Path, wanted: dict[str, dict[str, str]]
) -> None:
    with small_disk(crash_directory, "-N", "1200", size="64M") as disk:
        world = worlds["layer"].copy(disk / "world")
        for step in ("layer", "configure"):
            before = world.snapshot()
            filler = world.root / "cache/filler"
            filler.mkdir(parents=True)
            made = 0
            try:
                while True:
                    (filler / str(made)).touch()
                    made += 1
            except OSError:
                assert made
            answer = server.ask(step, world)
            assert answer["status"] == 125, answer
            assert len(answer["stderr"].splitlines()) == 1
            assert _as_before(world, before) == []
            shutil.rmtree(filler)
            server.do("layer" if step == "layer" else "configure", world)
        assert world.snapshot() == wanted["configure"]
        assert world.leftovers() == []


def test_a_file_system_that_turns_read_only_is_one_line_a_step(
    server: Server, built: World, wanted: dict[str, dict[str, str]]
) -> None:
    disk = built.directory.parent
    for case in STEPS:
        step = "configure" if case == "changed" else case
        if case == "changed":
            built.change()
        before = built.snapshot()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        try:
            answer = server.ask(step, built)
        finally:
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        assert answer["status"] == 125, answer
        assert "(EROFS)" in answer["stderr"]
        assert len(answer["stderr"].splitlines()) == 1
        assert built.snapshot() == before
        server.do(step, built)
        if case in ("layer", "home", "configure"):
            assert built.snapshot() == wanted[case], case
        assert case in ("layer", "home") or fsck.check(State(built.root), deep=True) == []
    assert built.leftovers() == []


def test_the_reserve_is_given_up_for_an_entry_and_made_again_when_there_is_room(server: Server, built: World) -> None:
    for step in ("layer", "home", "configure"):
        server.do(step, built)
    state = State(built.root)
    assert (built.root / durable.RESERVE).stat().st_blocks * 512 >= durable.RESERVE_BYTES
    ballast = _ballast(built.root, 0)
    found = dict(next(iter(registry.read(state).values())))
    registry.put(state, {**found, "cname": "x" * 8192})
    assert registry.read(state)[found["tid"]]["cname"] == "x" * 8192
    assert not (built.root / durable.RESERVE).exists()
    ballast.unlink()
    state.create()
    assert (built.root / durable.RESERVE).exists()


def test_prune_until_free_removes_no_more_than_it_takes_and_orphans_last(server: Server, built: World) -> None:
    for step in ("layer", "home", "configure"):
        server.do(step, built)
    server.do("changed", built)
    pipeline = built.pipeline()
    state = pipeline.state
    (state.root / "cache/debs").mkdir(parents=True, exist_ok=True)
    (state.root / "cache/debs/big").write_bytes(b"x" * (1 << 20))
    free = space.free(state.root)[0]
    removed = gc.prune(state, pipeline.spec, pipeline.reporter, until_free=free + (1 << 19))
    assert {kind for kind, _, _ in removed} == {"cache"}
    removed = gc.prune(state, pipeline.spec, pipeline.reporter, until_free=1 << 60)
    assert [kind for kind, _, _ in removed if kind.startswith("former")]
    assert {each["name"] for each in registry.read(state).values()} == {"sensor", "plain"}
    assert fsck.check(state, deep=True) == []
    with pytest.raises(IsochamberError, match="nothing is left"):
        from isochamber.tasks import graph

        graph.prune(pipeline, until_free=1 << 60)
    assert json.loads((state.root / "containers.json").read_text())
