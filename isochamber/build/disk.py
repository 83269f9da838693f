"""A tenant's disk limit over upper, workdir and /home: a project quota where the file system keeps one, else an image.

With either ``home`` lies in ``tenants_fs/<tid>`` too, and ``tenants_persist/<tid>/home``
is a link there. With a quota that directory has a project of the tenant's own; what the
tenant had before is copied into a new one, because a file can't be given a project
without being opened, and the exchange of the two is the commit. The image, made sparse
and grown on demand, is mounted there; its name is the commit: once it is there, what
was copied into it counts and no longer what lies beside it.
"""

import contextlib
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from isochamber import paths
from isochamber.build import durable, space, tree
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import disk, quota, records, stop

WORKDIR, HOME = paths.WORKDIR, "home"
_MINUTES = 10
_COPIES_LAST = 10.0  # seconds at most that a start sees the host's mounts


def image(state: State, tid: str) -> Path:
    """Return where the tenant's image is, there or not."""
    return Path(disk.image_of(str(state.root), tid))


def size(state: State, tid: str) -> int | None:
    """Return the bytes of the tenant's quota or of the file system in its image, or None when it has neither.

    Raises IsochamberError when there is a quota that nobody enforces.
    An image's bytes are as its superblock says (ext4(5),
    Documentation/filesystems/ext4/super.rst): the file is larger where growing it was cut.
    """
    project = disk.project_of(str(state.root), tid)
    if project:
        return _limit(state, tid, project)[0] or None
    try:
        return superblock(image(state, tid)).size
    except FileNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class Superblock:
    """What an image says of itself; all zero when there is no ext4 in it (ext4(5))."""

    size: int = 0  # bytes
    has_errors: bool = False  # the kernel has found some

    @property
    def is_there(self) -> bool:
        """Say whether there is one."""
        return self.size > 0


def superblock(path: Path) -> Superblock:
    """Read it; raises OSError."""
    with path.open("rb") as file:
        file.seek(1024)
        content = file.read(64)
    if len(content) < 64:
        return Superblock()
    blocks, shift, magic, status = struct.unpack("<4xI16xI28xHH4x", content)
    return Superblock(int(blocks) << (10 + int(shift)), bool(status & 2)) if magic == 0xEF53 else Superblock()


def _limit(state: State, tid: str, project: int) -> tuple[int, int]:
    """Return the bytes that the project may use, 0 for no end, and those that it uses."""
    path = state.root
    try:
        if quota.enforced(str(path)):
            return quota.limit(str(path), project)
        why = IsochamberError("its disk limit is a project quota, which is off", stage="disk", path=path)
    except OSError as error:
        why = IsochamberError.from_os(error, stage="disk", path=path)
    why.hint = f"mount that file system with prjquota: {state.tenant_fs(tid)} is in project {project}"
    raise why


def _is(found: int, wanted: int) -> bool:
    return 0 <= wanted - found < 1 << 20  # mke2fs leaves out what makes no whole group


def _by_quota(state: State) -> bool:
    """Say whether a new limit is a quota; not below a project of all tenants: nothing could be renamed out of one."""
    return quota.enforced(str(state.root)) and not quota.project_of(str(state.root))


def current(state: State, tid: str, wanted: int | None) -> bool:
    """Say whether the tenant's disk is as wanted, and mounted; without a limit an image that is there stays."""
    found = size(state, tid)
    if found is None:
        return wanted is None
    if disk.project_of(str(state.root), tid):
        return (wanted is None or found == _whole(wanted)) and (state.tenant_persist(tid) / HOME).is_symlink()
    return (wanted is None or _is(found, wanted)) and disk.is_mounted(str(state.tenant_fs(tid)))


def _whole(wanted: int) -> int:
    """Return what a quota of ``wanted`` bytes reads as."""
    return wanted // 1024 * 1024


def attach(state: State, tid: str) -> None:
    """Mount the tenant's image if it has one, mended where the kernel would not have it. Raises IsochamberError.

    Under the tenant's lock.
    """
    if disk.project_of(str(state.root), tid):
        _link_home(state, tid)
    elif image(state, tid).exists() and not disk.is_mounted(str(state.tenant_fs(tid))):
        durable.make_directories(state.tenant_fs(tid), 0o755)  # a deletion that was cut may have had that already
        settled: list[bool] = []

        def settle() -> None:
            _settle(state, tid)
            settled.append(True)

        try:
            disk.attach(str(state.root), tid, settle)
        except IsochamberError:
            if not settled:
                raise  # nothing is wrong with the image
            mend(state, tid)
            disk.attach(str(state.root), tid, settle)
        durable.remove_stale_stages(state.staging_of(tid))  # nobody could see them before


def repair(state: State, tenant: str, tid: str) -> None:
    """Mend the image of a tenant, which must be stopped, whatever it takes. Raises IsochamberError, OSError."""
    with _kept_stopped(tenant, tid):
        mend(state, tid, thorough=True)


def mend(state: State, tid: str, *, thorough: bool = False) -> None:
    """Let e2fsck(8) mend the image: what is safe, or with ``thorough`` whatever it takes. Raises IsochamberError."""
    path, name = image(state, tid), state.name_of(tid) or tid
    hint = f"isochamber fsck --repair, or delete the tenant and restore a backup: e2fsck -f -y {path} says what it has"
    lock = disk.lock_image(str(path))  # a start would mount it meanwhile
    try:
        disk.detach(str(state.root), tid)
        _require_unmounted(name, path)
        found = superblock(path)
        with path.open("r+b") as file:
            if found.size > os.fstat(file.fileno()).st_size and thorough:
                file.truncate(found.size)  # what was there is lost
        _run(name, ["e2fsck", "-f", "-y" if thorough else "-p", str(path)], fine=(0, 1), hint=hint)  # 1: corrected
        durable.sync_file(path)
    finally:
        os.close(lock)


def _require_unmounted(tenant: str, path: Path) -> None:
    """Raise IsochamberError when a loop device stays on the image: it is mounted where this process can't see it.

    For a moment that is so whenever another tenant starts: its mount namespace begins as a copy of the host's.
    """
    deadline = time.monotonic() + _COPIES_LAST
    with path.open("rb") as file:
        while disk.attached(file.fileno()) is not None:
            if time.monotonic() > deadline:
                raise IsochamberError(
                    "is mounted in another mount namespace", stage="disk", tenant=tenant, path=path,
                    hint="end what is there",
                )  # fmt: skip
            time.sleep(0.01)  # a loop device that frees itself tells nobody


def ensure(state: State, tenant: str, tid: str, wanted: int | None, project: int) -> None:
    """Give the tenant, whose directories are there, a disk of ``wanted`` bytes. Raises IsochamberError, OSError.

    ``project`` is for a quota: a number that is the tenant's own, its first uid.
    """
    given = disk.project_of(str(state.root), tid)
    if given:
        if wanted is not None and size(state, tid) != _whole(wanted):
            _set_limit(state, tenant, tid, given, wanted)
        return
    found = size(state, tid)
    if wanted is None or (found is not None and _is(found, wanted)):
        return
    running = records.running(tid)
    if running is not None and running.waits:
        stop.stop(tid)  # a warm sandbox: nobody's yet
    if found is not None and wanted < found:
        raise IsochamberError(
            f"its disk has {found} bytes and can't be made smaller", stage="disk", tenant=tenant,
            hint="write a larger limits: disk, or delete the tenant",
        )  # fmt: skip
    with _kept_stopped(tenant, tid):
        if found is None and _by_quota(state):
            _make_project(state, tenant, tid, wanted, project)
        elif found is None:
            _make(state, tenant, tid, wanted)
        else:
            _grow(state, tenant, tid, wanted)
    attach(state, tid)


@contextlib.contextmanager
def _kept_stopped(tenant: str, tid: str) -> Iterator[None]:
    """Hold the lock that a start takes: what it wrote meanwhile would be lost. Raises IsochamberError."""
    try:
        lock = records.lock(tid, tenant)
    except IsochamberError:
        if not records.held(tid):
            raise
        raise IsochamberError(
            "runs, and something is to be done to its disk", stage="disk", tenant=tenant, hint="stop it first"
        ) from None
    try:
        yield
    finally:
        os.close(lock)


def _set_limit(state: State, tenant: str, tid: str, project: int, wanted: int) -> None:
    """Write the limit of a project and read it back; one that is used up already is refused."""
    _, used = _limit(state, tid, project)
    if used > wanted:
        raise IsochamberError(
            f"it has {used} bytes, more than its disk is to have",
            stage="disk",
            tenant=tenant,
            hint="write a larger limits: disk, or remove something",
        )
    quota.set_limit(str(state.root), project, wanted)
    found, _ = _limit(state, tid, project)
    if found != _whole(wanted):
        raise IsochamberError(
            f"{wanted} bytes were set and {found} are read", stage="disk", tenant=tenant, path=state.root,
            hint="the file system keeps no such limit: write a smaller one",
        )  # fmt: skip


def _make_project(state: State, tenant: str, tid: str, wanted: int, project: int) -> None:
    label = f"disk-{tid}"
    for left in state.staging.glob(f"{durable.STAGE_PREFIX}{label}-*"):
        durable.remove_tree(left)  # of a build that was killed: it would count
    if _limit(state, tid, project)[1]:
        raise IsochamberError(
            f"something else is in project {project}", stage="disk", tenant=tenant, path=state.root,
            hint="isochamber prune removes what a delete left that was killed; else find it: lsattr -pR",
        )  # fmt: skip
    with durable.staging_directory(state.staging, label) as stage:
        made, filesystem = stage / "tree", state.tenant_fs(tid)
        made.mkdir(0o755)
        quota.give(str(made), project)
        sources = [str(filesystem), str(state.tenant_persist(tid) / HOME)]
        _run(tenant, [sys.executable, "-m", "isochamber.build.diskfill", "-", str(made), *sources])
        _set_limit(state, tenant, tid, project, wanted)  # before the tenant sees it
        durable.exchange_tree(made, filesystem)


def lift(state: State, tid: str) -> None:
    """Take the tenant's quota away, before what it has is removed; one without is fine. Raises OSError."""
    project = disk.project_of(str(state.root), tid)
    if project and quota.enforced(str(state.root)):
        quota.set_limit(str(state.root), project, 0)


def _make(state: State, tenant: str, tid: str, wanted: int) -> None:
    with durable.staging_directory(state.staging, f"disk-{tid}") as stage:
        made = make_image(stage, tenant, wanted, state.tenant_fs(tid), state.tenant_persist(tid) / HOME)
        _put(state, tid, made)


def make_image(stage: Path, tenant: str, size: int, filesystem: Path, home: Path) -> Path:
    """Make an image of ``size`` bytes in ``stage``, with what is in both directories. Raises IsochamberError."""
    made = stage / paths.DISK_IMAGE
    with made.open("wb") as file:
        file.truncate(size)
    options = "nodiscard,lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0"
    _run(tenant, ["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-i", "8192", "-E", options, str(made)])
    mount = stage / "mount"
    mount.mkdir()
    words = [sys.executable, "-m", "isochamber.build.diskfill", str(made), str(mount), str(filesystem), str(home)]
    _run(tenant, words)
    mount.rmdir()
    return made


def _put(state: State, tid: str, made: Path) -> None:
    """Give the tenant the image ``made``, in place of the one that it may have."""
    durable.sync_file(made)
    made.rename(image(state, tid))
    durable.sync_directory(image(state, tid).parent)


TOGETHER = ("setpriv", "--pdeathsig", "KILL", "--")  # what it runs ends with us: nobody else would wait for it


def _run(
    tenant: str,
    words: list[str],
    fine: tuple[int, ...] = (0,),
    hint: str = "is the disk large enough for what the tenant has?",
) -> None:
    try:
        done = subprocess.run(
            [*TOGETHER, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60 * _MINUTES,
            check=False,
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
            hint=hint,
            notes=tuple(done.stderr.splitlines()[-5:]),
        )


def _settle(state: State, tid: str) -> None:
    """Finish what follows the image's name: what was copied goes, but an empty workdir, whose owner names the range."""
    filesystem = state.tenant_fs(tid)
    for path in [*filesystem.iterdir()] if filesystem.is_dir() else []:
        if path.name != WORKDIR:
            durable.remove_any(path)
    _link_home(state, tid)


def _link_home(state: State, tid: str) -> None:
    home = state.tenant_persist(tid) / HOME
    if not home.is_symlink():
        durable.remove_tree(home, state.staging)
        home.symlink_to(_home_link(tid))
        durable.sync_directory(home.parent)


def _home_link(tid: str) -> str:
    return f"../../{paths.TENANTS_FS}/{tid}/{HOME}"


def _grow(state: State, tenant: str, tid: str, wanted: int) -> None:
    """Give the tenant a copy that is larger, unmounted: a mounted one grows only for who has CAP_SYS_RESOURCE.

    A copy, because resize2fs(8) writes in place: a cut in the middle would leave neither the former size nor the new.
    """
    disk.detach(str(state.root), tid)
    path = image(state, tid)
    try:
        _require_unmounted(tenant, path)
        space.require(state.root, path.stat().st_blocks * 512, stage="disk", tenant=tenant)
        with durable.staging_directory(state.staging, f"disk-{tid}") as stage:
            made = stage / paths.DISK_IMAGE
            _run(tenant, ["cp", "--sparse=always", "--reflink=auto", "--", str(path), str(made)])
            with made.open("r+b") as file:
                file.truncate(wanted)
            _run(tenant, ["e2fsck", "-f", "-p", str(made)], fine=(0, 1))  # 1: errors that it corrected
            _run(tenant, ["resize2fs", str(made)])
            _put(state, tid, made)
    finally:
        disk.attach(str(state.root), tid)


def restore_home(state: State, tenant: str, tid: str, stage: Path) -> None:
    """Put ``stage``, with another /home in it, in place of what the tenant, which is stopped, has beside its disk.

    Its disk is made anew with that /home and its upper: the exchange of the two is the commit. Raises
    IsochamberError, OSError.
    """
    home = stage / HOME
    needed = sum(tree.size_of(path) for path in (state.tenant_fs(tid), home))
    space.require(state.root, needed, stage="restore", tenant=tenant)
    make_image(stage, tenant, image(state, tid).stat().st_size, state.tenant_fs(tid), home)
    durable.remove_tree(home)
    home.symlink_to(_home_link(tid))
    disk.detach(str(state.root), tid)
    try:
        _require_unmounted(tenant, image(state, tid))
        durable.exchange_tree(stage, state.tenant_persist(tid))
    finally:
        disk.attach(str(state.root), tid)
