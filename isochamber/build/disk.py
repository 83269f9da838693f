"""A tenant's disk limit over upper, workdir and /home: a project quota where the file system keeps one, else an image.

With either ``home`` lies in ``tenants_fs/<tid>`` too, and ``tenants_persist/<tid>/home``
is a link there. With a quota that directory has a project of the tenant's own; what the
tenant had before is copied into a new one, because a file can't be given a project
without being opened, and the exchange of the two is the commit. The image, made sparse
and grown on demand, is mounted there; its name is the commit: once it is there, what
was copied into it counts and no longer what lies beside it.
"""

import struct
import subprocess
import sys
from pathlib import Path

from isochamber import paths
from isochamber.build import durable
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import disk, quota, records, stop

WORKDIR, HOME = "workdir", "home"
_MINUTES = 10


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
        with image(state, tid).open("rb") as file:
            file.seek(1024)
            blocks, shift = struct.unpack("<4xI16xI", file.read(28))
    except FileNotFoundError:
        return None
    return int(blocks) << (10 + int(shift))


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
    """Mount the tenant's image if it has one; raises IsochamberError."""
    if disk.project_of(str(state.root), tid):
        _link_home(state, tid)
    elif size(state, tid) is not None:
        _settle(state, tid)
        disk.attach(str(state.root), tid)


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
    if records.held(tid):
        raise IsochamberError("runs, and is to have another disk", stage="disk", tenant=tenant, hint="stop it first")
    if found is None and _by_quota(state):
        _make_project(state, tenant, tid, wanted, project)
        attach(state, tid)
    elif found is None:
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
    filesystem = state.tenant_fs(tid)
    if disk.is_mounted(str(filesystem)):
        return
    for path in [*filesystem.iterdir()] if filesystem.is_dir() else []:
        if path.name != WORKDIR:
            durable.remove_any(path)
    _link_home(state, tid)


def _link_home(state: State, tid: str) -> None:
    home = state.tenant_persist(tid) / HOME
    if not home.is_symlink():
        durable.remove_tree(home, state.staging)
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
