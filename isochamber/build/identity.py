"""Who a tenant is on this machine: its tid, its range of host uids, and the directories that carry both.

A range is 65,536 ids inside systemd's container range (systemd's UIDS-GIDS.md). The
preferred one is a hash of the tid, as systemd-nspawn picks it, so that a tenant
mostly gets the same range again even when everything was lost; a taken one gives
way to the next free one. What is allocated is read back from the owners on disk.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from isochamber import paths
from isochamber.build import disk, durable, home, locks, registry
from isochamber.build.state import State
from isochamber.errors import IsochamberError

UID_COUNT = 65_536
FIRST, LAST = 524_288, 1_879_048_191
_SLOTS = (LAST + 1 - FIRST) // UID_COUNT

UPPER, WORKDIR, OVERLAY, LOWERS = "upper", "workdir", "overlay", "lowers"
FORMER = "former.json"  # the entries before and after the last change of lowers
# Two slots: an upper over new lowers is made in the one that is not used, and the entry then names it.
SLOTS = ("", ".b")
HOME, NAME = "home", paths.NAME


@dataclass(frozen=True, slots=True)
class Identity:
    """A tenant's tid and the first of its UID_COUNT host uids (gids alike)."""

    tid: str
    uid_base: int


def find(state: State, tenant: str) -> Identity | None:
    """Return the identity of ``tenant`` when all its directories are there, else None."""
    if state.namespace is None:
        return None
    tid = state.tid(tenant)
    uid_base = _owner(state, tid)
    if uid_base is None:
        return None
    filesystem, persist = os.fspath(state.tenant_fs(tid)), os.fspath(state.tenant_persist(tid))
    parts = (f"{filesystem}/{UPPER}", f"{filesystem}/{WORKDIR}", f"{filesystem}/{OVERLAY}", f"{persist}/{HOME}")
    return Identity(tid, uid_base) if all(map(os.path.isdir, parts)) else None


def ensure(state: State, tenant: str, disk_size: int | None = None) -> Identity:
    """Return the identity of ``tenant``, its range allocated and its directories made if they are missing.

    With ``disk_size`` (bytes) they have a quota, or lie on an image of its own.

    Raises IsochamberError (stage "dirs").
    """
    tid = state.tid(tenant)
    with locks.product_lock(state, "identities", lambda _line: None):
        try:
            with locks.product_lock(state, f"tenant-{tid}", lambda _line: None):
                disk.attach(state, tid)
                uid_base = _owner(state, tid) or _configured(state, tid) or _allocate(state, tid)
                _make_directories(state, tid, tenant, uid_base)
                disk.ensure(state, tenant, tid, disk_size, uid_base)
        except OSError as error:
            raise IsochamberError.from_os(error, stage="dirs", tenant=tenant) from error
    return Identity(tid, uid_base)


_OWNED = tuple(f"{name}{slot}" for name in (UPPER, WORKDIR) for slot in SLOTS)


def _owner(state: State, tid: str) -> int | None:
    """Return the first uid of the range that the tenant's upper (or what is left of it) belongs to."""
    # Plain text for a path: every new tenant looks at all others.
    directory = os.fspath(state.tenant_fs(tid))
    for part in _OWNED:
        try:
            uid = os.lstat(f"{directory}/{part}").st_uid
        except FileNotFoundError:
            continue
        if FIRST <= uid <= LAST and (uid - FIRST) % UID_COUNT == 0:
            return uid
    return None


def _configured(state: State, tid: str) -> int | None:
    """Return the range that containers.json gives the tenant: its directories were lost, the file was not."""
    entry = registry.read(state, salvage=True).get(tid)
    return None if entry is None else int(entry["uid_base"])


def preferred_slot(tid: str) -> int:
    """Return which of the machine's ranges the tid hashes to."""
    return int(tid[:12], 16) % _SLOTS


def first_free(tid: str, taken: set[int]) -> int:
    """Return the first uid of the tenant's range: its preferred slot, or the next that is not in ``taken`` (slots).

    Raises IsochamberError when every range is taken.
    """
    start = preferred_slot(tid)
    for step in range(_SLOTS):
        slot = (start + step) % _SLOTS
        if slot not in taken:
            return FIRST + slot * UID_COUNT
    raise IsochamberError("every uid range of this machine is taken", stage="dirs", hint="delete tenants, or prune")


def _allocate(state: State, tid: str) -> int:
    taken = {slot for first, last in _used(state) for slot in slots(first, last)}
    return first_free(tid, taken)


def slots(first: int, last: int) -> range:
    """Return the slots that the ids ``first`` to ``last`` touch; none outside the container range."""
    low, high = max(first, FIRST), min(last, LAST)
    return range((low - FIRST) // UID_COUNT, (high - FIRST) // UID_COUNT + 1) if low <= high else range(0)


def _used(state: State) -> Iterator[tuple[int, int]]:
    """Yield ranges of ids that somebody has: other tenants, users and groups, subordinate ids (subuid(5))."""
    for entry in registry.read(state, salvage=True).values():
        yield entry["uid_base"], entry["uid_base"] + entry["uid_count"] - 1
    for directory in (state.root / "tenants_fs").iterdir():
        uid_base = _owner(state, directory.name)
        if uid_base is not None:
            yield uid_base, uid_base + UID_COUNT - 1
    for name in ("passwd", "group"):
        for fields in _lines(Path("/etc") / name):
            if len(fields) > 2 and fields[2].isdigit():
                yield int(fields[2]), int(fields[2])
    for name in ("subuid", "subgid"):
        for fields in _lines(Path("/etc") / name):
            if len(fields) == 3 and fields[1].isdigit() and fields[2].isdigit():
                yield int(fields[1]), int(fields[1]) + int(fields[2]) - 1


def _lines(path: Path) -> Iterator[list[str]]:
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return
    yield from (line.split(":") for line in text.splitlines())


def make_owned(directory: Path, uid_base: int) -> None:
    """Make a directory that belongs to the tenant's root, as an upper must (an id-mapped upper is refused)."""
    directory.mkdir(0o755)
    directory.chmod(0o755)  # it becomes the mode of the tenant's /, whatever the umask
    os.chown(directory, uid_base, uid_base)


def _make_directories(state: State, tid: str, tenant: str, uid_base: int) -> None:
    filesystem, persist = state.tenant_fs(tid), state.tenant_persist(tid)
    for directory, parts in (
        (filesystem, ((UPPER, True), (WORKDIR, True), (OVERLAY, False))),
        (persist, ((HOME, False),)),
    ):
        missing = [(name, owned) for name, owned in parts if not (directory / name).is_dir()]
        if not missing:
            continue
        with durable.staging_directory(state.staging_of(tid), f"dirs-{tid}") as stage:
            if directory == persist:
                durable.remove_file(home.manifest_path(state, tid))  # of what is no longer there
                if (persist / HOME).is_symlink():
                    durable.remove_file(persist / HOME)  # onto a disk that is lost
            for name, owned in missing:
                if owned:
                    make_owned(stage / name, uid_base)
                else:
                    (stage / name).mkdir(0o755)
                    (stage / name).chmod(0o755)
            if directory.is_dir():
                for name, _ in missing:
                    durable.commit_tree(stage / name, directory / name)
            else:
                if directory == persist:
                    (stage / NAME).write_text(f"{tenant}\n")  # a tid can't be turned back into a name
                durable.commit_tree(stage, directory)
    if not (persist / NAME).is_file():
        durable.write_file(persist / NAME, f"{tenant}\n".encode(), mode=0o644, staging=state.staging)
