"""Files of the host: what Landlock does not stop on most kernels, descriptors handed on, and archives."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from isochamber.build import restore
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from tests.crash import forged
from tests.escape import exhaustion
from tests.escape.attempts import Attempt, Guard, Off, Run
from tests.escape.guards import FILTER, OLD_ROOT, RIGHTS, ROOT
from tests.escape.packages import LINKS
from tests.escape.races import compiled
from tests.escape.worlds import Worlds, patched
from tests.launch import tenants

PATHS = Guard("names in an archive are plain", patches=(("isochamber.build.restore:_check_path", lambda path: None),))

# K23: what is done to a file of the host, and how the host sees that it was done.
_CHANGES = (
    ("the mode", "chmod 606 FILE"),
    ("the owner", "chown 7:7 FILE"),
    ("the times", "touch -d @1 FILE"),
    (
        "an attribute",
        "perl -e 'my ($f, $n, $v) = (@ARGV, q(user.evil), q(x)); syscall(SETXATTR, $f, $n, $v, 1, 0)' FILE",
    ),
)
_SETXATTR = 188 if os.uname().machine == "x86_64" else 5


def _changed(script: str) -> Run:
    def run(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        path = worlds.public / "changed"
        path.unlink(missing_ok=True)
        path.write_text("the host's\n")
        before = _look(path)
        worlds.word(off, script.replace("SETXATTR", str(_SETXATTR)).replace("FILE", str(path)) + " 2>/dev/null; true")
        return "nothing" if _look(path) == before else "escaped"

    return run


def _look(path: Path) -> tuple[object, ...]:
    status = path.stat()
    return status.st_mode, status.st_uid, status.st_mtime_ns, tuple(os.listxattr(path))


def _locked(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    path = worlds.public / "locked"
    path.write_text("the host's\n")
    return worlds.word(off, f"flock -n {path} echo worked 2>/dev/null || echo nothing")


def _pathname_socket(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """A socket of the host's by its path: before ABI 9 Landlock stops nobody who sees it."""
    path = worlds.public / "socket"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o777)
        listener.listen()
        made = f'use Socket; socket(S, AF_UNIX, SOCK_STREAM, 0); $to = pack_sockaddr_un("{path}")'
        return worlds.word(off, f'perl -e \'{made}; print connect(S, $to) ? "worked" : "nothing"\'')


def _handed_on(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """F26: a tenant hands a directory to another by a daemon of the host's, which passes on what it gets."""
    ipc = worlds.public / "handed"
    shutil.rmtree(ipc, ignore_errors=True)
    ipc.mkdir()
    program = compiled(worlds.scratch, "helper", "-static")
    giver, taker = worlds.tenant(off, ipc=str(ipc)), worlds.tenant(ipc=str(ipc))
    for tenant in (giver, taker):
        shutil.copy(program, tenant.home)
    (giver.home / "mark").write_text("the giver's\n")
    with contextlib.ExitStack() as stack:
        listeners = []
        for name in ("give", "take"):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(ipc / name))
            (ipc / name).chmod(0o777)
            listener.listen()
            listener.settimeout(tenants.DEADLINE)
            listeners.append(listener)
        send = "exec /home/helper send /tmp/tenant_ipc/give /"
        stack.enter_context(exhaustion.started(worlds, giver, off, send))
        given = stack.enter_context(listeners[0].accept()[0])
        _, descriptors, *_ = socket.recv_fds(given, 1, 4)
        up = "../../../.."
        outside = f"{up}{worlds.canary_below_the_old_root} {up}{worlds.canary}"
        tenants.write_entries(taker.containers, [giver.entry, taker.entry])
        words = worlds.words(
            taker, frozenset(), "/home/helper", "take", "/tmp/tenant_ipc/take", *outside.split(), "home/mark"
        )
        import subprocess

        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as taking:
            taken = stack.enter_context(listeners[1].accept()[0])
            socket.send_fds(taken, [b"x"], descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            assert taking.stdout is not None
            word = taking.stdout.read().strip()
    return {"untouched": "escaped", "the giver's": "worked"}.get(word, word)


def _archive(form: str) -> Run:
    def run(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        """P14: an archive that somebody else wrote is restored."""
        with tempfile.TemporaryDirectory(prefix="isochamber-test-", dir=worlds.scratch) as name:
            directory = Path(name)
            state = State(directory / "state")
            state.create()
            outside = directory / "outside"
            outside.mkdir()
            (outside / "secret").write_text("secret")
            before = (outside / "secret").stat().st_ctime_ns  # of a link that is gone again, too
            forged.forge(directory / "forged", forged.members(form, outside))
            with patched(off), contextlib.suppress(IsochamberError, OSError):
                restore.restore(state, directory / "forged")
            reached = (outside / "secret").stat().st_ctime_ns != before or len(list(outside.iterdir())) > 1
            return "escaped" if reached or (state.staging / "escaped").exists() else "refused"

    return run


# F22: a user namespace of its own, an overlay in it, and a set-uid program with a capability that is copied up.
_COPY_UP = """
d=/home/f22; mkdir -p $d/lower $d/upper $d/work $d/merged; cp /bin/true $d/lower/true; chmod 4755 $d/lower/true
options=userxattr,lowerdir=$d/lower,upperdir=$d/upper,workdir=$d/work
error=$(unshare -rm sh -c "mount -t overlay o -o $options $d/merged && touch $d/merged/true" 2>&1) && exec echo worked
echo "${error##*: }"
"""


def _copied_up(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """As a user of the tenant: its root may map itself nowhere without CAP_SETFCAP (user_namespaces(7))."""
    return worlds.word(off, _COPY_UP, uid=1000, gid=1000)


def attempts() -> Iterator[Attempt]:
    """Yield every attempt of this group."""
    for title, script in _CHANGES:
        yield Attempt(
            "K23", f"{title} of a file of the host", (ROOT, RIGHTS), _changed(script), refused=frozenset({"nothing"})
        )
    nothing = frozenset({"nothing"})
    yield Attempt("K23", "locking a file of the host", (ROOT,), _locked, refused=nothing)
    yield Attempt("K23", "a socket of the host by its path", (ROOT,), _pathname_socket, refused=nothing)
    yield Attempt("F26", "the host by a directory that another tenant hands on", (OLD_ROOT,), _handed_on, inside=True)
    yield Attempt("F22", "a set-uid program copied up in a namespace of its own", (FILTER,), _copied_up,
                  refused=frozenset({"Operation not permitted"}))  # fmt: skip
    for form, guards in (
        ("dot dot", (LINKS, PATHS)), ("through a symlink", (LINKS,)), ("a hard link through a symlink", (LINKS,)),
    ):  # fmt: skip
        yield Attempt("P14", f"an archive with {form}", guards, _archive(form), refused=frozenset({"refused"}))
