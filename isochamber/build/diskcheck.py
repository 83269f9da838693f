"""What is wrong with a tenant's disk: its image is gone, shorter than its file system, torn, or not taken into use."""

from collections.abc import Iterator, Mapping
from typing import Any

from isochamber import paths
from isochamber.build import disk
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import disk as mounting

MEND = "e2fsck mends it, the tenant stopped"
ANEW = "an empty one is made, and what was on it is in a backup or nowhere"
USE = "it is taken into use"


def problems(state: State, tid: str, entry: Mapping[str, Any], *, locked: bool) -> Iterator[tuple[str, str]]:
    """Yield what is wrong, and what repairing does.

    A disk that is not mounted is mounted, as by a start: by who has ``locked`` the
    tenant, since it may be unmounted on purpose. To others it is one problem more.
    """
    image = disk.image(state, tid)
    name = f"its disk {image.relative_to(state.root)}"
    if mounting.project_of(str(state.root), tid):
        yield from _of_mount(state, tid, f"the quota on {paths.TENANTS_FS}/{tid}", "./doit sets it again")
        return
    if not image.exists():
        if entry.get("disk") is not None:
            yield f"{name} is missing", ANEW
        return
    if entry.get("disk") is None:
        yield f"{name} was made, and its entry says nothing of it", USE
        return
    found = disk.superblock(image)
    if not found.is_there:
        yield f"{name} has no file system in it", MEND
    elif image.stat().st_size < found.size:
        yield f"{name} has {image.stat().st_size} bytes, its file system {found.size}", MEND
    elif found.has_errors:
        yield f"{name}: the kernel has found errors in its file system", MEND
    elif locked:
        yield from _of_mount(state, tid, name, MEND)
    elif not mounting.is_mounted(str(state.tenant_fs(tid))):
        yield f"{name} is not mounted", USE


def _of_mount(state: State, tid: str, name: str, repair: str) -> Iterator[tuple[str, str]]:
    try:
        mounting.attach(str(state.root), tid)
    except IsochamberError as error:
        yield f"{name}: {error.what}", repair
