"""One entry of a containers.json that is too large to be read whole at every start."""

from __future__ import annotations

import os

from isochamber.launch import lean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_PIECE = 1 << 13  # bytes that are read at once; an entry has some 2,000


def by_name(descriptor: int, size: int, tenant: str) -> Mapping[str, Any] | None:
    """Return the entry of the name ``tenant`` from a file of ``size`` bytes, as the registry writes it. Raises OSError.

    It writes one entry a line, sorted by name: the file is halved until the line is found.
    None where it is not there, or the file is not like that: then all of it must be read.
    So must it for what may be a tid, since one tenant may be named like another's.
    """
    if len(tenant) == 32 and set(tenant) <= set("0123456789abcdef"):
        return None
    low, high = 0, size  # where the line that is looked for begins
    while low < high:
        begin, line = _line_over(descriptor, low, (low + high) // 2)
        try:
            entry = lean.parse(line.rstrip(b", \r"))
        except ValueError:
            return None
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(name, str):
            return None
        if name == tenant:
            return entry
        if name < tenant:
            low = begin + len(line) + 1
        else:
            high = begin
    return None


def _line_over(descriptor: int, low: int, middle: int) -> tuple[int, bytes]:
    """Return where the line around the byte ``middle`` begins, not before ``low``, and the line: b"" if it is long."""
    start = max(low, middle - _PIECE)
    begin = start + os.pread(descriptor, middle - start, start).rfind(b"\n") + 1
    line, newline, _ = os.pread(descriptor, _PIECE, begin).partition(b"\n")
    return begin, line if newline else b""
