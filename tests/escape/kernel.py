"""Kernel interfaces: each call by libc, by syscall(2), by the 32-bit entry, and some by x32 or below a filter."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from isochamber.spec import policy
from tests.escape.attempts import Attempt, Guard, NotTestableError, Off
from tests.escape.guards import CGROUPS, DEVICES, FILTER, PIDS, RIGHTS
from tests.escape.races import compiled
from tests.escape.worlds import Worlds, scripted

BOTH = (FILTER, RIGHTS)
ONE_RIGHTS = (RIGHTS,)
ONE_FILTER = (FILTER,)


def _clone_args(flags: int) -> str:
    return "x:" + b"".join(word.to_bytes(8, "little") for word in (flags, 0, 0, 0, 17, 0, 0, 0)).hex()


_HANDLE = "x:" + (8).to_bytes(4, "little").hex() + (1).to_bytes(4, "little").hex() + "ffffffff07000000"
_ONLY_USER_EVENTS = "x:0100000040000000" + "00" * 32 + "6100000000000000" + "00" * 16
_ARRAY_MAP = "x:" + b"".join(word.to_bytes(4, "little") for word in (2, 4, 4, 1)).hex() + "00" * 56
_SET_TICK = "x:00400000" + "00" * 84 + (10000).to_bytes(8, "little").hex() + "00" * 112
_READ_ONLY_ATTR = "x:" + "01" + "00" * 31
_DEADLINE = (
    "x:3000000006000000"
    + "00" * 16
    + b"".join(word.to_bytes(8, "little") for word in (10_000_000, 30_000_000, 30_000_000)).hex()
)

# row, what it is, guards, the number of the 32-bit entry (None: not by that way), libc has it, call and arguments.
_CALLS: tuple[tuple[str, str, tuple[Guard, ...], int | None, bool, str], ...] = (
    ("K03", "a user namespace by unshare", ONE_FILTER, 310, True, "unshare 0x10000000"),
    ("K03", "a user namespace by clone", ONE_FILTER, 120, False, "clone 0x10000011 0 0 0 0"),
    ("K03", "a user namespace by clone3", ONE_FILTER, 435, False, f"clone3 {_clone_args(0x10000000)} 64"),
    ("K03", "a mount namespace by unshare", BOTH, 310, True, "unshare 0x20000"),
    ("K03", "a network namespace by unshare", BOTH, 310, True, "unshare 0x40000000"),
    ("K03", "a cgroup namespace by clone", BOTH, 120, False, "clone 0x2000011 0 0 0 0"),
    ("K03", "a PID namespace by clone3", BOTH, 435, False, f"clone3 {_clone_args(0x20000000)} 64"),
    ("K03", "joining a mount namespace", BOTH, 346, True, "setns fd:/proc/self/ns/mnt 0x20000"),
    ("K05", "TIOCSTI into its terminal", ONE_FILTER, 54, True, "ioctl pty 0x5412 s:x"),
    ("K06", "TIOCSTI with a bit above 32", ONE_FILTER, None, True, "ioctl pty 0x100005412 s:x"),
    ("K07", "TIOCLINUX", ONE_FILTER, 54, True, "ioctl pty 0x541c x:0600"),
    ("K07", "TIOCLINUX with a bit above 32", ONE_FILTER, None, True, "ioctl pty 0x10000541c x:0600"),
    ("K08", "an io_uring", ONE_FILTER, 425, False, "io_uring_setup 4 mem:120"),
    ("K08", "io_uring_enter", ONE_FILTER, 426, False, "io_uring_enter -1 0 0 0 0 0"),
    ("K08", "io_uring_register", ONE_FILTER, 427, False, "io_uring_register -1 0 0 0"),
    ("K09", "a BPF map", BOTH, 357, False, f"bpf 0 {_ARRAY_MAP} 72"),
    ("K09", "a performance counter of its own", ONE_FILTER, 336, False,
     f"perf_event_open {_ONLY_USER_EVENTS} 0 -1 -1 0"),
    ("K09", "userfaultfd for user mode", ONE_FILTER, 374, False, "userfaultfd 1"),
    ("K09", "userfaultfd", BOTH, 374, False, "userfaultfd 0"),
    ("K10", "the session keyring by keyctl", ONE_FILTER, 288, False, "keyctl 0 -3 1"),
    ("K10", "a key by add_key", ONE_FILTER, 286, False, "add_key s:user s:probe s:x 1 -2"),
    ("K10", "a key by request_key", ONE_FILTER, 287, False, "request_key s:user s:probe 0 0"),
    ("K11", "a kernel module by init_module", BOTH, 128, False, "init_module mem:8 8 s:"),
    ("K11", "a kernel module by finit_module", BOTH, 350, False, "finit_module -1 s: 0"),
    ("K11", "removing a kernel module", BOTH, 129, False, "delete_module s:nothing 0"),
    ("K11", "another kernel by kexec_load", BOTH, 283, False, "kexec_load 0 0 0 0"),
    ("K11", "reboot", BOTH, 88, False, "reboot 1 2 3 0"),
    ("K11", "swapon", BOTH, 87, True, "swapon s:/nothing 0"),
    ("K11", "swapoff", BOTH, 115, True, "swapoff s:/nothing"),
    ("K11", "ports by iopl", BOTH, 110, True, "iopl 3"),
    ("K11", "ports by ioperm", BOTH, 101, True, "ioperm 0x80 1 1"),
    ("K13", "ptrace of a process of the host", (PIDS, RIGHTS), 26, True, "ptrace 0x4206 @HOSTPID@ 0 0"),
    ("K13", "the memory of a process of the host", (PIDS, RIGHTS), None, True,
     "process_vm_readv @HOSTPID@ iov: 1 iov:0x10 1 0"),
    ("K13", "writing to a process of the host", (PIDS, RIGHTS), None, True,
     "process_vm_writev @HOSTPID@ iov: 1 iov:0x10 1 0"),
    ("K14", "a signal to a process of the host", (PIDS, RIGHTS), 37, True, "kill @HOSTPID@ 0"),
    ("K14", "a signal to a thread of the host", (PIDS, RIGHTS), 270, False, "tgkill @HOSTPID@ @HOSTPID@ 0"),
    ("K14", "a pidfd of a process of the host", (PIDS,), 434, False, "pidfd_open @HOSTPID@ 0"),
    ("K15", "a packet socket", BOTH, 359, True, "socket 17 3 0"),
    ("K15", "a raw socket for pings", ONE_RIGHTS, 359, True, "socket 2 3 1"),
    ("K15", "a raw socket for any protocol", BOTH, 359, True, "socket 2 3 255"),
    ("K15", "a netlink socket of the firewall", ONE_FILTER, 359, True, "socket 16 3 12"),
    ("K15", "a netlink socket of the audit", ONE_FILTER, 359, False, "socket 16 3 9"),
    ("K15", "a netlink socket of IPsec", ONE_FILTER, 359, False, "socket 16 3 6"),
    ("K15", "an SCTP socket", ONE_FILTER, 359, False, "socket 2 1 132"),
    ("K15", "a CAN socket", ONE_FILTER, 359, False, "socket 29 3 1"),
    ("K15", "a VSOCK socket", ONE_FILTER, 359, True, "socket 40 1 0"),
    ("K15", "an XDP socket", BOTH, 359, True, "socket 44 3 0"),
    ("K15", "a crypto socket", ONE_FILTER, 359, True, "socket 38 5 0"),
    ("K15", "a Bluetooth socket", ONE_FILTER, 359, False, "socket 31 3 1"),
    ("K15", "a key management socket", BOTH, 359, False, "socket 15 3 2"),
    ("K15", "a TIPC socket", ONE_FILTER, 359, False, "socket 30 2 0"),
    ("K16", "capset of CAP_SYS_ADMIN", ONE_RIGHTS, 185, False,
     "capset x:2205082000000000 x:" + "00002000" * 2 + "00000000" * 4),  # CAP_SYS_ADMIN
    ("K16", "securebits", ONE_RIGHTS, 172, True, "prctl 28 0x10 0 0 0"),
    ("K16", "supplementary groups", ONE_RIGHTS, 206, True, "setgroups 0 0"),
    ("K16", "giving a file away", ONE_RIGHTS, 298, True, "fchownat -100 s:/tmp 7 7 0"),
    ("K16", "a file capability", ONE_RIGHTS, 226, True,
     "setxattr s:/tmp/file s:security.capability x:" + "01000002" + "00" * 16 + " 20 0"),
    ("K16", "an overlay attribute", ONE_RIGHTS, 226, True, "setxattr s:/tmp/file s:trusted.overlay.opaque s:y 1 0"),
    ("K18", "the host's time zone", BOTH, 79, True, "settimeofday 0 mem:8"),
    ("K18", "the host's clock by adjtimex", BOTH, None, True, f"adjtimex {_SET_TICK}"),
    ("K18", "sethostname", BOTH, 74, True, "sethostname s:evil 4"),
    ("K18", "setdomainname", BOTH, 121, True, "setdomainname s:evil 4"),
    ("K18", "process accounting", BOTH, 51, True, "acct 0"),
    ("K18", "the kernel's log", BOTH, 103, True, "syslog 9 0 -1"),
    ("K12", "segment descriptors by modify_ldt", ONE_FILTER, 123, False, "modify_ldt 0 mem:8 8"),
    ("K12", "the list of file systems by sysfs", ONE_FILTER, 135, False, "sysfs 3"),
    ("K12", "comparing kernel pointers by kcmp", ONE_FILTER, 349, False, "kcmp self self 0 0 0"),
    ("K05", "a line discipline by TIOCSETD", ONE_FILTER, 54, True, "ioctl pty 0x5423 mem:4"),
    ("K18", "vhangup", BOTH, 111, False, "vhangup"),
    ("R09", "a realtime scheduler", ONE_RIGHTS, 156, False, "sched_setscheduler 0 1 x:01000000"),
    ("R09", "a deadline scheduler", ONE_RIGHTS, 351, False, f"sched_setattr 0 {_DEADLINE} 0"),
    ("R09", "a higher priority", ONE_RIGHTS, 97, True, "setpriority 0 0 -20"),
    ("R09", "a realtime class of disk access", ONE_RIGHTS, 289, False, "ioprio_set 1 0 0x2000"),
    ("F11", "chroot", ONE_RIGHTS, 61, True, "chroot s:/tmp"),
    ("F11", "pivot_root", BOTH, 217, False, "pivot_root s:/nothing s:/nothing"),
    ("F12", "a disk's node", (RIGHTS, DEVICES), 297, True, "mknodat -100 s:/tmp/disk-@WAY@ 0x61b0 0x800"),
    ("F12", "a node of the memory", (RIGHTS, DEVICES), 297, True, "mknodat -100 s:/tmp/mem-@WAY@ 0x21b0 0x101"),
    ("F12", "a node of the console", (RIGHTS, DEVICES), 297, True, "mknodat -100 s:/tmp/console-@WAY@ 0x21b0 0x501"),
    ("F12", "a node of tun", (RIGHTS, DEVICES), 297, True, "mknodat -100 s:/tmp/tun-@WAY@ 0x21b0 0xac8"),
    ("F13", "a mount", BOTH, 21, True, "mount s:t s:/mnt s:tmpfs 0 0"),
    ("F13", "a bind mount", BOTH, 21, True, "mount s:/etc s:/mnt 0 0x1000 0"),
    ("F13", "writing to /proc/sys after a remount", BOTH, 21, True, "mount 0 s:/proc/sys 0 0x1020 0"),
    ("F13", "making mounts shared", BOTH, 21, True, "mount 0 s:/ 0 0x100000 0"),
    ("F13", "a clone of a mount", BOTH, 428, False, "open_tree -100 s:/home 1"),
    ("F13", "moving a mount", BOTH, 429, False, "move_mount -1 s: -1 s: 0x44"),
    ("F13", "a file system by fsopen", BOTH, 430, False, "fsopen s:tmpfs 0"),
    ("F13", "a mount by fsmount", BOTH, 432, False, "fsmount -1 0 0"),
    ("F13", "a mount by fspick", BOTH, 433, False, "fspick -100 s:/ 0"),
    ("F13", "attributes of a mount", BOTH, 442, False, f"mount_setattr -100 s:/tmp 0 {_READ_ONLY_ATTR} 32"),
    ("F14", "unmounting a mask", BOTH, 52, True, "umount2 s:/proc/keys 2"),
    ("F14", "unmounting /tmp", BOTH, 52, True, "umount2 s:/tmp 2"),
    ("F16", "opening by handle", BOTH, 342, True, f"open_by_handle_at fd:/etc {_HANDLE} 0"),
    ("F16", "watching a file system by fanotify", BOTH, None, True, "fanotify_init 0 0"),
    ("F17", "mounting proc", BOTH, 21, True, "mount s:p s:/mnt s:proc 0 0"),
    ("F17", "mounting sysfs", BOTH, 21, True, "mount s:p s:/mnt s:sysfs 0 0"),
    ("F17", "mounting debugfs", BOTH, 21, False, "mount s:p s:/mnt s:debugfs 0 0"),
    ("F17", "mounting tracefs", BOTH, 21, False, "mount s:p s:/mnt s:tracefs 0 0"),
    ("F17", "mounting bpf", BOTH, 21, False, "mount s:p s:/mnt s:bpf 0 0"),
    ("F17", "mounting devtmpfs", BOTH, 21, False, "mount s:p s:/mnt s:devtmpfs 0 0"),
    ("F17", "mounting an overlay", BOTH, 21, False, "mount s:p s:/mnt s:overlay 0 s:lowerdir=/etc:/usr"),
    ("F17", "mounting a disk", BOTH, 21, False, "mount s:/dev/null s:/mnt s:ext4 1 0"),
    ("C01", "mounting cgroup v2", BOTH, 21, False, "mount s:c s:/mnt s:cgroup2 0 0"),
    ("C01", "mounting cgroup v1", (FILTER, RIGHTS, CGROUPS), 21, False,
     "mount s:c s:/mnt s:cgroup 0 s:none,name=isochamber-probe"),
)  # fmt: skip

# What stops a call that names a process which is not there.
_NOBODY = frozenset({"EPERM", "EACCES", "ENOSYS", "SIGSYS", "ESRCH"})
_REFUSED = frozenset({"EPERM", "EACCES", "ENOSYS", "SIGSYS", "EROFS", "EAFNOSUPPORT", "ESOCKTNOSUPPORT",
                      "EPROTONOSUPPORT"})  # fmt: skip


def _attempt(row: str, title: str, guards: tuple[Guard, ...], way: str, call: str, said: str) -> Attempt:
    words = " ".join(map(shlex.quote, ["/home/probe", way, *call.replace("@WAY@", way[:4]).split(" ")]))
    script = f"touch /tmp/file; {words}" if "/tmp/file" in call else f"exec {words}"
    return Attempt(
        row, f"{title} ({said})", guards, scripted, script,
        refused=_NOBODY if row in ("K13", "K14") else _REFUSED, peers="@HOSTPID@" not in call,
    )  # fmt: skip


def _every_way() -> Iterator[Attempt]:
    for row, title, guards, i386, libc, call in _CALLS:
        if libc:
            yield _attempt(row, title, guards, "libc", call, "libc")
        yield _attempt(row, title, guards, "raw", call, "syscall")
        if i386 is not None:
            # Whoever may not come in by the 32-bit entry at all is stopped by the filter; the right is missing as well.
            others = guards if FILTER in guards else (FILTER, *guards)
            yield _attempt(row, title, others, f"i386:{i386}", call, "int 0x80")


def _socketcall(family: int, kind: int) -> str:
    words = b"".join(word.to_bytes(4, "little") for word in (family, kind, 0))
    return f"socketcall 1 x:{words.hex()}"


def _broken_memory(worlds: Worlds, off: Off, attempt: Attempt) -> str:
    """K19: MADV_HWPOISON; nothing is mapped there, so that nothing breaks where it gets through."""
    word = scripted(worlds, off, attempt)
    if word == "EINVAL":
        raise NotTestableError("this kernel has no CONFIG_MEMORY_FAILURE")
    return word


def _own_map(worlds: Worlds, off: Off, attempt: Attempt) -> str:
    """K19: PR_SET_MM, which takes CAP_SYS_RESOURCE over the host."""
    effective = re.search(r"^CapEff:\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert effective
    if not int(effective[1], 16) >> 24 & 1:
        raise NotTestableError("the host's root has no CAP_SYS_RESOURCE here")
    return scripted(worlds, off, attempt)


def _sweep(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """K04: calls of a later kernel than the lists, and numbers that nobody has: none gets somewhere."""
    tenant = worlds.tenant(off)
    shutil.copy(compiled(worlds.scratch, "helper", "-static"), tenant.home)
    script = f"/home/helper sweep {policy.LAST_REVIEWED + 1} 1023"
    word = worlds.start(tenant, off, "/bin/sh", "-c", script).stdout.strip()
    return "ENOSYS" if word == "absent" else word


def attempts() -> Iterator[Attempt]:
    """Yield every attempt of this group."""
    yield from _every_way()
    for _, title, guards, _, _, call in _CALLS:
        if title in ("a user namespace by unshare", "a mount", "an io_uring"):
            yield _attempt("K02", title, guards, "x32", call, "x32")
            yield _attempt("K17", title, guards, "stacked", call, "below a filter of its own")
    yield Attempt(
        "K19", "declaring memory broken", ONE_RIGHTS, _broken_memory, "exec /home/probe raw madvise 0x1000 4096 100"
    )
    yield Attempt(
        "K19",
        "moving where the kernel thinks its memory is",
        ONE_RIGHTS,
        _own_map,
        "exec /home/probe raw prctl 35 1 0x1000 0 0",
    )
    yield Attempt("K04", "every number that no call has been looked at by", (FILTER,), _sweep)
    yield _attempt("K15", "a packet socket by socketcall", BOTH, "i386:102", _socketcall(17, 3), "int 0x80")
    yield _attempt("K15", "a VSOCK socket by socketcall", ONE_FILTER, "i386:102", _socketcall(40, 1), "int 0x80")
