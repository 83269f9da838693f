"""What a tenant's learned filter refused, told to the operator: call, argument, program, remedy.

Either a notification brings it (``mode: notify``), or the kernel's log, where the kernel
keeps one of it (CONFIG_AUDIT): the call and the program, but not the argument.
"""

from __future__ import annotations

import os
import select

from isochamber import paths
from isochamber.errors import printable
from isochamber.launch import lean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_MOST = 100  # lines a run: a tenant must not flood its operator
_RECORD = b"audit: type=1326 "  # AUDIT_SECCOMP
_LONGEST_RECORD = 8192
_A_MOMENT = 500  # milliseconds that a record of a death may take from the kernel's queue to its log


class Refusals:
    """Says each thing once."""

    def __init__(self, root: str, tenant: str, say: Callable[[str], None]) -> None:
        self._root, self._tenant, self._say = root, tenant, say
        self._names: dict[str, Any] | None = None
        self._said: set[tuple[str, str]] = set()

    def add(self, number: int, arguments: tuple[int, ...] | None, program: str, what: str = "was refused") -> None:
        """Report a call; ``arguments`` None: not known."""
        call = self.call(number, arguments)
        if (call, program) in self._said or len(self._said) > _MOST:
            return
        self._said.add((call, program))
        if len(self._said) > _MOST:
            self._say(f"{self._tenant}: seccomp: more than {_MOST} different calls: no more of them is said")
            return
        self._say(
            f"{self._tenant}: seccomp: {call} of {printable(program)} {what}: isochamber learn {self._tenant} allows it"
        )

    def call(self, number: int, arguments: tuple[int, ...] | None) -> str:
        """Return the call as learned lists write it, such as ``socket(AF_INET6)``."""
        if self._names is None:
            self._names = self._read()
        name = self._names["calls"].get(str(number), f"system call {number}")
        if name not in self._names["matters"] or arguments is None:
            return str(name)
        index, bits, values = self._names["matters"][name]
        return f"{name}({_text(arguments[index] & 0xFFFFFFFF, bits, values)})"

    def _read(self) -> dict[str, Any]:
        try:
            with open(f"{self._root}/{paths.FILTERS}/names-{os.uname().machine}.json", "rb") as file:
                names = lean.parse(file.read())
        except (OSError, ValueError):
            names = None
        return names if isinstance(names, dict) else {"calls": {}, "matters": {}}


def death(tenant: str, mode: str) -> str:
    """Return what is said of a tenant that ended by SIGSYS, where the kernel's log did not tell for which call."""
    remedy = f"isochamber learn {tenant} would allow" if mode == "kill" else "no tenant may make"
    return f"{tenant}: seccomp: killed by its filter (SIGSYS), for a call that {remedy}"


def _text(value: int, bits: bool, names: dict[str, str]) -> str:
    if not bits:
        return names.get(str(value), f"{value:#x}")
    words = []
    for number, name in names.items():
        if int(number) > 0xFF and value & int(number):
            words.append(name)
            value &= ~int(number)
    if value:
        words.append(names.get(str(value), f"{value:#x}"))
    return "|".join(words) or "0x0"


class KernelLog:
    """The kernel's log from here on, for one range of uids; silent where it can't be read."""

    def __init__(self, uid_base: int, uid_count: int) -> None:
        self._uids = range(uid_base, uid_base + uid_count)
        self._file = -1
        try:
            self._file = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._file, 0, os.SEEK_END)
        except OSError:
            self.close()

    def tell(self, refusals: Refusals, mode: str, *, expected: bool) -> bool:
        """Report every record of the range, and return whether there was one; ``expected``: wait a moment for it."""
        if self._file < 0:
            return False
        found = self._drain(refusals, mode)
        poller = select.poll()
        poller.register(self._file, select.POLLIN)
        while expected and not found and poller.poll(_A_MOMENT):
            found = self._drain(refusals, mode)
        return found

    def _drain(self, refusals: Refusals, mode: str) -> bool:
        found = False
        while True:
            try:
                record = os.read(self._file, _LONGEST_RECORD)
            except BrokenPipeError:
                continue  # overwritten before we came: the next one
            except OSError:
                return found
            found |= self._record(record, refusals, mode)

    def _record(self, record: bytes, refusals: Refusals, mode: str) -> bool:
        _, mark, text = record.partition(_RECORD)
        fields = dict(word.split(b"=", 1) for word in text.split() if b"=" in word)
        try:
            if not mark or int(fields[b"uid"]) not in self._uids:
                return False
            number, exe = int(fields[b"syscall"]), fields[b"exe"].strip(b'"')
        except (KeyError, ValueError):
            return False
        what = {"log": "is not in its list", "kill": "killed it"}.get(mode, "was refused")
        refusals.add(number, None, os.fsdecode(exe), what)
        return True

    def close(self) -> None:
        """Let the log go."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1
