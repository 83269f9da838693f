"""Writes of state: the former or the new, never a part; and nothing left behind by what failed."""

import fcntl
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from isochamber.build import durable, tree


def test_a_file_is_replaced_whole_with_the_asked_mode_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "file"
    former = os.umask(0o777)
    try:
        for content in (b"one", b"", b"x" * 3_000_000):
            durable.write_file(path, content, mode=0o640)
            assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (content, 0o640)
    finally:
        os.umask(former)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_link_in_its_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("untouched")
    (tmp_path / "file").symlink_to("secret")
    durable.write_file(tmp_path / "file", b"new")
    assert (tmp_path / "secret").read_text() == "untouched"
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()


def test_exclusive_leaves_what_is_there(tmp_path: Path) -> None:
    durable.write_file(tmp_path / "file", b"first", exclusive=True)
    durable.write_file(tmp_path / "file", b"second", exclusive=True)
    assert (tmp_path / "file").read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("call", ["fsync", "fchmod", "open"])
def test_a_write_that_fails_leaves_the_former_and_no_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    durable.write_file(path, b"former")

    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left"):
            durable.write_file(path, b"new")
    assert path.read_bytes() == b"former"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_tree_is_published_only_under_a_name_that_is_free(tmp_path: Path) -> None:
    with durable.staging_directory(tmp_path, "label") as stage:
        (stage / "content").write_text("x")
        durable.commit_tree(stage, tmp_path / "product")
    assert (tmp_path / "product/content").read_text() == "x"
    with pytest.raises(OSError), durable.staging_directory(tmp_path, "label") as stage:
        durable.commit_tree(stage, tmp_path / "product")
    assert (tmp_path / "product/content").read_text() == "x"
    assert [entry.name for entry in tmp_path.iterdir()] == ["product"]


def test_a_stage_is_its_owners_alone_and_goes_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), durable.staging_directory(tmp_path, "label") as stage:
        assert stat.S_IMODE(stage.stat().st_mode) == 0o700
        (stage / "below").mkdir()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_removing_renames_first_so_that_no_half_keeps_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "product/below").mkdir(parents=True)

    def cut(_root: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tree, "remove_contents", cut)
        with pytest.raises(KeyboardInterrupt):
            durable.remove_tree(tmp_path / "product")
    assert not (tmp_path / "product").exists()
    (left,) = durable.stale_stages(tmp_path)
    durable.remove_tree(tmp_path / left)
    assert list(tmp_path.iterdir()) == []
    durable.remove_tree(tmp_path / "product")  # nothing there is fine


def test_a_deep_tree_is_removed_on_btrfs_where_a_directory_is_listed_as_it_was_opened(tmp_path: Path) -> None:
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("mkfs.btrfs is missing: apt-get install btrfs-progs")
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["truncate", "-s", "128M", image], check=True)
    subprocess.run(["mkfs.btrfs", "-q", image], check=True, capture_output=True)
    done = subprocess.run(["mount", "-o", "loop", image, disk], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no btrfs, or no loop devices here: {done.stderr.strip()}")
    try:
        (disk / "tree/a/b/c/d/e").mkdir(parents=True)
        durable.remove_tree(disk / "tree")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_stage_that_gets_its_name_while_somebody_looks_whether_it_is_stale_is_not_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, product = tmp_path / f"{durable.STAGE_PREFIX}made", tmp_path / "product"
    stage.mkdir()
    (stage / "file").touch()
    lock = fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        if stage.exists():
            stage.rename(product)  # by its maker, who then ends
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert durable.remove_stale_stages(tmp_path) == ()
    assert (product / "file").exists()
