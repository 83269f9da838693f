"""Ranges of host uids: which slots of systemd's container range are taken, and the first that is free.

A range is 65,536 ids inside systemd's container range (systemd's UIDS-GIDS.md), a slot
its number. The preferred slot is a hash of the tid, as systemd-nspawn picks it, so that
a tenant mostly gets the same range again even when everything was lost; a taken one
gives way to the next free one.

What is taken is read from the disk: who owns the tenants' uppers, containers.json,
/etc/passwd and its like. A run that makes thousands of tenants would look at all others
for each, so a process remembers what it saw, and looks again only at what changed:

- tenants that another process gave a range to: it says so in the news, a file beside the
  lock "identities", and writes there only while it holds that lock;
- names that came or went, when tenants_fs has another time than this process left it
  with, or was listed a second ago (its time may be too coarse);
- tenants that had no range; containers.json, and the files of /etc, when they are other files.
"""

import os
import time
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from pathlib import Path

from isochamber import paths
from isochamber.build import registry, tree
from isochamber.build.state import State
from isochamber.errors import IsochamberError

UID_COUNT = 65_536
FIRST, LAST = 524_288, 1_879_048_191
SLOTS = (LAST + 1 - FIRST) // UID_COUNT
ETC = Path("/etc")

_OWNED = tuple(f"{name}{slot}" for name in (paths.UPPER, paths.WORKDIR) for slot in paths.SLOTS)
_NOBODY = -1  # a tenant's directory that belongs to no range: it has nothing inside yet, or is not mounted
_BELIEVED = 1.0  # seconds for which the list of tenants is believed for its time alone
_LONGEST_NEWS = 1 << 20  # bytes


def slots(first: int, last: int) -> range:
    """Return the slots that the ids ``first`` to ``last`` touch; none outside the container range."""
    low, high = max(first, FIRST), min(last, LAST)
    return range((low - FIRST) // UID_COUNT, (high - FIRST) // UID_COUNT + 1) if low <= high else range(0)


def preferred_slot(tid: str) -> int:
    """Return which of the machine's ranges the tid hashes to."""
    return int(tid[:12], 16) % SLOTS


def first_free(tid: str, taken: Container[int]) -> int:
    """Return the first uid of the tenant's range: its preferred slot, or the next that is not in ``taken`` (slots).

    Raises IsochamberError when every range is taken.
    """
    start = preferred_slot(tid)
    for step in range(SLOTS):
        slot = (start + step) % SLOTS
        if slot not in taken:
            return FIRST + slot * UID_COUNT
    raise IsochamberError("every uid range of this machine is taken", stage="dirs", hint="delete tenants, or prune")


def owner(state: State, tid: str) -> int | None:
    """Return the first uid of the range that the tenant's upper (or what is left of it) belongs to."""
    directory = os.fspath(state.tenant_fs(tid))
    for part in _OWNED:
        try:
            uid = os.lstat(f"{directory}/{part}").st_uid
        except FileNotFoundError:
            continue
        if FIRST <= uid <= LAST and (uid - FIRST) % UID_COUNT == 0:
            return uid
    return None


def allocate(state: State, tid: str) -> int:
    """Return the first uid of a range that nobody has; the caller holds the lock "identities".

    Raises OSError, IsochamberError.
    """
    taken = _taken(state)
    taken.look()
    return first_free(tid, taken)


def announce(state: State, tid: str) -> None:
    """Say that a tenant is about to get a range, before anything on disk carries it; under the same lock."""
    _taken(state).announce(tid)


def given(state: State) -> None:
    """Say that this process has made what it announced, before it gives the lock back. Raises OSError."""
    _taken(state).expect()


class _Taken:
    """What this process knows of one state directory. As a container: of the slots that are taken."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._tenants = state.root / paths.TENANTS_FS
        self._news = Path(paths.product_lock(state.identifier, "identities-news"))
        self._heard = (b"", 0)  # of the news: the first line, which tells one file from the next, and bytes
        self._owners: dict[str, int] = {}  # tid -> slot, or _NOBODY
        self._owned: Counter[int] = Counter()  # slot -> how many
        self._uncertain: set[str] = set()  # to be looked at
        self._time = -1  # of tenants_fs, when its names were those of _owners
        self._before = 0  # the same, before this process made something there
        self._listed = 0.0  # monotonic seconds
        self._entries: Mapping[str, registry.Entry] | None = None
        self._by_entries: set[int] = set()
        self._fresh: set[int] = set()  # of entries that are not in the file yet
        self._files: dict[str, tuple[tuple[int, ...], set[int]]] = {}

    def __contains__(self, slot: object) -> bool:
        return (
            slot in self._by_entries
            or slot in self._fresh
            or bool(self._owned.get(slot))  # type: ignore[call-overload] # only slots are asked for
            or any(slot in found for _, found in self._files.values())
        )

    def look(self) -> None:
        """Look at what has changed since the last time."""
        self._look_at_owners()
        self._look_at_entries()
        for name in ("passwd", "group", "subuid", "subgid"):
            self._look_at(name)

    def announce(self, tid: str) -> None:
        """Write the news: in /run, for a start of the machine ends whoever remembers."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._news, flags, 0o600)
        try:
            if not os.fstat(descriptor).st_size:
                os.write(descriptor, f"{time.time_ns()}\n".encode())
            os.write(descriptor, f"{tid}\n".encode())
            too_long = os.fstat(descriptor).st_size > _LONGEST_NEWS
        finally:
            os.close(descriptor)
        self._before = self._tenants.stat().st_mtime_ns
        if too_long:
            self._news.unlink()  # the next one is another file, and everybody looks at everything once

    def expect(self) -> None:
        """Remember the time that tenants_fs has by what this process did, if nobody else had done anything."""
        if self._before == self._time:
            self._time = self._tenants.stat().st_mtime_ns

    def _look_at_owners(self) -> None:
        self._hear_news()
        changed, now = self._tenants.stat().st_mtime_ns, time.monotonic()  # before the names are read
        if changed != self._time or now - self._listed > _BELIEVED:
            names = set(os.listdir(self._tenants))
            for tid in self._owners.keys() - names:
                self._forget(tid)
            self._uncertain |= names - self._owners.keys()
            self._time, self._listed = changed, now
        for tid in tuple(self._uncertain):
            uid_base = owner(self._state, tid)
            self._set(tid, _NOBODY if uid_base is None else (uid_base - FIRST) // UID_COUNT)

    def _hear_news(self) -> None:
        try:
            with self._news.open("rb") as file:
                head = file.readline()
                file.seek(max(self._heard[1], len(head)))
                tids = file.read().decode().split()
                heard = head, file.tell()
        except FileNotFoundError:
            heard, tids = (b"", 0), []
        if heard[0] != self._heard[0]:
            for tid in tuple(self._owners):
                self._forget(tid)
            self._time = -1  # everything is looked at again
            tids = []
        self._uncertain.update(tids)
        self._heard = heard

    def _set(self, tid: str, slot: int) -> None:
        self._forget(tid)
        self._owners[tid] = slot
        if slot == _NOBODY:
            self._uncertain.add(tid)
        else:
            self._owned[slot] += 1

    def _forget(self, tid: str) -> None:
        slot = self._owners.pop(tid, _NOBODY)
        self._uncertain.discard(tid)
        if slot != _NOBODY:
            self._owned[slot] -= 1

    def _look_at_entries(self) -> None:
        fresh, entries = registry.read_apart(self._state)
        self._fresh = set(_slots_of(fresh))
        if entries is not self._entries:
            self._entries, self._by_entries = entries, set(_slots_of(entries))

    def _look_at(self, name: str) -> None:
        """Look at a file of /etc, of users, groups, or subordinate ids (subuid(5))."""
        path = ETC / name
        try:
            status = path.stat()
        except FileNotFoundError:
            self._files.pop(name, None)
            return
        identity = tree.stamp_of(status)
        known = self._files.get(name)
        if known is None or known[0] != identity:
            self._files[name] = identity, {slot for first, last in _ids(path) for slot in slots(first, last)}


# Of this process (and of those that it forks, each on its own from then on), by state directory.
_known: dict[str, _Taken] = {}


def _taken(state: State) -> _Taken:
    if state.identifier not in _known:
        _known[state.identifier] = _Taken(state)
    return _known[state.identifier]


def _slots_of(entries: Mapping[str, registry.Entry]) -> Iterator[int]:
    for entry in entries.values():
        yield from slots(entry["uid_base"], entry["uid_base"] + entry["uid_count"] - 1)


def _ids(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of what a file of /etc gives away."""
    for line in path.read_text(errors="replace").splitlines():
        fields = line.split(":")
        if path.name in ("passwd", "group"):
            if len(fields) > 2 and fields[2].isdigit():
                yield int(fields[2]), int(fields[2])
        elif len(fields) == 3 and fields[1].isdigit() and fields[2].isdigit():
            yield int(fields[1]), int(fields[1]) + int(fields[2]) - 1
