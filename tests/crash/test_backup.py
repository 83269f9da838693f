"""A backup is consistent and whole; what is restored is what was saved; and an archive may hold anything, in vain."""

import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from isochamber.build import backup, manifest, registry, restore
from isochamber.build.state import State
from isochamber.errors import IsochamberError
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


# Forged archives: the meta data and members that somebody else writes.

Member = tuple[tarfile.TarInfo, bytes]


def _member(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **more: Any) -> Member:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.mode = kind, len(content), 0o644
    for key, value in more.items():
        setattr(member, key, value)
    return member, content


def _forge(file: Path, members: list[Member], **meta: Any) -> None:
    wanted = {"format": 1, "name": "sensor", "size": 1 << 20, "names": 100, **meta}
    begin = [_member("isochamber.json", content=json.dumps(wanted).encode()), _member("home", tarfile.DIRTYPE)]
    with (
        zstandard.ZstdCompressor().stream_writer(file.open("wb")) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for member, content in [*begin, *members]:
            archive.addfile(member, io.BytesIO(content))


_D, _S, _L = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
HOSTILE: dict[str, list[Member]] = {
    "dot dot": [_member("home/../../escaped", content=b"x")],
    "absolute": [_member("/escaped", content=b"x")],
    "through a symlink": [_member("home/out", _S, linkname="{outside}"), _member("home/out/escaped", content=b"x")],
    "over a symlink": [_member("home/out", _S, linkname="{outside}/escaped"), _member("home/out", content=b"x")],
    "a hard link out": [_member("home/h", _L, linkname="../../../../etc/passwd")],
    "a hard link through a symlink": [
        _member("home/out", _S, linkname="{outside}"), _member("home/h", _L, linkname="home/out/secret"),
    ],
    "a hard link to a symlink": [
        _member("home/out", _S, linkname="{outside}/secret"), _member("home/h", _L, linkname="home/out"),
    ],
    "a device": [_member("home/null", tarfile.CHRTYPE, devmajor=1, devminor=3)],
    "the host's ids": [_member("home/f", content=b"x", uid=70000)],
    "a negative id": [_member("home/f", content=b"x", uid=-1)],
    "a trusted attribute": [
        _member("home/f", content=b"x", pax_headers={backup.XATTRS: '{"trusted.overlay.opaque": "eQ=="}'})
    ],
    "an attribute that is none": [_member("home/f", content=b"x", pax_headers={backup.XATTRS: "[[[["})],
    "more than it says": [_member("home/f", content=b"x" * (2 << 20))],
    "more names than it says": [_member(f"home/{number}", _D) for number in range(101)],
    "too deep": [_member("home/" + "/".join(["d"] * count), _D) for count in range(1, 300)],
    "an endless file": [_member("home/f", content=b"5\n", pax_headers={
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "home/f",
        "GNU.sparse.realsize": str(1 << 62),
    })],
    "a name beside": [_member("beside/name", content=b"another")],
    "a path beside": [_member("beside/../x", content=b"x")],
    "nothing of ours": [_member("etc/passwd", content=b"x")],
    "no list": [],
    "a wrong list": [_member("home/f", content=b"x"), _member("files.list", content=b"")],
    "more after the list": [_member("files.list", content=b""), _member("home/f", content=b"x")],
}  # fmt: skip


@pytest.mark.parametrize("attempt", HOSTILE)
def test_a_forged_archive_reaches_nothing_and_changes_nothing(elsewhere: State, tmp_path: Path, attempt: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    file = tmp_path / "forged"
    members = [(_with_outside(member, outside), content) for member, content in HOSTILE[attempt]]
    _forge(file, members, names=1000 if attempt == "too deep" else 100)
    with pytest.raises(IsochamberError) as caught:
        restore.restore(elsewhere, file)
    assert caught.value.line().isprintable()
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").stat().st_nlink == 1
    assert not list(elsewhere.root.rglob("escaped"))
    assert list((elsewhere.root / "tenants_persist").iterdir()) == []
    assert list(elsewhere.staging.iterdir()) == []


def _with_outside(member: tarfile.TarInfo, outside: Path) -> tarfile.TarInfo:
    copied = tarfile.TarInfo(member.name)
    for key in ("type", "size", "mode", "uid", "gid", "devmajor", "devminor", "pax_headers"):
        setattr(copied, key, getattr(member, key))
    copied.linkname = member.linkname.replace("{outside}", str(outside))
    return copied


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
        _member("home/d", _D, mode=0o755),
        _member("home/d/f", content=b"x"),
        _member("files.list", content=lines),
    ]
    _forge(file, members)
    assert restore.restore(elsewhere, file) == "sensor"
    assert (elsewhere.tenant_persist(elsewhere.tid("sensor")) / "home/d/f").read_text() == "x"


@pytest.mark.parametrize("name", ["../escaped", "", "a/b", "A", "x" * 65, 7, None])
def test_a_name_in_an_archive_is_checked_as_a_tenants(elsewhere: State, tmp_path: Path, name: object) -> None:
    _forge(tmp_path / "forged", [_member("files.list", content=b"")], name=name)
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
