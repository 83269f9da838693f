"""What fills up: a disk, inodes, logs, pipes that nobody reads; and what the operator's copy of it costs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from isochamber.build import backup
from isochamber.build import disk as disks
from isochamber.build.state import State
from isochamber.launch import disk
from isochamber.launch import stop as stopping
from isochamber.serve.ring import Ring
from tests.build.products import processes_of
from tests.escape import exhaustion
from tests.escape.attempts import ALL_ON, Attempt, Guard, NotTestableError, Off, Run
from tests.escape.guards import CGROUP_KILL, PIDS, RESOURCES
from tests.escape.races import compiled
from tests.escape.worlds import Worlds, patched
from tests.launch import tenants
from tests.launch.tenants import Tenant

MIB = 1 << 20
_DISK, _MORE = 24 * MIB, 60 * MIB
_RING = 64 << 10

OWN_DISK = Guard("a disk of its own (limits: disk)")
ENDLESS = Guard("a ring of logs that turns", patches=(("isochamber.serve.ring:Ring._turn", lambda ring: None),))
HOLES = Guard(
    "a copy keeps holes",
    patches=(("isochamber.build.tree:extents", lambda descriptor, size: [(0, size)]),),
)


def _limited(worlds: Worlds, off: Off) -> Tenant:
    """Return a tenant with 24 MiB for its root and its /home, or with all of the host's file system."""
    tenant = worlds.tenant(off - {OWN_DISK})
    if OWN_DISK not in off:
        if not Path("/dev/loop-control").exists():
            raise NotTestableError("this machine has no loop devices")
        state = State(worlds.root)
        disks.ensure(state, tenant.name, tenant.tid, _DISK, tenant.uid_base)
        tenant.change(disk=_DISK, home=state.relative(state.home(tenant.tid)))
    return tenant


def _on_a_disk(script: str) -> Run:
    def run(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        """R03, R04, R05: what it takes is its own disk's, and another tenant goes on."""
        tenant = _limited(worlds, off)
        try:
            word = worlds.start(tenant, off - {OWN_DISK}, "/bin/sh", "-c", script).stdout.strip()
            if worlds.word(ALL_ON, "head -c 1000000 /dev/zero > /home/mine && echo written") != "written":
                return "escaped"
            image = Path(disk.image_of(str(worlds.root), tenant.tid))
            if image.exists() and image.stat().st_blocks * 512 > _DISK + MIB:
                return "escaped"
            return word.splitlines()[-1] if word else "nothing"
        finally:
            disk.detach(str(worlds.root), tenant.tid)
            for path in (tenant.directory, tenant.home.parent):
                shutil.rmtree(path / "staging", ignore_errors=True)
                shutil.rmtree(path / "upper", ignore_errors=True)

    return run


def _taken(where: str) -> str:
    """Return a script that says "worked" when the file is as large as was asked for."""
    return (
        f"head -c {_MORE} /dev/zero > {where} 2>/dev/null; [ $(stat -c %s {where}) = {_MORE} ] && echo worked"
        " || echo no space"
    )


_ALLOCATED = f"fallocate -l {_MORE} /home/big 2>/dev/null && echo worked || echo no space"
_INODES = (
    'perl -e \'my $n = 0; while ($n < 6000) { open(my $f, ">", "/home/$n") or last; $n++ } '
    'print $n == 6000 ? "worked" : "no space"\''
)
_LINKS = (
    'perl -e \'my $n = 0; while ($n < 6000) { symlink("x" x 100, "/var/$n") or last; $n++ } '
    'print $n == 6000 ? "worked" : "no space"\''
)


def _too_long(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """R05: a file longer than ``limits: file_size`` allows, without a byte in it."""
    size = 1 << 40
    limits = {"NOFILE": 1024, "CORE": 0, "FSIZE": 1 << 30}
    look = f"[ $(stat -c %s /home/sparse) = {size} ] && echo worked || echo cut"
    script = f"(truncate -s {size} /home/sparse) 2>/dev/null; {look}"
    return worlds.word(off, script, rlimits=limits)


def _copied(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """R05: the operator copies a file that is nearly all hole: a backup."""
    tenant = worlds.tenant()
    worlds.start(tenant, ALL_ON, "/bin/sh", "-c", "truncate -s 64M /home/sparse; echo x >> /home/sparse")
    copy = worlds.scratch / f"copy-{tenant.tid}"
    try:
        with patched(off):
            backup.copy_tree(tenant.home, copy, [])
        return "worked" if (copy / "sparse").stat().st_blocks * 512 > 32 * MIB else "as small as it was"
    finally:
        shutil.rmtree(copy)


def _logged(script: str) -> Run:
    def run(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        """R07: what it says goes into a ring of two files of 64 KiB, as the supervisor keeps it."""
        tenant = worlds.tenant()
        tenants.write_entries(tenant.containers, [tenant.entry])
        directory = worlds.scratch / f"ring-{tenant.tid}"
        words = worlds.words(tenant, ALL_ON, "/bin/sh", "-c", script)
        try:
            with patched(off), subprocess.Popen(words, stdout=subprocess.PIPE) as launcher:
                ring = Ring(str(directory), _RING, 2)
                assert launcher.stdout is not None
                while data := os.read(launcher.stdout.fileno(), 1 << 16):
                    ring.write(b"stdout", data)
                ring.close()
            assert ring.lines
            size = sum(file.stat().st_size for file in directory.iterdir())
            return "worked" if size > 4 * _RING else "bounded"
        finally:
            shutil.rmtree(directory)

    return run


_UNREAD = "mkfifo /tmp/go; (read go; exec yes >&3) < /tmp/go & echo ready >&3; echo > /tmp/go; sleep 1"


def _asleep(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """R11: a process that no signal but SIGKILL reaches, since it sleeps in the kernel (state D)."""
    tenant = worlds.tenant(off)
    shutil.copy(compiled(worlds.scratch, "helper", "-static"), tenant.home)
    script = "exec 3>&1 >/dev/null 2>&1; /home/helper asleep & echo ready >&3; read line"
    with exhaustion.started(worlds, tenant, off, script):
        assert exhaustion.eventually_in_state(tenant, "D"), "nobody sleeps in the kernel"
        stopping.stop(tenant.tid)
    left = processes_of(tenant.uid_base)
    for pid in left:
        os.kill(pid, 9)
        tenants.wait_for_end(pid)
    exhaustion.remove_groups(tenant.tid)
    return "escaped" if left else "all of it is dead"


def attempts() -> Iterator[Attempt]:
    """Yield every attempt of this group."""

    def one(row: str, title: str, guards: tuple[Guard, ...], run: Run, *refused: str) -> Attempt:
        return Attempt(row, title, guards, run, refused=frozenset(refused))

    own = (OWN_DISK,)
    yield one("R03", "filling /home", own, _on_a_disk(_taken("/home/big")), "no space")
    yield one("R03", "filling its root", own, _on_a_disk(_taken("/var/big")), "no space")
    yield one("R03", "filling /home by fallocate", own, _on_a_disk(_ALLOCATED), "no space")
    yield one("R04", "6,000 files in /home", own, _on_a_disk(_INODES), "no space")
    yield one("R04", "6,000 long links in its root", own, _on_a_disk(_LINKS), "no space")
    yield one("R05", "a file of 1 TiB without a byte in it", (RESOURCES,), _too_long, "cut")
    yield one("R05", "a hole that the operator's copy fills", (HOLES,), _copied, "as small as it was")
    flood = 'perl -e \'print "x" x 3999, "\\n" for 1..400\''
    yield one("R07", "a flood of output, kept", (ENDLESS,), _logged(flood), "bounded")
    yield one(
        "R07", "a line without end, kept", (ENDLESS,), _logged("head -c 1600000 /dev/zero | tr '\\0' x"), "bounded"
    )
    yield one("R07", "a flood that nobody reads, after a stop", (PIDS, CGROUP_KILL),
              exhaustion.daemon(_UNREAD), "all of it is dead")  # fmt: skip
    yield one("R11", "a process that sleeps in the kernel, after a stop", (PIDS, CGROUP_KILL), _asleep,
              "all of it is dead")  # fmt: skip
