"""Who a tenant is on this machine: its tid, its range of host uids, and the directories that carry both.

What is allocated is read back from the owners on disk; which range is free, ranges.py knows.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from isochamber import paths
from isochamber.build import disk, durable, home, locks, ranges, registry
from isochamber.build.state import State
from isochamber.errors import IsochamberError

UPPER, WORKDIR, OVERLAY, LOWERS = paths.UPPER, paths.WORKDIR, "overlay", "lowers"
FORMER = "former.json"  # the entries before and after the last change of lowers
# Two slots: an upper over new lowers is made in the one that is not used, and the entry then names it.
SLOTS = paths.SLOTS
HOME, NAME = "home", paths.NAME


@dataclass(frozen=True, slots=True)
class Identity:
    """A tenant's tid and the first of its host uids (gids alike)."""

    tid: str
    uid_base: int


def find(state: State, tenant: str) -> Identity | None:
    """Return the identity of ``tenant`` when all its directories are there, else None."""
    if state.namespace is None:
        return None
    tid = state.tid(tenant)
    uid_base = ranges.owner(state, tid)
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
                known = ranges.owner(state, tid)
                uid_base = known or _configured(state, tid) or ranges.allocate(state, tid)
                if known is None:
                    ranges.announce(state, tid)
                _make_directories(state, tid, tenant, uid_base)
                if known is None:
                    ranges.given(state)
                disk.ensure(state, tenant, tid, disk_size, uid_base)
        except OSError as error:
            raise IsochamberError.from_os(error, stage="dirs", tenant=tenant) from error
    return Identity(tid, uid_base)


def _configured(state: State, tid: str) -> int | None:
    """Return the range that containers.json gives the tenant: its directories were lost, the file was not."""
    entry = registry.read(state, salvage=True).get(tid)
    return None if entry is None else int(entry["uid_base"])


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
