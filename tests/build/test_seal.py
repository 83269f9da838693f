"""Sealing: whatever an upper holds, a layer holds only what any tenant may stand on."""

import os
import socket
import stat
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isochamber.build import manifest, seal, staged
from isochamber.build.ranges import UID_COUNT
from isochamber.errors import IsochamberError
from tests.build.products import UID_BASE, capability, owners

ROOT = UID_BASE  # the tenant's root, as the host sees it
ACL_VERSION = struct.pack("<I", 2)


@pytest.fixture
def upper(scratch: Path) -> Path:
    """An upper as an overlay leaves it, on a file system that takes trusted attributes."""
    path = scratch / f"upper-{os.urandom(4).hex()}"
    path.mkdir()
    os.chown(path, ROOT, ROOT)
    return path


def run(upper: Path) -> tuple[str, ...]:
    descriptor = os.open(upper, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return seal.seal(descriptor, UID_BASE)
    finally:
        os.close(descriptor)


def file(path: Path, *, mode: int = 0o644, uid: int = ROOT, gid: int = ROOT, text: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.chown(path, uid, gid)
    path.chmod(mode)
    return path


def test_owners_become_0_based_and_setuid_and_setgid_bits_stay(upper: Path) -> None:
    plain = file(upper / "plain", uid=ROOT + 33, gid=ROOT + 4)
    setuid = file(upper / "bin/su", mode=0o4755)
    setgid = file(upper / "bin/wall", mode=0o2755, gid=ROOT + 5)
    (upper / "link").symlink_to("/etc/shadow")
    os.lchown(upper / "link", ROOT + 1, ROOT + 1)
    sticky = upper / "spool"
    sticky.mkdir()
    os.chown(sticky, ROOT + 8, ROOT + 8)
    sticky.chmod(0o3777)
    assert run(upper) == ()
    assert owners(plain) == (33, 4)
    assert (owners(setuid), stat.S_IMODE(setuid.stat().st_mode)) == ((0, 0), 0o4755)
    assert (owners(setgid), stat.S_IMODE(setgid.stat().st_mode)) == ((0, 5), 0o2755)
    assert owners(upper / "link") == (1, 1)
    assert (owners(sticky), stat.S_IMODE(sticky.stat().st_mode)) == ((8, 8), 0o3777)
    assert (owners(upper), stat.S_IMODE(upper.stat().st_mode)) == ((0, 0), 0o755)


def test_a_file_with_two_names_is_unshifted_once(upper: Path) -> None:
    first = file(upper / "a", mode=0o4711, uid=ROOT + 7)
    os.link(first, upper / "b")
    run(upper)
    assert owners(upper / "b") == (7, 0)
    assert stat.S_IMODE(first.stat().st_mode) == 0o4711
    assert first.stat().st_nlink == 2


def test_a_file_capability_of_the_tenants_namespace_becomes_one_of_the_layer(upper: Path) -> None:
    ping = file(upper / "ping", mode=0o755)
    os.setxattr(ping, "security.capability", capability(rootid=ROOT))
    assert run(upper) == ()
    assert os.getxattr(ping, "security.capability") == capability()


def test_a_file_capability_of_a_namespace_that_the_script_made_is_dropped(upper: Path) -> None:
    nested = file(upper / "nested", mode=0o755)
    os.setxattr(nested, "security.capability", capability(rootid=ROOT + 1000))
    run(upper)
    assert "security.capability" not in os.listxattr(nested)


def test_the_ids_of_an_access_list_are_unshifted_and_its_permissions_stay(upper: Path) -> None:
    shared = file(upper / "shared", mode=0o640)
    entry = struct.Struct("<HHI")
    none = 0xFFFFFFFF
    entries = [(0x01, 6, none), (0x02, 4, ROOT + 33), (0x04, 4, none), (0x10, 4, none), (0x20, 0, none)]
    os.setxattr(shared, "system.posix_acl_access", ACL_VERSION + b"".join(entry.pack(*one) for one in entries))
    assert run(upper) == ()
    entries[1] = (0x02, 4, 33)
    assert os.getxattr(shared, "system.posix_acl_access") == ACL_VERSION + b"".join(entry.pack(*one) for one in entries)
    assert stat.S_IMODE(shared.stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("kind", "device", "name"),
    [
        (stat.S_IFBLK, os.makedev(8, 0), "a device"),
        (stat.S_IFCHR, os.makedev(1, 1), "a device"),
        (stat.S_IFIFO, 0, "a FIFO"),
    ],
)
def test_a_special_file_is_dropped_and_named(upper: Path, kind: int, device: int, name: str) -> None:
    (upper / "opt").mkdir()
    os.mknod(upper / "opt/x", kind | 0o666, device)
    assert run(upper) == (f"opt/x: {name} can't be part of a layer",)
    assert not os.path.lexists(upper / "opt/x")


def test_a_socket_is_dropped_and_named(upper: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(upper / "s"))
    assert run(upper) == ("s: a socket can't be part of a layer",)
    assert not os.path.lexists(upper / "s")


def test_whiteouts_and_opaque_directories_stay(upper: Path) -> None:
    os.mknod(upper / "gone", stat.S_IFCHR | 0o000, 0)
    (upper / "replaced").mkdir()
    os.setxattr(upper / "replaced", "trusted.overlay.opaque", b"y")
    assert run(upper) == ()
    status = os.lstat(upper / "gone")
    assert stat.S_ISCHR(status.st_mode)
    assert status.st_rdev == 0
    assert os.getxattr(upper / "replaced", "trusted.overlay.opaque") == b"y"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trusted.overlay.redirect", b"/etc"),
        ("trusted.overlay.metacopy", b""),
        ("trusted.overlay.origin", b"\x00\xfb\x1d\x00"),
        ("trusted.overlay.opaque", b"x"),
        ("trusted.overlay.impure", b"y"),
        ("trusted.overlay.overlay.opaque", b"y"),
        ("user.overlay.opaque", b"y"),
        ("user.overlay.redirect", b"/etc"),
        ("trusted.other", b"1"),
        ("security.evm", b"\x05"),
    ],
)
def test_a_forged_attribute_is_dropped_from_files_and_directories(upper: Path, name: str, value: bytes) -> None:
    forged = [file(upper / "f"), upper / "d"]
    forged[1].mkdir()
    for path in forged:
        os.setxattr(path, "user.note", b"kept")
        try:
            os.setxattr(path, name, value)
        except OSError as error:
            pytest.skip(f"this kernel does not let {name} be written: {error}")
    run(upper)
    for path in forged:
        assert os.listxattr(path) == ["user.note"]


def test_an_opaque_mark_on_a_file_is_forged(upper: Path) -> None:
    os.setxattr(file(upper / "f"), "trusted.overlay.opaque", b"y")
    run(upper)
    assert os.listxattr(upper / "f") == []


def test_attributes_of_the_upper_itself_are_dropped(upper: Path) -> None:
    os.setxattr(upper, "trusted.overlay.opaque", b"y")
    upper.chmod(0o1777)
    run(upper)
    assert os.listxattr(upper) == []
    assert stat.S_IMODE(upper.stat().st_mode) == 0o755


def test_the_litter_of_an_installation_is_removed_and_its_neighbours_stay(upper: Path) -> None:
    litter = [
        "var/lib/apt/lists/deb.debian.org_Packages", "var/lib/apt/lists/partial/x", "var/cache/apt/pkgcache.bin",
        "var/cache/apt/archives/hello.deb", "var/log/apt/term.log", "var/log/dpkg.log", "run/lock/pid",
        "etc/resolv.conf",
    ]  # fmt: skip
    kept = ["var/lib/apt/extended_states", "var/lib/dpkg/status", "var/log/own.log", "etc/resolv.conf.d/x"]
    for path in (*litter, *kept):
        file(upper / path)
    os.mknod(upper / "var/lib/apt/lists/lock", stat.S_IFCHR, 0)  # the script removed the base's own
    run(upper)
    assert [path for path in litter if (upper / path).exists()] == []
    assert [path for path in kept if not (upper / path).exists()] == []
    assert list((upper / "var/lib/apt/lists").iterdir()) == []


@pytest.mark.parametrize("link", ["var", "var/lib", "var/lib/apt/lists"])
def test_cleaning_never_follows_a_link_of_the_script(upper: Path, tmp_path: Path, link: str) -> None:
    below = Path("var/lib/apt/lists/host").relative_to(link)
    victim = tmp_path / "host"
    precious = file(victim / below)
    (upper / link).parent.mkdir(parents=True, exist_ok=True)
    (upper / link).symlink_to(victim)
    run(upper)
    assert precious.read_text() == "text"
    assert owners(precious) == (ROOT, ROOT)
    assert (upper / link).is_symlink()


def test_a_tree_too_deep_to_be_walked_is_refused_in_one_line(upper: Path) -> None:
    here = os.open(upper, os.O_RDONLY)
    for _ in range(600):
        os.mkdir("d" * 100, dir_fd=here)
        below = os.open("d" * 100, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    with pytest.raises(IsochamberError, match="deeper than"):
        run(upper)


def test_holes_that_would_take_an_hour_to_hash_are_refused(upper: Path) -> None:
    with (upper / "sparse").open("wb") as sparse:
        sparse.truncate(staged.MAX_BYTES + 1)
    with pytest.raises(IsochamberError, match="more than 64 GiB"):
        run(upper)


def test_sealing_a_sealed_layer_changes_nothing(upper: Path) -> None:
    file(upper / "a/b", mode=0o4755, uid=ROOT + 3)
    os.mknod(upper / "gone", stat.S_IFCHR, 0)
    ping = file(upper / "ping", mode=0o755)
    os.setxattr(ping, "security.capability", capability(rootid=ROOT))
    run(upper)
    before = manifest.describe_tree(upper)
    assert run(upper) == ()
    assert manifest.describe_tree(upper) == before


bases = st.integers(0, 20_000).map(lambda slot: UID_BASE + slot * UID_COUNT)


@given(bases, st.integers(0, UID_COUNT - 1))
def test_unshifting_is_the_inverse_of_shifting_an_id(uid_base: int, number: int) -> None:
    assert seal.unshifted(uid_base + number, uid_base) == number


@given(bases, st.integers(0, UID_COUNT - 1))
def test_an_id_is_unshifted_at_most_once(uid_base: int, number: int) -> None:
    once = seal.unshifted(uid_base + number, uid_base)
    assert seal.unshifted(once, uid_base) == once


@given(bases, st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4), st.booleans())
def test_a_capability_keeps_its_sets_and_its_effective_bit(uid_base: int, sets: list[int], effective: bool) -> None:
    shifted = struct.pack("<6I", 0x03000000 | effective, *sets, uid_base)
    assert seal.unshifted_capability(shifted, uid_base) == struct.pack("<5I", 0x02000000 | effective, *sets)


@given(bases, st.lists(st.tuples(st.sampled_from([0x02, 0x08]), st.integers(0, 7), st.integers(0, UID_COUNT - 1))))
def test_unshifting_is_the_inverse_of_shifting_an_access_list(uid_base: int, named: list[tuple[int, int, int]]) -> None:
    entry = struct.Struct("<HHI")
    own = [(0x01, 6, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF)]
    plain = ACL_VERSION + b"".join(entry.pack(*one) for one in (*own, *named))
    shifted = ACL_VERSION + b"".join(
        entry.pack(*one) for one in (*own, *((tag, bits, number + uid_base) for tag, bits, number in named))
    )
    assert seal.unshifted_acl(shifted, uid_base) == plain


@given(st.binary(max_size=64))
def test_bytes_that_are_no_access_list_and_no_capability_are_never_kept_as_one(raw: bytes) -> None:
    assert seal.unshifted_acl(b"\xff" + raw, UID_BASE) is None
    if len(raw) not in (20, 24):
        assert seal.unshifted_capability(raw, UID_BASE) is None
