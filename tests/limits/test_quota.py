"""A tenant's disk limit by the file system's own project quota, where it keeps one; else it is an image."""

import errno
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from isochamber.build import disk as builder
from isochamber.build.state import State
from isochamber.launch import disk, pins, quota
from tests.launch.tenants import Tenant
from tests.tasks.world import World, write_package

MIB = 1 << 20
# Says how many MiB fit into each.
_SIZE = "echo $(($(stat -c %s $d/fill) >> 20))"
# Both files first: on xfs a new one needs blocks, and there may be none left for the second.
FILL = (
    ": >/home/fill; : >/var/fill; "
    f"for d in /home /var; do dd if=/dev/zero of=$d/fill bs=1M count=40 2>/dev/null; {_SIZE}; done"
)
# What a tenant would do to get out of its project: ioctl_xfs_fssetxattr(2) with project 0, on a file of its own.
LEAVE = (
    'perl -e \'open(F, ">>", $ARGV[0]); my $a = "\\0" x 28; ioctl(F, 0x801c581f, $a); '
    'print unpack("x12 L", $a), " "; substr($a, 12, 4) = pack("L", 0); '
    'print defined ioctl(F, 0x401c5820, $a) ? "worked" : $! + 0\' '
)


MADE = {
    "ext4": ["-q", "-F", "-m", "0", "-O", "quota,project", "-E", "quotatype=prjquota"],
    "xfs": ["-q"],
}
LACKS = {"ext4": "CONFIG_QFMT_V2", "xfs": "CONFIG_XFS_QUOTA"}


def _mounted(kind: str, image: Path, target: Path) -> None:
    subprocess.run([f"mkfs.{kind}", *MADE[kind], str(image)], check=True, capture_output=True)
    words = ["mount", "-t", kind, "-o", "loop,prjquota", str(image), str(target)]
    if subprocess.run(words, check=False, capture_output=True).returncode:
        pytest.skip(f"this kernel mounts no {kind} with project quota ({LACKS[kind]})")


on_both = pytest.mark.parametrize("state", MADE, indirect=True)


@pytest.fixture
def state(tmp_path: Path, root: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A state directory on an ext4, or what is asked for, with project quota; the base is lent by a bind mount."""
    kind = str(getattr(request, "param", "ext4"))
    if not Path("/dev/loop-control").exists() or shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"this machine has no loop devices, or no mkfs.{kind}")
    image, place = tmp_path / "quota.img", tmp_path / "place"
    with image.open("wb") as file:
        file.truncate(400 * MIB)
    place.mkdir()
    _mounted(kind, image, place)
    made = place / "state"
    try:
        shutil.copytree(root, made, symlinks=True, ignore=shutil.ignore_patterns("rootfs"))
        (product,) = (made / "base_fs").iterdir()
        subprocess.run(["mount", "--bind", root / "base_fs" / product.name, product], check=True)
        yield made
    finally:
        subprocess.run(["umount", "-R", place], check=True)


@pytest.fixture
def world(tmp_path: Path, state: Path) -> World:
    """Two tenants, built by doit."""
    for name in ("bounded", "other"):
        write_package(tmp_path / "packages" / name, {"init": "/home/main"}, {"main": '#!/bin/sh\neval "$@"\n'})
    return World(tmp_path, state)


def _limit(world: World, size: str | None, words: str = "") -> None:
    limits = "{}" if size is None else f"{{disk: {size}}}"
    world.tenants.write_text(
        "defaults: {ipc: none, install_network: host}\ntenants:\n"
        f"  bounded: {{package: packages/bounded, limits: {limits}{words}}}\n  other: {{package: packages/other}}\n"
    )
    done = world.doit("configure:bounded", "configure:other")
    assert done.returncode == 0, done.stdout + done.stderr


def _run(world: World, name: str, script: str) -> str:
    done = world.cli("run", name, "/bin/sh", "-c", script)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def _project(world: World) -> int:
    return disk.project_of(str(world.root), world.entry("bounded")["tid"])


def _kind(world: World) -> str:
    done = subprocess.run(["stat", "-f", "-c", "%T", world.root], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@on_both
def test_a_project_bounds_what_a_tenant_writes_and_is_not_left(state: Path) -> None:
    """The same in short, without doit, which is slow on an emulated machine."""
    State(state).create()
    (product,) = (state / "base_fs").iterdir()
    tenant = Tenant(state, f"base_fs/{product.name}/rootfs", 1)
    (tenant.home / "kept").write_text("kept\n")
    builder.ensure(State(state), tenant.name, tenant.tid, 24 * MIB, tenant.uid_base)
    builder.attach(State(state), tenant.tid)
    assert disk.project_of(str(state), tenant.tid) == tenant.uid_base
    tenant.change(disk=24 * MIB, home=f"tenants_fs/{tenant.tid}/home")
    try:
        # /var is copied up before all is used: that needs a block.
        said = tenant.output(f"cat /home/kept; mkdir /var/d; {FILL}; rm -f /home/fill; {LEAVE} /home/mine")
        kept, home, upper, _, left = said.split()
        assert kept == "kept"
        assert 20 <= int(home) + int(upper) <= 24
        assert left == str(errno.EINVAL)
        quota.set_limit(str(state), tenant.uid_base, 0)
        refused = tenant.sh("true")
        assert (refused.returncode, "no limit is in force" in refused.stderr) == (125, True)
    finally:
        pins.remove(tenant.tid)


@on_both
def test_the_file_system_itself_keeps_a_tenants_limit(world: World) -> None:
    _limit(world, None)
    _run(world, "bounded", "echo home > /home/kept; mkdir /var/d; ln -s x /var/d/link; rm /etc/hostname; mkfifo /var/p")
    look = "cat /home/kept; readlink /var/d/link; test -e /etc/hostname || echo gone; stat -c %F:%u /var/p /home/main"
    before = _run(world, "bounded", look)
    assert _run(world, "bounded", f"{FILL}; rm /home/fill /var/fill") == "40\n40", "the control: no limit"

    _limit(world, "24M")  # what it has moves into a project
    tid = world.entry("bounded")["tid"]
    assert _project(world) == world.entry("bounded")["uid_base"]
    assert not Path(disk.image_of(str(world.root), tid)).exists()
    assert _run(world, "bounded", look) == before
    said = world.cli("show", "bounded").stdout
    assert f"limit       disk {24 * MIB}: project quota {_project(world)} on {world.root}/tenants_fs/{tid}" in said
    more = "dd if=/dev/zero of=/home/fill bs=1M oflag=append conv=notrunc 2>&1 || true"
    home, upper, why = _run(world, "bounded", f"{FILL}; {more}").split(None, 2)
    assert 20 <= int(home) + int(upper) <= 24
    assert "quota" in why or "No space left" in why, "xfs says so of a project"
    assert _run(world, "other", FILL) == "40\n40"
    full = world.cli("run", "bounded", "/bin/true")
    if _kind(world) == "xfs":  # where the host's root is limited too, and overlayfs makes its work directory anew
        assert (full.returncode, len(full.stderr.splitlines())) == (125, 1)
        assert "the root became read-only" in full.stderr and "limits: disk" in full.stderr
        (world.root / "tenants_fs" / tid / "home/fill").unlink()
    else:
        assert full.returncode == 0, full.stderr
    hard, used = quota.limit(str(world.root), _project(world))
    assert (hard, used <= hard) == (24 * MIB, True)

    for where in ("/home/mine", "/var/mine"):
        seen, word = _run(world, "bounded", f"rm -f /home/fill /var/fill; {LEAVE} {where}").split()
        assert word in (str(errno.EINVAL), str(errno.EPERM), str(errno.ENOTTY)), word
        assert int(seen or 0) in (_project(world), 0)
    assert _leaves(world) == 0, "the control: the host's root may"

    _limit(world, "48M")
    assert quota.limit(str(world.root), _project(world))[0] == 48 * MIB
    (world.directory / "packages/bounded/progs/new").write_text("new\n")
    _limit(world, None)  # it keeps the limit that it has
    assert _run(world, "bounded", f"{look}; cat /home/new") == f"{before}\nnew"
    assert world.entry("bounded")["disk"] == 48 * MIB

    project = _project(world)
    assert world.cli("delete", "--yes", "bounded").returncode == 0
    assert quota.limit(str(world.root), project)[0] == 0


def _leaves(world: World) -> int:
    """Take a file of the tenant's out of its project, as the host's root; returns the project that it is in then."""
    path = world.root / "tenants_fs" / world.entry("bounded")["tid"] / "home/mine"
    descriptor = os.open(path, os.O_RDONLY)
    try:
        attributes = bytearray(fcntl.ioctl(descriptor, 0x801C581F, b"\0" * 28))
        attributes[12:16] = bytes(4)
        fcntl.ioctl(descriptor, 0x401C5820, bytes(attributes))
        return int(struct.unpack_from("=I", fcntl.ioctl(descriptor, 0x801C581F, b"\0" * 28), 12)[0])
    finally:
        os.close(descriptor)


def test_new_layers_a_rollback_and_a_restored_backup_keep_the_limit(world: World) -> None:
    _limit(world, "32M")
    _run(world, "bounded", "echo upper > /var/first; echo home > /home/kept")
    project = _project(world)
    script = world.prog("bounded", "install")
    script.write_text("#!/bin/sh\necho made > /opt/made\n")
    script.chmod(0o755)
    config = world.package("bounded") / "config.json"
    config.write_text(config.read_text().replace('"dependencies": ""', '"dependencies": "/home/install"'))
    _limit(world, "32M")
    assert _run(world, "bounded", "cat /opt/made /home/kept; test -e /var/first || echo fresh") == "made\nhome\nfresh"
    home, upper = (int(word) for word in _run(world, "bounded", FILL).split())
    assert home + upper <= 32
    done = world.cli("rollback", "bounded")
    assert done.returncode == 0, done.stdout + done.stderr
    assert _run(world, "bounded", "rm -f /home/fill; cat /var/first") == "upper"
    assert quota.limit(str(world.root), project)[0] == 32 * MIB
    assert _project(world) == project
    saved = world.directory / "saved.tar"
    done = world.cli("backup", "bounded", str(saved))
    assert done.returncode == 0, done.stdout + done.stderr
    assert world.cli("delete", "--yes", "bounded").returncode == 0
    done = world.cli("restore", str(saved))
    assert done.returncode == 0, done.stdout + done.stderr
    _limit(world, "32M")
    assert _run(world, "bounded", "cat /home/kept") == "home"
    assert quota.limit(str(world.root), _project(world))[0] == 32 * MIB


def test_a_quota_that_is_no_longer_kept_stops_the_start(world: World) -> None:
    _limit(world, "24M")
    project, path = _project(world), str(world.root)
    quota.set_limit(path, project, 0)
    done = world.cli("run", "bounded", "/bin/true")
    assert done.returncode == 125
    assert "no limit is in force" in done.stderr
    _limit(world, "24M")  # and a build sets it again
    assert quota.limit(path, project)[0] == 24 * MIB
    _run(world, "bounded", "dd if=/dev/zero of=/home/more bs=1M count=20 2>/dev/null")
    world.tenants.write_text(world.tenants.read_text().replace("24M", "16M"))
    done = world.doit("configure:bounded")
    assert done.returncode == 125
    assert "more than its disk is to have" in done.stdout + done.stderr


def test_without_project_quota_it_is_an_image(root: Path) -> None:
    assert not quota.enforced("/proc")
    assert quota.project_of("/proc") == 0
    assert quota.project_of(str(root / "nothing")) == 0
