"""seccomp(2): the tenant's filters, compiled ahead by the build half; the last is the last thing before the exec."""

from __future__ import annotations

import os

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.launch import channel, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket

    from isochamber.launch.filterset import Seccomp

_INSTRUCTION = 8  # bytes, struct sock_filter
_MODE_FILTER = 2  # as proc_pid_status(5) says it


class Filters:
    """The bytes of every program of a start, read while the state directory could still be seen."""

    __slots__ = ("flags", "learned", "programs")

    def __init__(self, root: str, wanted: Seccomp, *, listens: bool) -> None:
        """Read the programs; raises IsochamberError for one that is not there or is no program.

        ``listens``: whoever starts the tenant takes the listener of a learned filter that
        hands calls over. Without one the kernel itself answers these with ENOSYS.
        """
        self.programs = [_read(root, digest) for digest in wanted.filters]
        self.learned = None if wanted.learned is None else _read(root, wanted.learned)
        self.flags = 0
        if listens and wanted.mode in ("notify", "learn"):
            self.flags = syscalls.SECCOMP_FILTER_FLAG_NEW_LISTENER
        elif wanted.mode == "errno":
            self.flags = syscalls.SECCOMP_FILTER_FLAG_LOG  # the kernel logs the other modes' refusals anyway


def _read(root: str, digest: str) -> bytes:
    path = f"{root}/{paths.FILTERS}/{digest}.bpf"
    try:
        with open(path, "rb") as file:
            program = file.read()
    except OSError as error:
        raise IsochamberError.from_os(
            error, stage="launch", path=path, hint="run ./doit: it compiles the filter anew"
        ) from error
    if not program or len(program) % _INSTRUCTION:
        raise IsochamberError("is no filter", stage="launch", path=path, hint="remove it and run ./doit")
    return program


def load(filters: Filters, messages: _socket.socket, *, learned: bool) -> None:
    """Load the programs that are common to many, or the ``learned`` one, and look whether the kernel took them.

    After the first of the common ones this process makes only calls that every tenant may make, and
    after the learned one only those that every program needs: read, write, close, execve, exit.
    Raises IsochamberError, OSError.
    """
    programs = ([] if filters.learned is None else [filters.learned]) if learned else filters.programs
    if not programs:
        return
    status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
    before, listener = _count(status), 0
    for program in programs:
        listener = syscalls.seccomp_filter(program, filters.flags if learned else 0)
    _check(status, before, len(programs))
    if listener:
        channel.send_listener(messages, listener)
    os.close(status)


def _fields(status: int) -> dict[bytes, bytes]:
    lines = os.pread(status, 1 << 16, 0).splitlines()
    return dict(line.split(b":", 1) for line in lines if line.startswith(b"Seccomp"))


def _count(status: int) -> int:
    """Return how many filters this process has already; 0 where the kernel (before 5.9) does not tell."""
    return int(_fields(status).get(b"Seccomp_filters", b"0"))


def _check(status: int, before: int, loaded: int) -> None:
    fields = _fields(status)
    mode, count = int(fields[b"Seccomp"]), fields.get(b"Seccomp_filters")
    if mode != _MODE_FILTER or (count is not None and int(count) != before + loaded):
        raise IsochamberError(
            f"its filters were not taken: Seccomp is {mode}, Seccomp_filters {int(count or 0)}, not {before + loaded}",
            stage="launch",
            hint="this is a bug of isochamber or of the kernel: nothing was started",
        )
