"""What a cut leaves behind is removed without asking: stages that nobody holds, and what killed keepers left.

Called at the beginning of every ``./doit``. When nothing was left it reads a few
directories and writes nothing.
"""

import contextlib
import os
from pathlib import Path

from isochamber import paths
from isochamber.build import durable
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import cgroup, pins, records


def clean(state: State, *, every: bool = False) -> tuple[str, ...]:
    """Remove what killed builds left in ``state``, and what a killed keeper left on the host; returns what it was.

    Never raises: what can't be removed is tried again the next time, and fsck names it.
    """
    if not state.staging.is_dir():
        return ()
    removed = durable.remove_stale_stages(state.staging, only_ours=False)
    for directory in stage_directories(state, every=every):
        removed += durable.remove_stale_stages(directory)
    with contextlib.suppress(OSError):
        if not _swept(state).exists():
            _swept(state).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _swept(state).touch()
    return removed + _clean_records() + _clean_pins()


def stage_directories(state: State, *, every: bool = False) -> list[Path]:
    """Return the directories besides staging/ in which a stage can have been left."""
    places = [state.root]
    places += [state.root / name for name in (paths.TENANTS_FS, paths.TENANTS_PERSIST, paths.BASES, paths.LAYERS)]
    with contextlib.suppress(OSError):
        places += [Path(entry.path) for entry in os.scandir(state.root / paths.CACHE / "debs")]
    with contextlib.suppress(OSError):  # of tenants with a disk of their own that is mounted
        stagings = [Path(entry.path, paths.STAGING) for entry in os.scandir(state.root / paths.TENANTS_FS)]
        places += [path for path in stagings if path.is_dir()]
    if every or not _swept(state).exists():  # once a boot: older versions, and others, stage beside the file
        for name in (paths.TENANTS_FS, paths.TENANTS_PERSIST):
            with contextlib.suppress(OSError):
                places += [Path(entry.path) for entry in os.scandir(state.root / name) if entry.is_dir()]
        places.append(state.root / paths.CACHE / "contents")
    return places


def _swept(state: State) -> Path:
    return Path(paths.run_directory()) / "swept" / (state.identifier if state.namespace else "none")


def _clean_records() -> tuple[str, ...]:
    """Remove the record and the cgroup of tenants whose launcher and keeper were both killed."""
    cleaned = []
    try:
        found = [entry.name for entry in os.scandir(f"{paths.run_directory()}/tenants") if entry.name.endswith(".json")]
    except OSError:
        return ()
    for name in found:
        tid = name.removesuffix(".json")
        if records.held(tid):
            continue
        try:
            lock = records.lock(tid, tid)
        except IsochamberError:
            continue  # started in between: it is in use again
        try:
            trees = cgroup.trees()
            cgroup.remove_all(cgroup.groups_of(tid, trees.v1, trees))
            records.forget(tid)
            cleaned.append(f"the record of {tid}")
        except OSError:
            continue
        finally:
            os.close(lock)
    return tuple(cleaned)


def _clean_pins() -> tuple[str, ...]:
    """Unpin namespaces that were being made when their maker was killed."""
    cleaned = []
    with contextlib.suppress(OSError):
        for tid in os.listdir(f"{paths.run_directory()}/ns"):
            with contextlib.suppress(OSError):
                if pins.remove_half_made(tid):
                    cleaned.append(f"half-made namespaces of {tid}")
    return tuple(cleaned)
