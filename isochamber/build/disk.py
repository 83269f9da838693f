"""A tenant's disk limit: an image of its own that holds upper, workdir and /home, made sparse and grown on demand.

With it ``tenants_fs/<tid>`` is the image's mount point, ``home`` lies in it too, and
``tenants_persist/<tid>/home`` is a link there. The image's name is the commit: once
it is there, what was copied into it counts and no longer what lies beside it.
"""

import struct
import subprocess
import sys
from pathlib import Path

from isochamber import paths
from isochamber.build import durable
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import disk, records, stop

WORKDIR, HOME = "workdir", "home"
_MINUTES = 10


def image(state: State, tid: str) -> Path:
    """Return where the tenant's image is, there or not."""
    return Path(disk.image_of(str(state.root), tid))


def size(state: State, tid: str) -> int | None:
    """Return the bytes of the file system in the tenant's image, or None when it has none.

    As its superblock says (ext4(5), Documentation/filesystems/ext4/super.rst): the file
    is larger where growing it was cut.
    """
    try:
        with image(state, tid).open("rb") as file:
            file.seek(1024)
            blocks, shift = struct.unpack("<4xI16xI", file.read(28))
    except FileNotFoundError:
        return None
    return int(blocks) << (10 + int(shift))


def _is(found: int, wanted: int) -> bool:
    return 0 <= wanted - found < 1 << 20  # mke2fs leaves out what makes no whole group


def current(state: State, tid: str, wanted: int | None) -> bool:
    """Say whether the tenant's disk is as wanted, and mounted; without a limit an image that is there stays."""
    found = size(state, tid)
    if found is None:
        return wanted is None
    return (wanted is None or _is(found, wanted)) and disk.is_mounted(str(state.tenant_fs(tid)))


def attach(state: State, tid: str) -> None:
    """Mount the tenant's image if it has one; raises IsochamberError."""
    if size(state, tid) is not None:
        _settle(state, tid)
        disk.attach(str(state.root), tid)


def ensure(state: State, tenant: str, tid: str, wanted: int | None) -> None:
    """Give the tenant, whose directories are there, a disk of ``wanted`` bytes. Raises IsochamberError."""
    found = size(state, tid)
    if wanted is None or (found is not None and _is(found, wanted)):
        return
    running = records.running(tid)
    if running is not None and running.waits:
        stop.stop(tid)  # a warm sandbox: nobody's yet
    if records.held(tid):
        raise IsochamberError("runs, and is to have another disk", stage="disk", tenant=tenant, hint="stop it first")
    if found is None:
        _make(state, tenant, tid, wanted)
        attach(state, tid)
    elif wanted < found:
        raise IsochamberError(
            f"its disk has {found} bytes and can't be made smaller",
            stage="disk",
            tenant=tenant,
            hint="write a larger limits: disk, or delete the tenant",
        )
    else:
        _grow(state, tenant, tid, wanted)


def _make(state: State, tenant: str, tid: str, wanted: int) -> None:
    with durable.staging_directory(state.staging, f"disk-{tid}") as stage:
        made = stage / "image"
        with made.open("wb") as file:
            file.truncate(wanted)
        options = "nodiscard,lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0"
        _run(tenant, ["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-i", "8192", "-E", options, str(made)])
        (stage / "mount").mkdir()
        sources = [str(state.tenant_fs(tid)), str(state.tenant_persist(tid) / HOME)]
        words = [sys.executable, "-m", "isochamber.build.diskfill", str(made), str(stage / "mount"), *sources]
        _run(tenant, words)
        durable.sync_file(made)
        made.rename(image(state, tid))
        durable.sync_directory(image(state, tid).parent)


def _run(tenant: str, words: list[str], fine: tuple[int, ...] = (0,)) -> None:
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60 * _MINUTES, check=False
        )
    except FileNotFoundError as error:
        raise IsochamberError.from_os(
            error, stage="disk", tenant=tenant, hint="apt-get install e2fsprogs, or leave limits: disk out"
        ) from error
    if done.returncode not in fine:
        raise IsochamberError(
            f"{words[0]} exited with {done.returncode}",
            stage="disk",
            tenant=tenant,
            hint="is the disk large enough for what the tenant has?",
            notes=tuple(done.stderr.splitlines()[-5:]),
        )


def _settle(state: State, tid: str) -> None:
    """Finish what follows the image's name: what was copied goes, but an empty workdir, whose owner names the range."""
    filesystem, home = state.tenant_fs(tid), state.tenant_persist(tid) / HOME
    if disk.is_mounted(str(filesystem)):
        return
    for path in [*filesystem.iterdir()] if filesystem.is_dir() else []:
        if path.name != WORKDIR:
            durable.remove_any(path)
    if not home.is_symlink():
        durable.remove_tree(home)
        home.symlink_to(f"../../{paths.TENANTS_FS}/{tid}/{HOME}")
        durable.sync_directory(home.parent)


def _grow(state: State, tenant: str, tid: str, wanted: int) -> None:
    """Make file and file system larger, unmounted: a mounted one grows only for who has CAP_SYS_RESOURCE."""
    disk.detach(str(state.root), tid)
    path = image(state, tid)
    with path.open("r+b") as file:
        if disk.attached(file.fileno()) is not None:
            raise IsochamberError(
                "is mounted in another mount namespace",
                stage="disk",
                tenant=tenant,
                path=path,
                hint="end what is there",
            )
        file.truncate(wanted)
    _run(tenant, ["e2fsck", "-f", "-p", str(path)], fine=(0, 1))  # 1: errors that it corrected
    _run(tenant, ["resize2fs", str(path)])
    durable.sync_file(path)
    attach(state, tid)
