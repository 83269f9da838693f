"""System calls with harmless bad arguments, made in a tenant or by the host's root: refused, or did they arrive?"""

import errno
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from isochamber.build import filters
from isochamber.spec.policy import Denied
from tests.conftest import PROJECT
from tests.launch import tenants
from tests.launch.tenants import Tenant

SIGSYS = 31
HIGH = 1 << 32  # what the kernel does not look at in an int

Call = tuple[object, ...]  # name or number, arguments; "i" before it: by int 0x80


def number(call: str | int) -> int:
    """Return this machine's number of ``call``, negative when it has none."""
    seccomp = filters.library()
    return call if isinstance(call, int) else int(seccomp.resolve_syscall(seccomp.system_arch(), call))


def lines(calls: Sequence[Call]) -> str:
    """Return the probe's input."""
    written = []
    for call in calls:
        entry, *rest = call if call[0] == "i" else ("s", *call)
        name, *arguments = rest
        numbers = [number(name), *(int(str(argument)) for argument in arguments)]  # type: ignore[arg-type]
        written.append(" ".join([str(entry), *map(str, [*numbers, *[0] * 7][:7])]))
    return "".join(f"{line}\n" for line in written)


def call_of(row: Denied, extra: int = 0) -> Call:
    """Return a call that ``row`` refuses, with arguments of which nothing else becomes true.

    A pointer of 1 is EFAULT, a socket's type of 99 is EINVAL before any module is looked for.
    """
    arguments = [1] * 6
    if row.call in ("socket", "socketpair"):
        arguments = [1, 99, 0, 1, 0, 0]
    elif row.call == "kcmp":
        arguments = [1 << 30] * 6  # nobody's process
    elif row.call == "clone":
        arguments = [1, 0, 0, 0, 0, 0]
    elif row.call == "ioctl":
        arguments = [0, 1, 1, 0, 0, 0]
    for index, mask, value in row.conditions:
        arguments[index] = value if extra & mask else value | extra
    return (row.call, *arguments)


def words(output: str) -> list[str]:
    """Return the results as names of errors; "worked" for those that are none."""
    return [errno.errorcode[-int(line)] if line.startswith("-") else "worked" for line in output.split()]


class Probe:
    """A tenant with the program in its /home."""

    def __init__(self, tenant: Tenant, program: Path) -> None:
        self.tenant = tenant
        shutil.copy(program, tenant.home / "probe")

    def run(self, *calls: Call) -> tenants.Done:
        """Make the calls, one after the other, in one process."""
        return self.tenant.run("/home/probe", stdin=None, input=lines(calls))

    def results(self, *calls: Call) -> list[str]:
        """Return what each call said; every one must be answered."""
        done = self.run(*calls)
        assert done.returncode == 0, done.stderr
        return words(done.stdout)


HOST_ROOT = """\
import os, sys
sys.path.insert(0, {project!r})
from isochamber.launch import seccomp, syscalls
syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
for path in sys.argv[2:]:
    syscalls.seccomp_filter(open(path, "rb").read())
os.execv(sys.argv[1], sys.argv[1:2])
"""


def as_hosts_root(program: Path, calls: Sequence[Call], loaded: Sequence[Path] = ()) -> list[str]:
    """Make the calls with every right there is, in throw-away namespaces, with only these filters."""
    script = HOST_ROOT.format(project=str(PROJECT))
    argv = ["unshare", "-muin", sys.executable, "-I", "-S", "-c", script, str(program), *map(str, loaded)]
    done = subprocess.run(
        argv, input=lines(calls), capture_output=True, text=True, timeout=60, check=False, start_new_session=True
    )
    assert done.returncode == 0, done.stderr
    return words(done.stdout)


def has_32_bit_entry() -> bool:
    """Say whether this kernel would serve int 0x80."""
    return platform.machine() == "x86_64" and os.path.exists("/proc/sys/abi/vsyscall32")
