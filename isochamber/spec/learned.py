"""A tenant's learned list, ``seccomp.yaml``: which system calls it was seen to make, and which of them were approved.

Written by ``isochamber learn``, and open to the operator's editor: what is wrong in it is
said with file, line and column.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isochamber.errors import SpecError, printable
from isochamber.spec import arguments, document, policy
from isochamber.spec.document import Document

FILE = "seccomp.yaml"
VERSION = 1
_CALL = re.compile(r"[a-z_][a-z0-9_]{0,40}")
_KEYS = ("version", "architectures", "approved", "calls")


@dataclass(frozen=True, slots=True)
class Learned:
    """What was seen, all of it as names."""

    calls: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # values of the argument that matters, if any
    approved: frozenset[str] = frozenset()  # names as ``seccomp: approved:`` writes them
    architectures: frozenset[str] = frozenset()  # where it was learned, as uname(2) says it

    def names(self) -> set[str]:
        """Return every call as ``approved:`` would write it: ``call``, or ``call:ARGUMENT`` for each value."""
        return {
            f"{call}:{value}" if value else call for call, values in self.calls.items() for value in values or ("",)
        }

    def merged(self, other: "Learned") -> "Learned":
        """Return what either has."""
        calls = {
            call: tuple(sorted({*self.calls.get(call, ()), *other.calls.get(call, ())}))
            for call in sorted({*self.calls, *other.calls})
        }
        return Learned(calls, self.approved | other.approved, self.architectures | other.architectures)


def text(learned: Learned, tenant: str) -> str:
    """Return the file: sorted, one value a line, so that two versions can be compared by eye and by diff(1)."""
    lines = [
        f"# System calls that {tenant} was seen to make: isochamber learn {tenant}",
        "# May be edited; ./doit compiles it anew. What every program needs is let through in any case.",
        f"version: {VERSION}",
        f"architectures: [{', '.join(sorted(learned.architectures))}]",
        *_list("approved", sorted(learned.approved)),
        "calls:" if learned.calls else "calls: {}",
    ]
    for call, values in sorted(learned.calls.items()):
        lines += [f"  {call}:", *(f"    - {value}" for value in values)]
    return "".join(f"{line}\n" for line in lines)


def _list(key: str, values: list[str]) -> list[str]:
    return [f"{key}:", *(f"  - {value}" for value in values)] if values else [f"{key}: []"]


def approvable(name: object) -> bool:
    """Say whether ``seccomp: approved:`` may hold ``name``."""
    if not isinstance(name, str):
        return False
    row = policy.DENIED.get(name)
    return row.approvable if row is not None else name in policy.DANGEROUS


def read(path: Path) -> Learned | None:
    """Return what the file says, None where there is none; raises SpecError with every problem."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SpecError((f"{path}: can't be read: {error.strerror}",)) from None
    parsed = document.parse(str(path), content)
    reader = _Reader(parsed)
    found = reader.read()
    if reader.problems:
        raise SpecError(tuple(reader.problems))
    return found


class _Reader:
    """Checks the file's value; its problems are lines."""

    def __init__(self, parsed: Document) -> None:
        self._document = parsed
        self.problems = [f"{place}: {what}" for place, _path, what in parsed.problems]

    def _wrong(self, path: tuple[object, ...], what: str) -> None:
        self.problems.append(f"{self._document.place(path)}: {what}")

    def read(self) -> Learned:
        value = self._document.value
        if self.problems:
            return Learned()
        if not isinstance(value, dict):
            self._wrong((), "must be a mapping")
            return Learned()
        for key in value:
            if key not in _KEYS:
                self._wrong((key,), f"unknown key {printable(key)}, allowed: {', '.join(_KEYS)}")
        if value.get("version") != VERSION:
            self._wrong(("version",), f"version must be {VERSION}")
        approved = self._texts(value, "approved")
        for name in approved:
            if not approvable(name):
                self._wrong(("approved",), f"{printable(name)} can't be approved, see docs/explanation/seccomp.md")
        return Learned(
            self._calls(value.get("calls")), frozenset(approved), frozenset(self._texts(value, "architectures"))
        )

    def _texts(self, value: Mapping[str, Any], key: str) -> list[str]:
        texts = value.get(key) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            self._wrong((key,), f"{key} must be a list of texts")
            return []
        return texts

    def _calls(self, value: object) -> dict[str, tuple[str, ...]]:
        if not isinstance(value, dict):
            self._wrong(("calls",), "calls must be a mapping")
            return {}
        return {call: self._values(call, values) for call, values in sorted(value.items())}

    def _values(self, call: str, values: object) -> tuple[str, ...]:
        argument = arguments.MATTERS.get(call)
        if not _CALL.fullmatch(call):
            self._wrong(("calls", call), f"{printable(call)} is no name of a system call")
        elif argument is None:
            if values is not None:
                self._wrong(("calls", call), f"{call} takes no values: none of its arguments is looked at")
        elif isinstance(values, list) and values:
            return tuple(sorted(self._known(call, value) for value in values))
        else:
            self._wrong(("calls", call), f"{call} must name the values that are let through")
        return ()

    def _known(self, call: str, value: object) -> str:
        argument = arguments.MATTERS[call]
        try:
            return argument.text(value if isinstance(value, int) else argument.number(str(value)))
        except ValueError:
            self._wrong(("calls", call), f"{call}: {printable(value)} is no value, must be a number or a name")
            return ""


def seen(calls: Iterable[tuple[str, int]], architecture: str) -> Learned:
    """Return what a run made: pairs of a call's name and the value of its argument that matters, -1 for none."""
    found: dict[str, set[str]] = {}
    for call, value in calls:
        argument = arguments.MATTERS.get(call)
        found.setdefault(call, set()).update(() if argument is None else (argument.text(value),))
    return Learned(
        {call: tuple(sorted(values)) for call, values in sorted(found.items())}, frozenset(), frozenset({architecture})
    )
