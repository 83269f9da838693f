"""containers.json: the contract with the run-time half. One entry a line, replaced as a whole, under a lock."""

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

from isochamber import paths
from isochamber.build import durable, locks
from isochamber.build.state import State
from isochamber.errors import IsochamberError

VERSION = 1
Entry = dict[str, Any]

_HINT = "run ./doit: it is made anew with the same tids and uid ranges"

# One parse a version of the file, however many tenants ask: path -> (identity, entries).
_parsed: dict[str, tuple[tuple[int, ...], dict[str, Entry]]] = {}


def read(state: State, *, salvage: bool = False) -> Mapping[str, Entry]:
    """Return tid -> entry; no file is no entry.

    Raises IsochamberError for a damaged file; with ``salvage`` what can still be read of
    it counts, a line an entry, and the next ./doit makes the rest anew.
    """
    path = state.containers
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise IsochamberError.from_os(error, stage="containers", path=path, hint=_HINT) from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        known = _parsed.get(str(path))
        if known is not None and known[0] == identity:
            return known[1]
        content = file.read()
    try:
        entries = decode(content)
    except ValueError as error:
        if salvage:
            return salvaged(content)
        raise IsochamberError(f"is damaged: {error}", stage="containers", path=path, hint=_HINT) from error
    _parsed[str(path)] = (identity, entries)
    return entries


def decode(content: bytes) -> dict[str, Entry]:
    """Return tid -> entry; raises ValueError for anything but a list of our entries."""
    try:
        entries = json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(entries, list):
        raise ValueError("not a list")
    for entry in entries:
        if not isinstance(entry, dict) or entry.get("version") != VERSION:
            raise ValueError(f"an entry is not of version {VERSION}")
        if not all(isinstance(entry.get(key), str) for key in ("tid", "name")):
            raise ValueError("an entry has no tid or no name")
        if not all(isinstance(entry.get(key), int) for key in ("uid_base", "uid_count")):
            raise ValueError("an entry has no uid range")
    found = {entry["tid"]: entry for entry in entries}
    if len(found) != len(entries):
        raise ValueError("a tid stands twice")
    return found


def salvaged(content: bytes) -> dict[str, Entry]:
    """Return the entries of a damaged file that stand whole on their line, each tid once."""
    found: dict[str, Entry] = {}
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            found |= decode(b"[" + line.rstrip(b", ") + b"]")
    return found


def encode(entries: Mapping[str, Entry]) -> bytes:
    """Return the file's bytes: a JSON array, one entry a line, sorted by name."""
    lines = [
        json.dumps(entry, ensure_ascii=True) for entry in sorted(entries.values(), key=lambda entry: str(entry["name"]))
    ]
    return ("[\n" + ",\n".join(lines) + ("\n" if lines else "") + "]\n").encode("ascii")


def find(state: State, tenant: str) -> Entry | None:
    """Return the entry whose tid or name is ``tenant``, or None."""
    entries = read(state)
    return entries.get(tenant) or next((entry for entry in entries.values() if entry["name"] == tenant), None)


def put(state: State, entry: Entry) -> None:
    """Add or replace one entry; raises IsochamberError."""
    _change(state, {entry["tid"]: entry})


def rewrite(state: State) -> None:
    """Write what can be read of the file anew; raises IsochamberError."""
    _change(state, {})


def remove(state: State, tid: str) -> None:
    """Remove one entry; none is fine. Raises IsochamberError."""
    _change(state, {}, without=tid)


def _keep_damaged(state: State) -> None:
    """Put a damaged file aside: it may tell somebody what happened."""
    with contextlib.suppress(FileNotFoundError):
        aside = state.containers.with_name(f"{paths.CONTAINERS}.damaged")
        durable.write_file(aside, state.containers.read_bytes(), staging=state.staging)


def is_whole(state: State) -> bool:
    """Say whether the file is there and can be read."""
    try:
        return bool(read(state)) or state.containers.exists()
    except IsochamberError:
        return False


def _change(state: State, add: dict[str, Entry], *, without: str | None = None) -> None:
    with locks.product_lock(state, "containers", lambda _line: None):
        former = read(state, salvage=True)
        entries = {tid: entry for tid, entry in former.items() if tid != without} | add
        if entries == former and is_whole(state):
            return
        try:
            if not is_whole(state):
                _keep_damaged(state)
            durable.write_file(state.containers, encode(entries), staging=state.staging)
        except OSError as error:
            raise IsochamberError.from_os(error, stage="containers", path=state.containers) from error
