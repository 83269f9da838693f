"""containers.json: the contract with the run-time half. One entry a line, replaced as a whole, under a lock."""

import contextlib
import json
import os
import time
from collections import ChainMap
from collections.abc import Iterator, Mapping
from typing import Any

from isochamber import paths
from isochamber.build import durable, locks, tree
from isochamber.build.state import State
from isochamber.errors import IsochamberError

VERSION = 1
Entry = dict[str, Any]

_HINT = "run ./doit: it is made anew with the same tids and uid ranges"

# One parse a version of the file, however many tenants ask: path -> (identity, entries).
_parsed: dict[str, tuple[tuple[int, ...], dict[str, Entry]]] = {}

_SHARE = 20  # of a run that puts many entries, at most one part in so many goes into writing the file


class _Together:
    """Entries of one process that are not in the file yet; what was put counts for its own reads at once."""

    def __init__(self, state: State) -> None:
        self.path, self.process = state.containers, os.getpid()
        self.entries: dict[str, Entry] = {}
        self.due = 0.0  # monotonic seconds


_together: _Together | None = None


@contextlib.contextmanager
def together(state: State) -> Iterator[None]:
    """Write what this process puts within the block now and then, and all of it at the block's end.

    The file is replaced as a whole, so a write an entry would cost the square of their
    number. A cut loses puts that came since the last write, as if it had come before them.
    Raises IsochamberError at the end when it can't be written.
    """
    global _together  # noqa: PLW0603 - one process, one run of the graph
    _together = _Together(state)
    try:
        yield
    finally:
        try:
            settle(state)
        finally:
            _together = None


def _held_back(state: State) -> _Together | None:
    """Return what the block holds back; a process forked within it writes its own puts itself."""
    held = _together
    return held if held is not None and held.path == state.containers and held.process == os.getpid() else None


def settle(state: State) -> None:
    """Write what :func:`together` holds back, if anything; raises IsochamberError."""
    held = _held_back(state)
    if held is not None and held.entries:
        _change(state, {})


def read(state: State, *, salvage: bool = False) -> Mapping[str, Entry]:
    """Return tid -> entry; no file is no entry. Raises as :func:`_read_file`."""
    held, found = _held_back(state), _read_file(state, salvage=salvage)
    return ChainMap(held.entries, found) if held is not None and held.entries else found


def read_apart(state: State) -> tuple[Mapping[str, Entry], Mapping[str, Entry]]:
    """Return (entries that are not in the file yet, those that are: the same object while the file is the same).

    A damaged file says what can still be read of it. Raises IsochamberError.
    """
    held = _held_back(state)
    return {} if held is None else held.entries, _read_file(state, salvage=True)


def _read_file(state: State, *, salvage: bool) -> dict[str, Entry]:
    """Return what the file says; no file is no entry.

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
        identity = tree.stamp_of(os.fstat(file.fileno()))
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
    """Add or replace one entry, in :func:`together` soon and else at once; raises IsochamberError."""
    held = _held_back(state)
    if held is not None:
        held.entries[entry["tid"]] = entry
        if time.monotonic() >= held.due:
            settle(state)
        return
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
    """Say whether the file is there and can be read, or is about to be written."""
    held = _held_back(state)
    return (held is not None and bool(held.entries)) or _is_whole_file(state)


def _is_whole_file(state: State) -> bool:
    try:
        return bool(_read_file(state, salvage=False)) or state.containers.exists()
    except IsochamberError:
        return False


def _still_there(state: State, entries: dict[str, Entry]) -> dict[str, Entry]:
    """Return those of tenants that nobody deleted while their entries were held back."""
    return {tid: entry for tid, entry in entries.items() if state.tenant_fs(tid).is_dir()}


def _change(state: State, add: dict[str, Entry], *, without: str | None = None) -> None:
    begun, held = time.monotonic(), _held_back(state)
    with locks.product_lock(state, "containers", lambda _line: None):
        former = _read_file(state, salvage=True)
        known = former if held is None else former | _still_there(state, held.entries)
        entries = {tid: entry for tid, entry in known.items() if tid != without} | add
        whole = _is_whole_file(state)
        if entries != former or not whole:
            try:
                if not whole:
                    _keep_damaged(state)
                status = durable.write_file(state.containers, encode(entries), staging=state.staging)
            except OSError as error:
                raise IsochamberError.from_os(error, stage="containers", path=state.containers) from error
            _parsed[str(state.containers)] = (tree.stamp_of(status), entries)
    if held is not None:
        held.entries.clear()
        now = time.monotonic()
        held.due = now + (_SHARE - 1) * (now - begun)
