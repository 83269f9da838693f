"""System calls that Python does not offer: one typed function each, under its kernel name.

The only module that imports ctypes. Every function raises OSError with the path (or what stands for it);
a call that the kernel does not have raises OSError(ENOSYS) whose text names it and the version that brought it.
Sources: man pages, section 2, unless a docstring says otherwise.
"""

from __future__ import annotations

import ctypes
import os
from errno import EINVAL, ENOSYS

# ruff: noqa: F405 - every name in capitals below is a number of the next line's module
from isochamber.launch.constants import *  # noqa: F403 - callers find the numbers beside the calls that take them

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


class _CloneArgs(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls", "set_tid",
            "set_tid_size", "cgroup",
        )
    ]  # fmt: skip


class _LandlockRuleset(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("handled_fs", "handled_net", "scoped")]


class _LandlockBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


class _BpfProgram(ctypes.Structure):
    """The part of union bpf_attr that BPF_PROG_LOAD of a small program needs."""

    _fields_ = [
        ("type", ctypes.c_uint32), ("count", ctypes.c_uint32), ("code", ctypes.c_uint64), ("license", ctypes.c_uint64),
        ("log_level", ctypes.c_uint32), ("log_size", ctypes.c_uint32), ("log", ctypes.c_uint64),
    ]  # fmt: skip


class _BpfTarget(ctypes.Structure):
    """The part of union bpf_attr that BPF_PROG_ATTACH needs, and BPF_PROG_QUERY."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("target", "program", "kind", "flags")] + [
        ("ids", ctypes.c_uint64), ("count", ctypes.c_uint32), ("pad", ctypes.c_uint32),
    ]  # fmt: skip


class _CapHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _CapData(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


class _SockFprog(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


_c = ctypes
for _name, _arguments in {
    "mount": (_c.c_char_p, _c.c_char_p, _c.c_char_p, _c.c_ulong, _c.c_char_p),
    "umount2": (_c.c_char_p, _c.c_int),
    "setns": (_c.c_int, _c.c_int),
    "unshare": (_c.c_int,),
    "prctl": (_c.c_int, _c.c_ulong, _c.c_ulong, _c.c_ulong, _c.c_ulong),
    "capset": (_c.POINTER(_CapHeader), _c.POINTER(_CapData)),
    "sethostname": (_c.c_char_p, _c.c_size_t),
    "syncfs": (_c.c_int,),
    "renameat2": (_c.c_int, _c.c_char_p, _c.c_int, _c.c_char_p, _c.c_uint),
    "inotify_init1": (_c.c_int,),
    "inotify_add_watch": (_c.c_int, _c.c_char_p, _c.c_uint32),
    "fanotify_init": (_c.c_uint, _c.c_uint),
    "fanotify_mark": (_c.c_int, _c.c_uint, _c.c_uint64, _c.c_int, _c.c_char_p),
}.items():
    getattr(_libc, _name).argtypes = _arguments
    getattr(_libc, _name).restype = ctypes.c_int
_libc.syscall.restype = ctypes.c_long


def _checked(result: int, call: str, path: str | bytes | int | None) -> int:
    if result >= 0:
        return result
    number = ctypes.get_errno()
    text = os.strerror(number)
    if number == ENOSYS and call in SINCE:
        text = f"this kernel has no {call}(2), Linux {SINCE[call]} brought it"
    name = os.fsdecode(path) if isinstance(path, bytes) else path
    raise OSError(number, text, f"{call}" if name is None else f"{name}")


def _syscall(number: int, call: str, path: str | bytes | int | None, *arguments: object) -> int:
    if number < 0:
        raise OSError(ENOSYS, f"the number of {call}(2) on {os.uname().machine} is not known", call)
    return _checked(int(_libc.syscall(ctypes.c_long(number), *arguments)), call, path)


def _encoded(path: str | bytes) -> bytes:
    return os.fsencode(path)


def mount(source: str | None, target: str | bytes, fstype: str | None, flags: int = 0, data: str | None = None) -> None:
    """mount(2)."""
    _checked(
        _libc.mount(
            None if source is None else os.fsencode(source),
            _encoded(target),
            None if fstype is None else fstype.encode(),
            flags,
            None if data is None else os.fsencode(data),
        ),
        "mount",
        target,
    )


def umount2(target: str | bytes, flags: int = 0) -> None:
    """umount2(2)."""
    _checked(_libc.umount2(_encoded(target), flags), "umount2", target)


def pivot_root(new_root: str | bytes, put_old: str | bytes) -> None:
    """pivot_root(2)."""
    _syscall(
        NR_PIVOT_ROOT, "pivot_root", new_root, ctypes.c_char_p(_encoded(new_root)), ctypes.c_char_p(_encoded(put_old))
    )


def openat2(dir_fd: int, path: str | bytes, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2), always close-on-exec; returns the descriptor."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    return _syscall(
        NR_OPENAT2, "openat2", path,
        ctypes.c_int(dir_fd), ctypes.c_char_p(_encoded(path)), ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)),
    )  # fmt: skip


def open_tree(dir_fd: int, path: str | bytes, flags: int) -> int:
    """open_tree(2), always close-on-exec; with OPEN_TREE_CLONE the descriptor is a detached mount."""
    return _syscall(
        NR_OPEN_TREE, "open_tree", path,
        ctypes.c_int(dir_fd), ctypes.c_char_p(_encoded(path)), ctypes.c_uint(flags | OPEN_TREE_CLOEXEC),
    )  # fmt: skip


def move_mount(from_fd: int, to_fd: int, to_path: str | bytes = b"") -> None:
    """move_mount(2): attach the detached mount ``from_fd`` at ``to_path`` below ``to_fd``, or on ``to_fd`` itself."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | (0 if to_path else MOVE_MOUNT_T_EMPTY_PATH)
    _syscall(
        NR_MOVE_MOUNT, "move_mount", to_path or None,
        ctypes.c_int(from_fd), ctypes.c_char_p(b""), ctypes.c_int(to_fd), ctypes.c_char_p(_encoded(to_path)),
        ctypes.c_uint(flags),
    )  # fmt: skip


def mount_setattr(
    fd: int, *, attributes: int = 0, clear: int = 0, propagation: int = 0, userns_fd: int = 0, recursive: bool = False
) -> None:
    """mount_setattr(2) on the mount that ``fd`` names; ``userns_fd`` counts with MOUNT_ATTR_IDMAP."""
    attr = _MountAttr(attributes, clear, propagation, userns_fd)
    _syscall(
        NR_MOUNT_SETATTR, "mount_setattr", None,
        ctypes.c_int(fd), ctypes.c_char_p(b""), ctypes.c_uint(AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)),
        ctypes.byref(attr), ctypes.c_size_t(ctypes.sizeof(attr)),
    )  # fmt: skip


def clone3(flags: int, *, cgroup_fd: int | None = None) -> tuple[int, int]:
    """clone3(2) without a new stack, as fork(2): returns (0, -1) in the child, (pid, pidfd) in the parent.

    The caller must be single-threaded: no atfork handler of the C library runs. With CLONE_PARENT the child is
    our parent's, which hears of its end as it would of ours.
    """
    pidfd = ctypes.c_int(-1)
    if cgroup_fd is not None:
        flags |= CLONE_INTO_CGROUP
    sigchld = 0 if flags & CLONE_PARENT else 17
    group = 0 if cgroup_fd is None else cgroup_fd
    arguments = _CloneArgs(flags | CLONE_PIDFD, ctypes.addressof(pidfd), 0, 0, sigchld, 0, 0, 0, 0, 0, group)
    pid = _syscall(NR_CLONE3, "clone3", None, ctypes.byref(arguments), ctypes.c_size_t(ctypes.sizeof(arguments)))
    return (pid, pidfd.value) if pid else (0, -1)


def setns(fd: int, kind: int) -> None:
    """setns(2)."""
    _checked(_libc.setns(fd, kind), "setns", None)


def unshare(flags: int) -> None:
    """unshare(2)."""
    _checked(_libc.unshare(flags), "unshare", None)


def prctl(option: int, second: int = 0, third: int = 0, fourth: int = 0, fifth: int = 0) -> int:
    """prctl(2)."""
    result: int = _libc.prctl(option, second, third, fourth, fifth)
    return result if result >= 0 else _checked(result, f"prctl {option}", None)


def address(text: bytes) -> int:
    """Return the address of ``text``'s bytes, for a call that takes a pointer as a number; ``text`` must stay alive."""
    return ctypes.cast(ctypes.c_char_p(text), ctypes.c_void_p).value or 0


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """capset(2), version 3: each argument is a mask of 64 bits."""
    header = _CapHeader(0x20080522, 0)
    data = (_CapData * 2)()
    for half in (0, 1):
        shift = 32 * half
        data[half] = _CapData(
            effective >> shift & 0xFFFFFFFF, permitted >> shift & 0xFFFFFFFF, inheritable >> shift & 0xFFFFFFFF
        )
    _checked(_libc.capset(ctypes.byref(header), data), "capset", None)


def sethostname(name: str) -> None:
    """sethostname(2)."""
    encoded = name.encode()
    _checked(_libc.sethostname(encoded, len(encoded)), "sethostname", name)


def close_range_on_exec(first: int) -> None:
    """close_range(2) with CLOSE_RANGE_CLOEXEC: every descriptor from ``first`` on closes at the exec."""
    _syscall(
        NR_CLOSE_RANGE, "close_range", None,
        ctypes.c_uint(first), ctypes.c_uint(0xFFFFFFFF), ctypes.c_uint(CLOSE_RANGE_CLOEXEC),
    )  # fmt: skip


def close_range(first: int, last: int = 0xFFFFFFFF) -> None:
    """close_range(2): close every descriptor from ``first`` to ``last``."""
    _syscall(NR_CLOSE_RANGE, "close_range", None, ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(0))


def seccomp_filter(program: bytes, flags: int = 0) -> int:
    """seccomp(2), SECCOMP_SET_MODE_FILTER with BPF instructions of 8 bytes; a new listener's descriptor, or 0."""
    program_of = _SockFprog(len(program) // 8, program)
    return _syscall(
        NR_SECCOMP, "seccomp", None,
        ctypes.c_uint(SECCOMP_SET_MODE_FILTER), ctypes.c_uint(flags), ctypes.byref(program_of),
    )  # fmt: skip


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """pidfd_getfd(2): a copy, close-on-exec, of another process's descriptor ``fd``."""
    return _syscall(NR_PIDFD_GETFD, "pidfd_getfd", fd, ctypes.c_int(pidfd), ctypes.c_int(fd), ctypes.c_uint(0))


def syncfs(fd: int) -> None:
    """syncfs(2); since Linux 5.8 it reports write-back errors."""
    _checked(_libc.syncfs(fd), "syncfs", None)


def quotactl_fd(fd: int, command: int, identity: int, buffer: bytearray) -> None:
    """quotactl_fd(2), of the file system that ``fd`` lies on; ``buffer`` is read or filled."""
    memory = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    _syscall(
        NR_QUOTACTL_FD, "quotactl_fd", fd,
        ctypes.c_int(fd), ctypes.c_uint(command), ctypes.c_int(identity), ctypes.byref(memory),
    )  # fmt: skip


def _renameat2(source: str, target: str, flags: int) -> None:
    result = _libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags)
    _checked(result, "renameat2", target)


def rename_noreplace(source: str, target: str) -> None:
    """renameat2(2) with RENAME_NOREPLACE: FileExistsError when ``target`` is there."""
    _renameat2(source, target, RENAME_NOREPLACE)


def rename_exchange(first: str, second: str) -> None:
    """renameat2(2) with RENAME_EXCHANGE: both must be there."""
    _renameat2(first, second, RENAME_EXCHANGE)


def inotify(path: str, mask: int) -> int:
    """inotify_init1(2) and inotify_add_watch(2): returns a non-blocking descriptor that watches ``path``."""
    descriptor = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1", None)
    try:
        _checked(_libc.inotify_add_watch(descriptor, os.fsencode(path), mask), "inotify_add_watch", path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def fanotify_init(flags: int, event_flags: int) -> int:
    """fanotify_init(2); returns the descriptor."""
    return _checked(_libc.fanotify_init(flags, event_flags), "fanotify_init", None)


def fanotify_mark(fd: int, flags: int, mask: int, dir_fd: int, path: str | None = None) -> None:
    """fanotify_mark(2); without ``path`` the mark is on what ``dir_fd`` names."""
    _checked(
        _libc.fanotify_mark(fd, flags, mask, dir_fd, None if path is None else os.fsencode(path)), "fanotify_mark", path
    )


_BPF_PROG_LOAD, _BPF_PROG_ATTACH, _BPF_PROG_QUERY = 5, 8, 16
_BPF_PROG_TYPE_CGROUP_DEVICE, _BPF_CGROUP_DEVICE = 15, 6


def _bpf(command: int, attr: ctypes.Structure, path: str | None = None) -> int:
    size = ctypes.c_uint(ctypes.sizeof(attr))
    return _syscall(NR_BPF, "bpf", path, ctypes.c_int(command), ctypes.byref(attr), size)


def attach_device_program(group: str, code: bytes) -> bool:
    """Attach the eBPF program ``code`` to a v2 control group: it decides which devices may be opened (bpf(2)).

    False where the kernel has no such programs. Raises OSError.
    """
    text = b"MIT\0"
    attr = _BpfProgram(_BPF_PROG_TYPE_CGROUP_DEVICE, len(code) // 8, address(code), address(text))
    try:
        program = _bpf(_BPF_PROG_LOAD, attr, "bpf")
    except OSError as error:
        if error.errno in (ENOSYS, EINVAL):
            return False
        raise
    try:
        directory = os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _bpf(_BPF_PROG_ATTACH, _BpfTarget(directory, program, _BPF_CGROUP_DEVICE), group)
        finally:
            os.close(directory)
    finally:
        os.close(program)
    return True


def has_device_program(group: str) -> bool:
    """Say whether a device program is attached to a v2 control group."""
    attr = _BpfTarget(0, _BPF_CGROUP_DEVICE, 0, 0)  # BPF_PROG_QUERY: target, kind, flags
    ids = (ctypes.c_uint32 * 64)()
    attr.ids, attr.count = ctypes.addressof(ids), len(ids)
    try:
        attr.target = os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _bpf(_BPF_PROG_QUERY, attr, group)
        finally:
            os.close(attr.target)
    except OSError:
        return False
    return bool(attr.count > 0)


def landlock_abi() -> int:
    """landlock_create_ruleset(2) with LANDLOCK_CREATE_RULESET_VERSION. Raises OSError (ENOSYS, EOPNOTSUPP)."""
    return _syscall(NR_LANDLOCK_CREATE_RULESET, "landlock_create_ruleset", None, None, ctypes.c_size_t(0), 1)


def landlock_create_ruleset(handled_fs: int, scoped: int, *, with_scope: bool) -> int:
    """landlock_create_ruleset(2); returns the descriptor. A kernel before ABI 6 knows no scopes."""
    attr = _LandlockRuleset(handled_fs, 0, scoped)
    size = ctypes.sizeof(attr) if with_scope else 8
    return _syscall(
        NR_LANDLOCK_CREATE_RULESET, "landlock_create_ruleset", None,
        ctypes.byref(attr), ctypes.c_size_t(size), ctypes.c_uint(0),
    )  # fmt: skip


def landlock_allow(ruleset: int, allowed: int, directory: int) -> None:
    """landlock_add_rule(2): ``allowed`` at and below the open ``directory``."""
    attr = _LandlockBeneath(allowed, directory)
    _syscall(
        NR_LANDLOCK_ADD_RULE, "landlock_add_rule", None,
        ctypes.c_int(ruleset), ctypes.c_int(1), ctypes.byref(attr), ctypes.c_uint(0),
    )  # fmt: skip


def landlock_restrict_self(ruleset: int) -> None:
    """landlock_restrict_self(2)."""
    _syscall(
        NR_LANDLOCK_RESTRICT_SELF, "landlock_restrict_self", None, ctypes.c_int(ruleset), ctypes.c_uint(0)
    )  # fmt: skip
