"""A backup is consistent and whole; what is restored is what was saved; and an archive may hold anything, in vain."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from isochamber.build import backup, manifest, registry, restore
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from tests.crash import forged
from tests.crash.world import World


@pytest.fixture
def home(fresh: World) -> Path:
    """The tenant's /home, with everything in it that a tenant can make."""
    found = next(each for each in registry.read(State(fresh.root)).values() if each["name"] == "sensor")
    path = fresh.root / str(found["home"])
    (path / "file").write_bytes(b"content" * 1000)
    os.chown(path / "file", 1000, 1000)
    (path / "file").chmod(0o4755)
    os.setxattr(path / "file", "user.note", b"\x00\xffbytes")
    os.link(path / "file", path / "again")
    (path / "link").symlink_to("/etc/shadow")
    (path / "up").symlink_to("../../../..")
    os.mkfifo(path / "fifo", 0o600)
    with (path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 30)
        file.write(b"in the middle")
    (path / os.fsdecode(b"not \xff utf-8\n")).write_text("odd\n")
    (path / ("x" * 255)).mkdir()
    deep = path
    for number in range(200):
        deep = deep / f"d{number}"
        deep.mkdir()
    (deep / "bottom").write_text("bottom\n")
    os.utime(path / "file", (10, 20))
    return path


@pytest.fixture
def saved(fresh: World, home: Path) -> Path:
    file = fresh.directory / "backups/saved"
    backup.backup(State(fresh.root), "sensor", file)
    return file


@pytest.fixture
def elsewhere(crash_directory: Path) -> Iterator[State]:
    """A state directory of another machine, so to speak: another namespace, other ids."""
    root = crash_directory / "elsewhere"
    yield State(root)
    shutil.rmtree(root)


def test_what_is_restored_elsewhere_is_what_was_saved_under_another_tid_and_range(
    home: Path, saved: Path, fresh: World, elsewhere: State
) -> None:
    assert saved.stat().st_size < 1 << 20, "the holes were written"
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    assert restore.restore(elsewhere, saved) == "sensor"
    tid = elsewhere.tid("sensor")
    assert tid != State(fresh.root).tid("sensor")
    restored = elsewhere.tenant_persist(tid) / "home"
    assert manifest.describe(restored, holes=True) == manifest.describe(home, holes=True)
    assert os.getxattr(restored / "file", "user.note") == b"\x00\xffbytes"
    assert (restored / "file").stat().st_ino == (restored / "again").stat().st_ino
    assert (restored / "file").stat().st_mtime == 20
    assert (restored / "sparse").stat().st_blocks < 1000
    assert (elsewhere.tenant_persist(tid) / "home.manifest.json").is_file()
    assert (elsewhere.tenant_persist(tid) / "name").read_text() == "sensor\n"
    assert list(elsewhere.staging.iterdir()) == []


def test_a_home_that_holds_something_is_replaced_only_when_told_and_in_one_step(
    home: Path, saved: Path, fresh: World
) -> None:
    state = State(fresh.root)
    (home / "later").write_text("made after the backup\n")
    with pytest.raises(IsochamberError, match="holds something"):
        restore.restore(state, saved)
    assert (home / "later").exists()
    restore.restore(state, saved, replace=True)
    assert not (home / "later").exists()
    assert (home / "file").exists()
    assert restore.restore(state, saved, name="another") == "another"


def test_what_can_not_be_saved_is_named(fresh: World, home: Path) -> None:
    deep = home / "too"
    deep.mkdir()
    descriptor = os.open(deep, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    done = backup.backup(State(fresh.root), "sensor", fresh.directory / "backups/saved")
    assert any("deeper than" in phrase for phrase in done.left_out)
    assert list((fresh.root / "staging").iterdir()) == []


@pytest.mark.parametrize("part", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_file_that_was_cut_or_changed_is_refused_and_changes_nothing(
    saved: Path, elsewhere: State, part: float
) -> None:
    content = bytearray(saved.read_bytes())
    position = int(len(content) * part)
    for damaged in (
        bytes(content[:position]),
        bytes(content[:position] + bytes([content[position] ^ 8]) + content[position + 1 :]),
    ):
        saved.write_bytes(damaged)
        with pytest.raises(IsochamberError, match="is damaged") as caught:
            restore.restore(elsewhere, saved)
        assert caught.value.line().isprintable()
        assert list((elsewhere.root / "tenants_persist").iterdir()) == []
        assert list(elsewhere.staging.iterdir()) == []


# Forged archives.


@pytest.mark.parametrize("attempt", forged.HOSTILE)
def test_a_forged_archive_reaches_nothing_and_changes_nothing(elsewhere: State, tmp_path: Path, attempt: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    file = tmp_path / "forged"
    forged.forge(file, forged.members(attempt, outside), names=1000 if attempt == "too deep" else 100)
    with pytest.raises(IsochamberError) as caught:
        restore.restore(elsewhere, file)
    assert caught.value.line().isprintable()
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").stat().st_nlink == 1
    assert not list(elsewhere.root.rglob("escaped"))
    assert list((elsewhere.root / "tenants_persist").iterdir()) == []
    assert list(elsewhere.staging.iterdir()) == []


def test_the_same_archive_without_the_forgery_is_taken(elsewhere: State, tmp_path: Path) -> None:
    file = tmp_path / "plain"
    status = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644
    lines = b"".join(
        json.dumps(fields, separators=(",", ":")).encode() + b"\n"
        for fields in (
            ["d", status[0], 0, 0, 0, ""],
            ["d/f", status[1], 0, 0, 1, hashlib.sha256(bytes(8) + b"x").hexdigest()],
        )
    )
    members = [
        forged.member_of("home/d", tarfile.DIRTYPE, mode=0o755),
        forged.member_of("home/d/f", content=b"x"),
        forged.member_of("files.list", content=lines),
    ]
    forged.forge(file, members)
    assert restore.restore(elsewhere, file) == "sensor"
    assert (elsewhere.tenant_persist(elsewhere.tid("sensor")) / "home/d/f").read_text() == "x"


@pytest.mark.parametrize("name", ["../escaped", "", "a/b", "A", "x" * 65, 7, None])
def test_a_name_in_an_archive_is_checked_as_a_tenants(elsewhere: State, tmp_path: Path, name: object) -> None:
    forged.forge(tmp_path / "forged", [forged.member_of("files.list", content=b"")], name=name)
    with pytest.raises(IsochamberError):
        restore.restore(elsewhere, tmp_path / "forged")
    assert list((elsewhere.root / "tenants_persist").iterdir()) == []


def test_the_commands_say_what_they_did(saved: Path, fresh: World) -> None:
    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        argv = [sys.executable, "-m", "isochamber", "--root", str(fresh.root), *words]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)

    again = run("backup", "sensor", str(fresh.directory / "backups/again"))
    assert again.returncode == 0, again.stderr
    assert "names" in again.stdout
    restored = run("restore", "--name", "other", str(saved))
    assert restored.returncode == 0, restored.stderr
    assert State(fresh.root).tid("other") in restored.stdout
    assert run("backup", "nobody", str(saved)).returncode == 125
