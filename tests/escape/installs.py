"""Install scripts: the same calls from a build's sandbox, and what a script leaves in its layer."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from isochamber.build.sandbox import build_tid
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import command
from tests.build.products import Bench, processes_of
from tests.conftest import PROJECT
from tests.escape import exhaustion, filesystem, guards, kernel
from tests.escape.attempts import Attempt, Guard, Off
from tests.escape.guards import CGROUP_KILL, ENVIRONMENT, OLD_ROOT, PIDS, RIGHTS
from tests.escape.worlds import LAUNCHER, PATIENCE, RUNNER, Worlds, patched, read_batch

_numbers = itertools.count()

SEALED = Guard(
    "a layer is sealed: special files are dropped",
    patches=(("isochamber.build.seal:_is_forbidden", lambda item: False),),
)
ATTRIBUTES = Guard(
    "a layer is sealed: forged attributes are dropped",
    patches=(("isochamber.build.seal:_clean_attributes", lambda item: []),),
)
TIME = Guard("a limit of time (limits: install_seconds)")
BOUNDED_LOG = Guard("a bounded log", patches=(("isochamber.build.process:MAX_LOG_BYTES", 1 << 40),))


def _bench(worlds: Worlds, script: str) -> Bench:
    number = next(_numbers)
    state = State(worlds.root)
    state.create()
    directory = worlds.scratch / f"install-{number}"
    bench = Bench(state, directory, name=f"install{number}", base=worlds.base.split("/")[1])
    bench.script(f"# of its own: no other build's layer is taken for it: {number}\n{script}")
    return bench


def _build(bench: Bench, off: Off) -> str:
    """Build the layer with some guards off: those of the launcher, and those of this process."""
    code = "".join(guard.launcher for guard in sorted(off, key=str))
    program = LAUNCHER.format(project=str(PROJECT), sabotage=guards.LOOKING + code)

    def sabotaged(*words: str) -> list[str]:
        return ["unshare", "-m", sys.executable, "-I", "-S", "-c", program, *words]

    with patched(off), mock.patch.object(command, "argv", sabotaged if code else command.argv):
        return bench.build()


_words: dict[Off, dict[str, str]] = {}


def _batch(worlds: Worlds, off: Off) -> dict[str, str]:
    """Run every scripted attempt of this group in one build, and read their words from its log."""
    if off not in _words:
        mine = [attempt for attempt in attempts() if attempt.script and off in attempt.worlds()]
        bench = _bench(worlds, "")
        (bench.progs / "attempts").mkdir()
        shutil.copy(worlds.probe, bench.progs / "probe")
        for number, attempt in enumerate(mine):
            script = attempt.script
            for name, text in (
                ("@HOSTPID@", worlds.sentinel.pid), ("@CANARY@", worlds.canary),
                ("@OLDCANARY@", worlds.canary_below_the_old_root),
            ):  # fmt: skip
                script = script.replace(name, str(text))
            bench.put(f"attempts/{number:04}", script + "\n")
        bench.script(f"# {len(_words)}\n{RUNNER.format(patience=PATIENCE)}")
        with mock.patch.dict(os.environ, {"SECRET": "token"}):
            _build(bench, off)
        _words[off] = read_batch(mine, bench.log())
    return _words[off]


def _scripted(worlds: Worlds, off: Off, attempt: Attempt) -> str:
    return _batch(worlds, off).get(attempt.name, "said nothing")


# Calls that a script may make, over files of its own ids: dpkg does.
_GRANTED = ("chroot", "supplementary groups", "giving a file away", "a file capability")


def _calls() -> Iterator[Attempt]:
    """Yield one way of each call, as an install script's."""
    for attempt in kernel.attempts():
        title, _, way = attempt.title.rpartition(" (")
        if way == "syscall)" and title not in _GRANTED and attempt.script:
            yield dataclasses.replace(
                attempt, row="I10" if attempt.row in ("K13", "K14") else "I01", title=f"{title}, by an install script",
                run=_scripted, peers=False, batch="install",
            )  # fmt: skip


def _left(script: str, is_there: Callable[[Path], bool]) -> Callable[[Worlds, Off, Attempt], str]:
    def run(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        bench = _bench(worlds, script)
        rootfs = bench.rootfs(_build(bench, off))
        return "worked" if is_there(rootfs) else "dropped"

    return run


def _daemon(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    bench = _bench(worlds, "setsid -f sh -c 'trap \"\" TERM HUP; sleep 1000; sleep 1000' > /dev/null 2>&1 < /dev/null")
    _build(bench, off)
    tid = bench.state.tid(bench.name)
    uid_base = (bench.state.tenant_fs(tid) / "upper").stat().st_uid
    left = processes_of(uid_base)
    for pid in left:
        os.kill(pid, 9)
    exhaustion.remove_groups(build_tid(tid))
    return "escaped" if left else "all of it is dead"


def _hangs(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """I05: a script that does not end; "worked" when it had all the time it wanted."""
    bench = _bench(worlds, "sleep 4; echo waited")
    if TIME not in off:
        bench.install_seconds = 1
    try:
        _build(bench, off - {TIME})
    except IsochamberError as error:
        assert "took longer" in error.line() or "second" in error.line(), error.line()
        return "killed"
    return "worked" if "waited" in bench.log() else "nothing"


def _flood(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    bench = _bench(worlds, 'perl -e \'print "x" x 3999, "\\n" for 1..4300\'')
    _build(bench, off)
    return "worked" if bench.state.log(f"layer-{bench.name}").stat().st_size >= 17_200_000 else "bounded"


_SETXATTR = 188 if os.uname().machine == "x86_64" else 5
_FORGE = f"""touch /opt/left
perl -e 'my ($p, $n, $v) = ("/opt/left", "user.overlay.redirect", "/etc");
    syscall({_SETXATTR}, $p, $n, $v, 4, 0) == 0 or die'
"""


def attempts() -> Iterator[Attempt]:
    """Yield every attempt of this group; the calls last, since some of them change what the others would see."""

    def scripted(row: str, title: str, guard: tuple[Guard, ...], script: str, *refused: str) -> Attempt:
        return Attempt(row, title, guard, _scripted, script, refused=frozenset(refused), batch="install")

    yield scripted("I07", "the builder's environment", (ENVIRONMENT,),
                   "tr '\\0' '\\n' < /proc/1/environ | grep SECRET= || echo nothing", "nothing")  # fmt: skip
    yield scripted("I01", "the host's root below its own, by an install script", (OLD_ROOT,),
                   "cat /..@OLDCANARY@ 2>/dev/null || echo nothing", "nothing")  # fmt: skip
    yield scripted("I10", "the host's root by /proc/PID/root, by an install script", (PIDS, RIGHTS),
                   "cat /proc/@HOSTPID@/root@CANARY@ 2>/dev/null || echo nothing", "nothing")  # fmt: skip
    for attempt in filesystem.attempts():
        if attempt.script and attempt.row == "F01":
            yield dataclasses.replace(attempt, row="I01", title=f"{attempt.title}, by an install script", run=_scripted,
                                      peers=False, batch="install")  # fmt: skip
    yield Attempt("I02", "a daemon that a script leaves", (PIDS, CGROUP_KILL), _daemon,
                  refused=frozenset({"all of it is dead"}))  # fmt: skip
    for title, script, path in (("a FIFO", "mkfifo /opt/left", "opt/left"), (
        "a socket",
        "perl -e 'use Socket; socket(S, AF_UNIX, SOCK_STREAM, 0); bind(S, pack_sockaddr_un(\"/opt/left\")) or die'",
        "opt/left",
    )):  # fmt: skip

        def is_there(rootfs: Path, path: str = path) -> bool:
            mode = (rootfs / path).lstat().st_mode if os.path.lexists(rootfs / path) else 0
            return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)

        yield Attempt("I04", f"{title} in a layer", (SEALED,), _left(script, is_there), refused=frozenset({"dropped"}))
    yield Attempt(
        "I04", "a forged attribute in a layer", (ATTRIBUTES,),
        _left(_FORGE, lambda rootfs: bool(os.listxattr(rootfs / "opt/left"))), refused=frozenset({"dropped"}),
    )  # fmt: skip
    yield Attempt("I05", "a script that hangs", (TIME,), _hangs, refused=frozenset({"killed"}))
    yield Attempt("I05", "a flood of output", (BOUNDED_LOG,), _flood, refused=frozenset({"bounded"}))
    yield from _calls()
