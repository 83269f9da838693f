"""What a learned list leaves: calls, and arguments, that were not seen while it was learned."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from isochamber.build import filters
from isochamber.build.state import State
from isochamber.spec import policy
from isochamber.spec.learned import Learned
from tests.escape.attempts import Attempt, Guard, Off
from tests.escape.worlds import Worlds

LEARNED = Guard("a learned list")

# row, what it is, the probe's words; none of these calls is on the list, or not with that argument.
_CALLS = (
    ("K19", "personality without address randomization", "personality 0x0040000"),
    ("K19", "personality with executable data", "personality 0x0400000"),
    ("K20", "a file that lies in no file system", "memfd_create s:x 0"),
    ("K20", "running a program by its descriptor", "execveat fd:/bin/true s: 0 0 0x1000"),
    ("K21", "an argument of ioctl that was not learned", "ioctl 0 0x5421 mem:4"),
    ("K21", "a socket family that was not learned", "socket 10 1 0"),
    ("K21", "a call that was learned only while it was built", "syncfs 1"),
    ("K21", "ptrace of its own", "ptrace 0 0 0 0"),
    ("K21", "the memory of its own by process_vm_readv", "process_vm_readv self iov: 1 iov: 1 0"),
    ("K21", "shared memory", "shmget 0 4096 0x3b6"),
    ("K21", "moving pages", "move_pages 0 0 0 0 0 0"),
)
_VALUES = {"ioctl": ("TCGETS",), "socket": ("AF_UNIX",)}


def _list() -> filters.Wanted:
    """Return the filters of a tenant whose list holds every call but those above."""
    seccomp = filters.library()
    missing = {call.split()[0] for _, _, call in _CALLS} - set(_VALUES)
    calls = {}
    for number in range(policy.LAST_REVIEWED + 1):
        try:
            name = str(seccomp.resolve_syscall(seccomp.system_arch(), number).decode())
        except ValueError:
            continue
        if name not in missing:
            calls[name] = _VALUES.get(name, ())
    program = filters.learned(Learned(calls), frozenset(), "errno")
    return filters.Wanted(filters.default(), program, "errno")


def _run(worlds: Worlds, off: Off, attempt: Attempt) -> str:
    changes = {}
    if LEARNED not in off:
        wanted = _list()
        wanted.ensure(State(worlds.root))
        changes["seccomp"] = wanted.entry()
    tenant = worlds.tenant(off - {LEARNED}, **changes)
    shutil.copy(worlds.probe, tenant.home / "probe")
    call = next(call for _, title, call in _CALLS if title == attempt.title)
    done = worlds.start(tenant, off - {LEARNED}, "/bin/sh", "-c", f"/home/probe raw {call}; echo $?")
    *said, status = (done.stdout or done.stderr).splitlines()
    return said[-1] if said else f"worked, exit {status}"  # what was run instead says nothing


def attempts() -> Iterator[Attempt]:
    """Yield every attempt of this group."""
    for row, title, _ in _CALLS:
        yield Attempt(row, title, (LEARNED,), _run, refused=frozenset({"EPERM"}))
