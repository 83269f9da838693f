"""The launcher looks before it lets go: what it promised is read back, and a difference stops the start."""

from __future__ import annotations

import os

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.launch import join, masking, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from isochamber.launch.entry import Entry

_KINDS = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
_SETS = (b"CapInh", b"CapPrm", b"CapEff", b"CapBnd", b"CapAmb")

# Where what must be mounted, once each; None: whatever file system the state directory is on.
_MOUNTS = {
    "/": "overlay", "/proc": "proc", "/sys": "sysfs", "/dev": "tmpfs", "/dev/pts": "devpts", "/dev/shm": "tmpfs",  # noqa: S108 - the tenant's own
    "/dev/mqueue": "mqueue", "/tmp": "tmpfs", "/home": None,  # noqa: S108
}  # fmt: skip


def namespaces() -> dict[str, int]:
    """Return the inode number of each namespace of this process (namespaces(7))."""
    directory = os.open("/proc/self/ns", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # "net:[4026531840]": read and not followed, which would make an inode of each for us.
        return {kind: int(os.readlink(kind, dir_fd=directory)[len(kind) + 2 : -1]) for kind in _KINDS}
    finally:
        os.close(directory)


def inside(entry: Entry, host: dict[str, int], kept: int) -> None:
    """Compare this process, as the tenant, with what it must be; raises IsochamberError, OSError."""
    for kind, number in namespaces().items():
        if number == host[kind] and not (kind == "net" and entry.network == "host"):
            raise _refuse(f"the {kind} namespace is still the host's")
    _check_ids(entry)
    _check_privileges(kept)
    _check_mounts(entry)
    if entry.network == "bridge":
        join.check()


def _refuse(what: str) -> IsochamberError:
    return IsochamberError(
        what, stage="launch", hint="this is a bug of isochamber or of the kernel: nothing was started"
    )


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.read(descriptor, 1 << 16)
        while more := os.read(descriptor, 1 << 16):  # a long mountinfo comes in pieces
            found += more
        return found
    finally:
        os.close(descriptor)


def _check_ids(entry: Entry) -> None:
    """The pinned user namespace has this tenant's map and no other, and we are who we should be in it."""
    wanted = [b"0", b"%d" % entry.uid_base, b"%d" % entry.uid_count]
    for name in ("uid_map", "gid_map"):
        found = _read(f"/proc/self/{name}").split()
        if found != wanted:
            raise IsochamberError(
                f"the pinned user namespace has the {name} {b' '.join(found).decode()}",
                stage="launch",
                path=paths.namespace_pin(entry.tid, "user"),
                hint="unmount it: the next start makes it anew",
            )
    if os.getresuid() != (entry.uid,) * 3 or os.getresgid() != (entry.gid,) * 3 or os.getgroups():
        raise _refuse(f"its ids are {os.getresuid()}, {os.getresgid()} and {os.getgroups()}")


def _check_privileges(kept: int) -> None:
    status = dict(line.split(b":", 1) for line in _read("/proc/self/status").splitlines())
    for name in _SETS:
        if int(status[name], 16) != kept:
            raise _refuse(f"{name.decode()} is {status[name].strip().decode()}")
    if status[b"NoNewPrivs"].strip() != b"1":
        raise _refuse("no_new_privs is not set")
    if syscalls.prctl(syscalls.PR_GET_DUMPABLE) == 1:
        raise _refuse("others may look into it")


def _check_mounts(entry: Entry) -> None:
    """The root is the overlay, all that must be mounted is, and nothing of the host's old root is left."""
    missing = dict(_MOUNTS)
    optional = {"/dev/console", paths.NOTIFY_INSIDE, *masking.targets(), *(bind.target for bind in entry.binds)}
    if entry.network != "none":
        optional |= {"/etc/resolv.conf", "/etc/hosts"}
    for target, fstype in mounted():
        if target in missing:
            wanted = missing.pop(target)
            if wanted is not None and fstype != wanted:
                raise _refuse(f"{target} is a {fstype} and not the {wanted}")
        elif target in optional:
            optional.remove(target)
        elif entry.ipc is None or not f"{target}/".startswith(f"{paths.DEFAULT_IPC}/"):
            raise _refuse(f"{target} is mounted and should not be")
    is_read_only = bool(os.statvfs("/").f_flag & os.ST_RDONLY)
    if entry.read_only and not is_read_only:
        raise _refuse("the root is writable")
    if is_read_only and not entry.read_only:
        # What overlayfs makes of an upper in which it could make no work directory; the kernel's log says why.
        raise IsochamberError(
            "the root became read-only, for its upper has no room left or is on a read-only file system",
            stage="launch", path=entry.upper, hint="make room there, or write a larger limits: disk and run ./doit",
        )  # fmt: skip
    if missing:
        raise _refuse(f"{min(missing)} is not mounted")


def mounted() -> list[tuple[str, str]]:
    """Return (target, file system type) of every mount of this namespace, in order (proc_pid_mountinfo(5))."""
    found = []
    for line in _read("/proc/self/mountinfo").splitlines():
        fields, _, rest = line.partition(b" - ")
        target = os.fsdecode(fields.split(b" ")[4])
        if "\\" in target:
            for escape, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
                target = target.replace(escape, char)
        found.append((target, rest.split(b" ")[0].decode()))
    return found
