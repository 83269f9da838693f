"""Cgroups and exhaustion: leaving the group, outliving a stop, and taking more than was given."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

from isochamber.launch import cgroup, records
from isochamber.launch import stop as stopping
from tests.build.products import eventually, processes_of
from tests.escape.attempts import Attempt, Guard, NotTestableError, Off, Run
from tests.escape.guards import (
    CGROUP_KILL,
    CGROUPS,
    FEW_TERMINALS,
    FILTER,
    INTO_CGROUP,
    NO_CGROUP_TREE,
    PIDS,
    RESOURCES,
    RIGHTS,
    SMALL_TMP,
)
from tests.escape.worlds import Worlds
from tests.launch import tenants
from tests.launch.tenants import Tenant


def _need_cgroup2() -> str:
    tree = cgroup.trees().v2
    if tree is None:
        raise NotTestableError("this machine has no cgroup v2 tree")
    return tree


def _delegated() -> bool:
    """Say whether a cgroup namespace can't be left for a group outside of it: systemd mounts the tree so."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return any(" cgroup2 " in line and "nsdelegate" in line for line in mounts)


def _in_tree(script: str) -> Run:
    def run(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        tree = Path(_need_cgroup2())
        word = worlds.word(
            off, f"cd /mnt; {{ [ -e cgroup.procs ] && {script}; }} >/dev/null 2>&1 && echo worked || echo nothing"
        )
        if (tree / "isochamber-escape").is_dir():
            (tree / "isochamber-escape").rmdir()
        return word

    return run


def _before_its_group(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """C05: is its first process in the tenant's group when it runs its first instruction?"""
    _need_cgroup2()
    tenant = worlds.tenant(off)
    with started(worlds, tenant, off, "echo ready; read line") as record:
        group = Path(str(record.cgroup))
        return "in its group" if str(record.pid) in (group / "cgroup.procs").read_text().split() else "escaped"


class started:  # noqa: N801 - reads as the context manager it is
    """Start a tenant with some guards off, and wait for its "ready"."""

    def __init__(self, worlds: Worlds, tenant: Tenant, off: Off, script: str, sabotage: str = "") -> None:
        import subprocess

        tenants.write_entries(tenant.containers, [tenant.entry])
        words = worlds.words(tenant, off, "/bin/sh", "-c", script, sabotage=sabotage)
        self.tenant = tenant
        self.launcher = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> records.Record:
        assert self.launcher.stdout is not None
        assert self.launcher.stdout.readline() == "ready\n"
        record = records.settled(self.tenant.tid)  # its keeper writes it meanwhile
        assert record is not None
        return record

    def __exit__(self, *error: object) -> None:
        self.launcher.kill()
        self.launcher.wait(tenants.DEADLINE)
        for stream in (self.launcher.stdin, self.launcher.stdout):
            assert stream is not None
            stream.close()  # what was left behind may hold its other end: nobody reads to that end
        tenants.wait_until_free(self.tenant.tid)


def remove_groups(tid: str) -> None:
    """Remove what a start without its clean-up left."""
    found = cgroup.trees()
    cgroup.remove_all(cgroup.groups_of(tid, found.v1, found))


def daemon(how: str) -> Run:
    def run(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        """C04, R11: who detached itself, and ignores every signal, is dead when the tenant was stopped."""
        tenant = worlds.tenant(off)
        script = f"trap '' TERM HUP INT; exec 3>&1 >/dev/null 2>&1; {how}; echo ready >&3; read line"
        with started(worlds, tenant, off, script):
            assert len(tenant.processes()) >= 2
            stopping.stop(tenant.tid)
        left = processes_of(tenant.uid_base)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            tenants.wait_for_end(pid)
        remove_groups(tenant.tid)
        return "escaped" if left else "all of it is dead"

    return run


def eventually_in_state(tenant: Tenant, state: str) -> bool:
    """Say whether a process of the tenant gets into ``state`` (proc_pid_stat(5)) within the deadline."""

    def is_there() -> bool:
        found = []
        for pid in tenant.processes():
            with contextlib.suppress(OSError):
                found.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
        return state in found

    return eventually(is_there, tenants.DEADLINE)


def _signals_to_the_launcher(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """K14: SIGKILL to every number that may be the launcher or the keeper."""
    tenant = worlds.tenant(off)
    words = "kill -9 0 $PPID; for pid in $(seq 2 300); do kill -9 $pid 2>/dev/null; done; echo still here"
    done = worlds.start(tenant, off, "/bin/sh", "-c", f"({words})")
    return "the launcher lives" if done.returncode >= 0 and "keeper" not in done.stderr else "escaped"


def _fill(where: str) -> Run:
    def run(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        size = 80 << 20
        script = f"head -c {size} /dev/zero 2>&1 > {where}/big | tail -1 >&2; stat -c %s {where}/big"
        return "worked" if worlds.word(off, script) == str(size) else "ENOSPC"

    return run


def _perl(script: str) -> Run:
    # The soft limit is everybody's to raise, and may be 1024 on the host.
    return lambda worlds, off, _attempt: worlds.word(off, f"ulimit -n $(ulimit -Hn); perl -e '{script}'")


_FILES = 'for (1..20000) { open(my $f, ">", "/tmp/$_") or last; $made++ } print $made == 20000 ? "worked" : "no space"'
_OPEN = (
    'while (@f < 3000) { open(my $f, "<", "/dev/null") or last; push @f, $f } print @f == 3000 ? "worked" : "EMFILE"'
)
_PIPES = 'while (@f < 3000) { pipe(my $r, my $w) or last; push @f, $r, $w } print @f == 3000 ? "worked" : "EMFILE"'
_TERMINALS = (
    'for (1..200) { open(my $m, "+<", "/dev/ptmx") or last; push @f, $m } print @f == 200 ? "worked" : "no more"'
)


# 1 byte is the only limit with which a program that cores are piped to is not started (core(5)).
_SETRLIMIT = {"x86_64": 160, "aarch64": 164, "riscv64": 164}
_LOWERED = {
    "by the shell": "ulimit -c 0",
    "by the older call": (
        f'exec perl -e \'my $none = pack("Q2", 0, 0); syscall({_SETRLIMIT.get(os.uname().machine, -1)}, 4, $none); '
        'exec "/bin/sh", "-c", $ARGV[0]\' "$LOOK"'
    ),
    "of another process": "sh -c 'prlimit --core=0:0 --pid $PPID'",
}


def _lowered(how: str) -> Run:
    look = "grep -q '^Max core file size *1 ' /proc/self/limits && echo kept || echo worked"

    def run(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        script = f'LOOK={shlex.quote(look)}\n({how}\neval "$LOOK")'
        return worlds.word(off, script, rlimits={"NOFILE": 1024, "CORE": 1})

    return run


def attempts() -> Iterator[Attempt]:
    """Yield every attempt of these groups."""

    def one(row: str, title: str, guards: tuple[Guard, ...], run: Run, *refused: str) -> Attempt:
        return Attempt(row, title, guards, run, refused=frozenset(refused))

    tree = (NO_CGROUP_TREE, RIGHTS)
    yield one("C02", "a group of its own in the host's tree", tree, _in_tree("mkdir isochamber-escape"), "nothing")
    leaving = (*tree, CGROUPS) if _delegated() else tree
    yield one("C03", "moving itself to the host's root group", leaving, _in_tree("echo $$ > cgroup.procs"), "nothing")
    # To one that it makes: a group that gives controllers to others takes no process.
    another = "mkdir isochamber-escape; echo $$ > isochamber-escape/cgroup.procs"
    yield one("C03", "moving itself to another group", leaving, _in_tree(another), "nothing")
    yield one("C05", "running before it is in its group", (INTO_CGROUP,), _before_its_group, "in its group")
    for title, how in (
        ("a daemon by setsid", "setsid -f sleep 1000"),
        ("a daemon by double fork that ignores signals", "(trap '' TERM HUP; (sleep 1000; sleep 1000) & )"),
        ("a stopped process", "sleep 1000 & kill -STOP $!"),
    ):
        yield one("C04", f"{title}, after a stop", (PIDS, CGROUP_KILL), daemon(how), "all of it is dead")
    yield one("R02", "filling /tmp", (SMALL_TMP,), _fill("/tmp"), "ENOSPC")
    yield one("R02", "filling /dev/shm", (SMALL_TMP,), _fill("/dev/shm"), "ENOSPC")
    yield one("R04", "20,000 files in /tmp", (SMALL_TMP,), _perl(_FILES), "no space")
    yield one("R06", "3,000 open files", (RESOURCES,), _perl(_OPEN), "EMFILE")
    yield one("R06", "3,000 ends of pipes", (RESOURCES,), _perl(_PIPES), "EMFILE")
    yield one("R08", "200 terminals", (FEW_TERMINALS,), _perl(_TERMINALS), "no more")
    yield one("R10", "a core dump", (RESOURCES, FILTER), _core, "none allowed")
    for title, how in _LOWERED.items():
        yield one("R10", f"a limit of cores with which a crash starts the host's program, {title}", (FILTER,),
                  _lowered(how), "kept")  # fmt: skip


def _core(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    # Whoever starts the launcher may have any limit: a known one shows whether the tenant raised it.
    known = "import resource\nresource.setrlimit(resource.RLIMIT_CORE, (0, -1))\n" if off else ""
    script = "ulimit -c unlimited 2>/dev/null; [ $(ulimit -c) = 0 ] && echo none allowed || echo worked"
    return worlds.word(off, script, sabotage=known)
