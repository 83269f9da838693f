"""A disk of a tenant's own: it fills that and nothing else, and what is on it stays."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isochamber.cli.common import supervised
from isochamber.launch import disk
from tests.conftest import PROJECT
from tests.serve.world import end_nursery, eventually
from tests.tasks.world import World, write_package

MIB = 1 << 20
FILL = "for d in /home /var; do dd if=/dev/zero of=$d/fill bs=1M count=60 2>/dev/null && echo filled; done; true"


@pytest.fixture
def world(tmp_path: Path, root: Path) -> Iterator[World]:
    """Two tenants; their images are unmounted after the test."""
    if not Path("/dev/loop-control").exists():
        pytest.skip("this machine has no loop devices")
    made = World(tmp_path, root)
    for name in ("bounded", "other"):
        write_package(tmp_path / "packages" / name, {"init": "/home/main"}, {"main": '#!/bin/sh\neval "$@"\n'})
    yield made
    for tid in os.listdir(root / "tenants_fs"):
        disk.detach(str(root), tid)


def _limit(world: World, size: str | None) -> None:
    limits = "{}" if size is None else f"{{disk: {size}}}"
    world.tenants.write_text(
        "defaults: {ipc: none}\ntenants:\n"
        f"  bounded: {{package: packages/bounded, limits: {limits}}}\n  other: {{package: packages/other}}\n"
    )


def _configure(world: World) -> None:
    done = world.doit("configure:bounded", "configure:other")
    assert done.returncode == 0, done.stdout + done.stderr


def _run(world: World, name: str, script: str) -> str:
    done = world.cli("run", name, "/bin/sh", "-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _image(world: World) -> Path:
    return Path(disk.image_of(str(world.root), world.entry("bounded")["tid"]))


def _loops(world: World) -> list[str]:
    listed = [Path("/sys/block", name, "loop/backing_file") for name in os.listdir("/sys/block")]
    return [path.parts[3] for path in listed if path.exists() and str(world.root) in path.read_text()]


def test_a_tenant_fills_its_own_disk_and_nothing_else(world: World) -> None:
    _limit(world, None)
    _configure(world)
    assert _run(world, "bounded", f"{FILL}; rm -f /home/fill /var/fill") == "filled\nfilled", "the control: no limit"
    _limit(world, "48M")
    _configure(world)
    assert _run(world, "bounded", FILL) == ""
    assert "No space left" in _run(
        world, "bounded", "echo x > /home/more; dd if=/dev/zero of=/var/more bs=1M count=9 2>&1 || true"
    )
    assert _image(world).stat().st_size == 48 * MIB
    assert _image(world).stat().st_blocks * 512 <= 49 * MIB
    assert _run(world, "other", FILL) == "filled\nfilled"
    assert world.doit("configure:bounded").returncode == 0, "a full tenant is still built for"


def test_a_tenant_runs_out_of_inodes_alone(world: World) -> None:
    _limit(world, "16M")
    _configure(world)
    count = "perl -e 'my $n = 0; while ($n < 6000) { open(my $f, q(>), qq(/home/$n)) or last; $n++ } print $n'"
    assert int(_run(world, "bounded", count)) < 2100
    assert int(_run(world, "other", count)) == 6000, "the control: without a limit"


def test_what_is_on_a_disk_stays_over_rebuilds_growth_and_a_restart_of_the_machine(world: World) -> None:
    _limit(world, None)
    _configure(world)
    _run(
        world,
        "bounded",
        "echo home > /home/kept; mkdir /var/d; ln -s x /var/d/link; echo upper > /var/kept; rm /etc/hostname",
    )
    look = (
        "cat /home/kept /var/kept; readlink /var/d/link; stat -c %u:%g /var/kept /home/main; "
        "test -e /etc/hostname || echo gone"
    )
    before = _run(world, "bounded", look)
    _limit(world, "32M")  # it moves onto a disk
    _configure(world)
    assert _run(world, "bounded", look) == before
    assert len(_loops(world)) == 1
    assert (world.root / "tenants_persist" / world.entry("bounded")["tid"] / "home" / "kept").read_text() == "home\n"
    _limit(world, "64M")
    _configure(world)
    assert _run(world, "bounded", look) == before
    assert int(_run(world, "bounded", "df -m --output=size / | tail -1")) > 40
    disk.detach(str(world.root), world.entry("bounded")["tid"])
    assert _loops(world) == []
    assert _run(world, "bounded", look) == before, "a start mounts it again"
    disk.detach(str(world.root), world.entry("bounded")["tid"])
    (world.directory / "packages/bounded/progs/new").write_text("new\n")
    _configure(world)
    assert _run(world, "bounded", f"{look}; cat /home/new") == f"{before}\nnew"
    _limit(world, None)  # it keeps the disk that it has
    _configure(world)
    assert _run(world, "bounded", look) == before
    assert len(_loops(world)) == 1


def test_a_disk_is_not_made_smaller(world: World) -> None:
    _limit(world, "32M")
    _configure(world)
    _limit(world, "16M")
    done = world.doit("configure:bounded")
    assert done.returncode == 125
    assert "can't be made smaller" in done.stdout + done.stderr
    assert _run(world, "bounded", "echo runs") == "runs"


def test_a_start_elsewhere_uses_the_same_loop_device(world: World) -> None:
    """Two loop devices over one file would be two file systems that know nothing of each other."""
    _limit(world, "32M")
    _configure(world)
    target = world.root / "tenants_fs" / world.entry("bounded")["tid"]
    script = f'umount "{target}" && exec "$@"'
    words = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-m", "isochamber", "run", "bounded"]
    done = subprocess.run(
        [*words, "/bin/sh", "-c", "echo there > /home/there; sync"],
        env=world.environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(_loops(world)) == 1
    assert _run(world, "bounded", "cat /home/there") == "there"


def test_deleting_a_tenant_frees_its_disk(world: World) -> None:
    _limit(world, "32M")
    _configure(world)
    image = _image(world)
    assert len(_loops(world)) == 1
    assert world.cli("delete", "--yes", "bounded").returncode == 0
    assert not image.exists()
    assert _loops(world) == []


def test_show_says_what_holds_the_limit(world: World) -> None:
    _limit(world, "32M")
    _configure(world)
    assert f"limit       disk {32 * MIB}: {_image(world)}" in world.cli("show", "bounded").stdout
    assert json.loads(world.cli("show", "--json", "bounded").stdout)["disk"] == 32 * MIB


def test_a_disk_that_is_not_mounted_yet_is_there_for_a_tenant_that_the_supervisor_starts(world: World) -> None:
    _limit(world, "48M")
    _configure(world)
    _run(world, "bounded", "echo kept > /home/kept")
    tid = world.entry("bounded")["tid"]
    words = [sys.executable, "-m", "isochamber", "--root", str(world.root), "serve"]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, cwd=PROJECT) as serving:
        try:
            eventually(supervised, "the supervisor answers")
            assert _run(world, "other", "echo x") == "x"  # a process waits for the next start
            disk.detach(str(world.root), tid)  # as after a restart of the machine
            assert _run(world, "bounded", f"cat /home/kept; {FILL}") == "kept"
            assert disk.is_mounted(f"{world.root}/tenants_fs/{tid}")
        finally:
            serving.terminate()
            serving.wait(60)
            end_nursery()
