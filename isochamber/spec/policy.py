"""What no tenant needs of the kernel, as data: each row is a call (or one use of it), what it answers, and why.

A row whose ``approvable`` is true may be given to a tenant by ``seccomp: approved:``;
the others need a right over the host that no tenant has, so that giving them would
only add what can go wrong. docs/explanation/seccomp.md prints both lists.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from isochamber.spec import arguments
from isochamber.spec.arguments import LOW_32_BITS

# The last call that was looked at when these lists were written; what a later kernel adds answers ENOSYS. From 424
# on every architecture counts alike.
REVIEWED, LAST_REVIEWED = "set_mempolicy_home_node", 450

# Index of an argument, mask, value: argument & mask == value; with the mask NOT_NULL a pointer that is not 0.
Condition = tuple[int, int, int]
NOT_NULL, _ALL_BITS = -1, (1 << 64) - 1

PRETENDS = "worked"  # in place of an errno: nothing is done, and the program is told that it was


@dataclass(frozen=True, slots=True)
class Denied:
    """One row of the default deny list."""

    name: str  # as ``approved:`` writes it: a call, or call:ARGUMENT
    why: str
    errno: str = "EPERM"
    conditions: tuple[Condition, ...] = ()
    approvable: bool = True

    @property
    def call(self) -> str:
        """The system call's name."""
        return self.name.partition(":")[0]


_HOST = {  # rights over the machine: a tenant has none, and never gets one
    "acct": "process accounting of the whole machine",
    "adjtimex": "the machine's clock",
    "clock_adjtime": "the machine's clock",
    "clock_settime": "the machine's clock",
    "settimeofday": "the machine's clock",
    "stime": "the machine's clock",
    "create_module": "kernel modules",
    "delete_module": "kernel modules",
    "finit_module": "kernel modules",
    "init_module": "kernel modules",
    "get_kernel_syms": "kernel modules",
    "query_module": "kernel modules",
    "kexec_file_load": "another kernel",
    "kexec_load": "another kernel",
    "reboot": "the machine's power",
    "swapoff": "the machine's swap",
    "swapon": "the machine's swap",
    "ioperm": "the machine's ports",
    "iopl": "the machine's ports",
    "syslog": "the kernel's log, which tells addresses and what other tenants did",
    "quotactl": "quotas of the file system that holds every tenant",
    "quotactl_fd": "quotas of the file system that holds every tenant",
    "vhangup": "the controlling terminal of others",
    "lookup_dcookie": "the kernel's table of paths",
    "nfsservctl": "an NFS server in the kernel",
    "uselib": "an old way to map a library, with a history of bugs",
    "_sysctl": "the kernel's settings, an interface that is gone",
    "sysfs": "the kernel's list of file systems, an obsolete interface",
    "ustat": "a device by its number, an obsolete interface",
    "sethostname": "the host name is the tid",
    "setdomainname": "the domain name of its UTS namespace",
    "open_by_handle_at": "opens files by inode number, past every directory and mount",
    "mount": "mounts are made for it before it starts",
    "umount": "mounts are made for it before it starts",
    "umount2": "mounts are made for it before it starts",
    "pivot_root": "mounts are made for it before it starts",
    "open_tree": "the newer mount interface",
    "move_mount": "the newer mount interface",
    "fsopen": "the newer mount interface, which loads file system modules by name",
    "fsconfig": "the newer mount interface, which hands a file system driver untrusted options",
    "fsmount": "the newer mount interface",
    "fspick": "the newer mount interface",
    "mount_setattr": "the newer mount interface",
}

_RISKY = {  # open to every user, and a large part of the kernel's known holes
    "bpf": "loads programs into the kernel; the verifier has been the way to root many times",
    "perf_event_open": "performance events, with a history of holes, and side channels to other tenants",
    "userfaultfd": "stops the kernel at a page fault, which turns races into exploits",
    "io_uring_setup": "does calls through a ring that no filter sees",
    "io_uring_enter": "does calls through a ring that no filter sees",
    "io_uring_register": "does calls through a ring that no filter sees",
    "add_key": "keyrings, which are counted by user and are not in any namespace",
    "keyctl": "keyrings, which are counted by user and are not in any namespace",
    "request_key": "keyrings; may start a program of the host",
    "fanotify_init": "watches files of a whole mount",
    "modify_ldt": "segment descriptors for 16-bit programs, with a history of holes",
    "kcmp": "compares kernel pointers",
    "setns": "enters other namespaces",
}

_TERMINALS = {
    "TIOCSTI": "types into a terminal for whoever reads it (CVE-2017-5226)",
    "TIOCLINUX": "pastes into a console for whoever reads it",
    "TIOCSETD": "line disciplines, by modules loaded on demand (CVE-2017-2636)",
}

_SOCKETS = {  # families whose socket(2) alone loads a module that few have ever looked at
    "AF_PACKET": "raw frames of the network (CVE-2020-14386)",
    "AF_ALG": "the kernel's cryptography, by modules loaded on demand",
    "AF_VSOCK": "the hypervisor; it has no network namespace",
    "AF_KEY": "keys of IPsec",
    "AF_TIPC": "a cluster protocol with remote holes (CVE-2021-43267)",
    "AF_BLUETOOTH": "radios of the host",
    "AF_NFC": "radios of the host",
    "AF_IEEE802154": "radios of the host",
    "AF_CAN": "field buses of the host; approve it for a tenant that is given one",
    "AF_XDP": "frames past the network stack",
    "AF_RDS": "a cluster protocol with holes (CVE-2010-3904)",
    "AF_SMC": "remote memory access",
    "AF_IB": "remote memory access",
}
RLIMIT_CORE = 4  # on every architecture that is built for

_ALLOWED_FAMILIES = ("AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK")
_ALLOWED_PROTOCOLS = ("IPPROTO_IP", "IPPROTO_ICMP", "IPPROTO_TCP", "IPPROTO_UDP", "IPPROTO_ICMPV6")
_ALLOWED_NETLINKS = ("NETLINK_ROUTE",)  # getifaddrs(3): nginx, Node, Go and ip(8) ask which interfaces there are


def _low(index: int, value: int) -> Condition:
    return index, LOW_32_BITS, value


def _rows() -> Iterator[Denied]:
    for name, why in _HOST.items():
        yield Denied(name, why, approvable=False)
    for name, why in _RISKY.items():
        yield Denied(name, why)
    # Its flags are in memory, where no filter sees them; every C library falls back to clone.
    yield Denied("clone3", "new namespaces, in a structure that no filter sees", "ENOSYS", approvable=False)
    for name, bit in arguments.NAMESPACES.items():
        for call in ("unshare",) if name == "CLONE_NEWTIME" else ("clone", "unshare"):
            yield Denied(
                f"{call}:{name}", "a namespace of its own, with every capability in it", "EPERM", ((0, bit, bit),)
            )
    for name, why in _TERMINALS.items():
        yield Denied(f"ioctl:{name}", why, "EPERM", (_low(1, arguments.IOCTLS[name]),))
    yield from _cores()
    yield from _families()
    yield from _protocols()


def _cores() -> Iterator[Denied]:
    """Keep the limit of 1 byte that every tenant has: the only one with which a crash starts no program of the host.

    Who sets it wants no core in nearly all cases, and gets none. gpg(1) and ssh-agent(1) end when they are refused.
    """
    why = "the limit of core dumps, which keeps a crash from starting a program of the host's root"
    core, new, no_old = _low(1, RLIMIT_CORE), (2, NOT_NULL, 1), (3, _ALL_BITS, 0)
    yield Denied("setrlimit:RLIMIT_CORE", why, PRETENDS, (_low(0, RLIMIT_CORE),), approvable=False)
    yield Denied("prlimit64:RLIMIT_CORE", why, PRETENDS, (core, new, no_old), approvable=False)
    # Who also asks for the former one can't be told so, since nobody would write it down.
    yield Denied("prlimit64:RLIMIT_CORE:old", why, "EPERM", (core, new, (3, NOT_NULL, 1)), approvable=False)


def _families() -> Iterator[Denied]:
    for name, number in arguments.FAMILIES.items():
        if name not in _ALLOWED_FAMILIES:
            why = _SOCKETS.get(name, "an unusual protocol, by a module loaded on demand")
            yield Denied(f"socket:{name}", why, "EAFNOSUPPORT", (_low(0, number),))
        if name != "AF_UNIX":
            yield Denied(
                f"socketpair:{name}", "pairs are of AF_UNIX", "EAFNOSUPPORT", (_low(0, number),), approvable=False
            )


def _protocols() -> Iterator[Denied]:
    for family, known, allowed, why in (
        ("AF_NETLINK", arguments.NETLINKS, _ALLOWED_NETLINKS, "a part of the kernel other than its interfaces"),
        ("AF_INET", arguments.PROTOCOLS, _ALLOWED_PROTOCOLS, "an unusual protocol, by a module loaded on demand"),
        ("AF_INET6", arguments.PROTOCOLS, _ALLOWED_PROTOCOLS, "an unusual protocol, by a module loaded on demand"),
    ):
        for name, number in known.items():
            if name not in allowed:
                conditions = (_low(0, arguments.FAMILIES[family]), _low(2, number))
                yield Denied(f"socket:{family}:{name}", why, "EPROTONOSUPPORT", conditions)


DENIED: Mapping[str, Denied] = {row.name: row for row in _rows()}


def _allowed_sockets() -> Iterator[tuple[str, tuple[Condition, ...]]]:
    """Yield call and conditions of every socket that the first filter lets through."""
    families, protocols = arguments.FAMILIES, arguments.PROTOCOLS
    yield "socketpair", (_low(0, families["AF_UNIX"]),)
    yield "socket", (_low(0, families["AF_UNIX"]),)
    yield "socket", (_low(0, families["AF_NETLINK"]), _low(2, arguments.NETLINKS["NETLINK_ROUTE"]))
    for family in ("AF_INET", "AF_INET6"):
        for name in _ALLOWED_PROTOCOLS:
            yield "socket", (_low(0, families[family]), _low(2, protocols[name]))


ALLOWED_SOCKETS = tuple(_allowed_sockets())

# Allowed where nothing was learned, and still worth a question when a program was seen to use them.
DANGEROUS: Mapping[str, str] = {
    "ptrace": "takes over other processes of the tenant",
    "process_vm_readv": "reads the memory of other processes of the tenant",
    "process_vm_writev": "writes the memory of other processes of the tenant",
    "process_madvise": "changes the memory of other processes of the tenant",
    "pidfd_getfd": "takes descriptors out of other processes of the tenant",
    "chroot": "changes what its paths mean; it takes a capability",
    "mknod": "makes devices; it takes a capability",
    "mknodat": "makes devices; it takes a capability",
    "name_to_handle_at": "gives inode numbers that open_by_handle_at takes",
    "personality": "switches off address randomization, maps data executable",
    "mbind": "memory placement, with a history of holes",
    "migrate_pages": "moves the memory of processes",
    "move_pages": "moves the memory of processes",
    "set_mempolicy": "memory placement, with a history of holes",
    "vmsplice": "hands its own pages to a pipe, with a history of holes",
    "remap_file_pages": "an obsolete way to map files",
    "execveat": "runs a program that lies in no file system",
    "memfd_create": "a file that lies in no file system and may be executed",
    "memfd_secret": "memory that the kernel itself can't read",
    "unshare": "namespaces; only its other uses are not refused",
    "prctl:PR_SET_MM": "moves where the kernel thinks its memory is",
    "socket:AF_NETLINK": "asks the kernel about its network; getifaddrs(3) needs it",
}

# Every program needs these to start and to stop: dynamic or static, glibc or musl, up to abort(3). So are those that
# it depends on the moment to make: waiting, and clocks, which are calls where the machine's clock source is slow.
ALWAYS = (
    "access", "arch_prctl", "brk", "cacheflush", "clock_getres", "clock_gettime", "clock_gettime64", "clock_nanosleep",
    "clock_nanosleep_time64", "close", "execve", "exit", "exit_group", "faccessat", "faccessat2", "fstat", "fstat64",
    "fstatat64", "futex", "futex_time64", "getcpu", "getpid", "getrandom", "getrlimit", "gettid", "gettimeofday",
    "lseek", "madvise", "mmap", "mmap2", "mprotect", "mremap", "munmap", "nanosleep", "newfstatat", "open", "openat",
    "pread64", "prlimit64", "read", "readlink", "readlinkat", "restart_syscall", "riscv_flush_icache", "rseq",
    "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigsuspend", "sched_yield", "set_robust_list",
    "set_thread_area", "set_tid_address", "set_tls", "sigreturn", "stat", "tgkill", "time", "ugetrlimit", "uname",
    "write", "writev",
)  # fmt: skip

# What an architecture without the older call (arm64, riscv64) has in its place: call, and values of the argument that
# matters where it has one.
REPLACED: Mapping[str, tuple[tuple[str, int | None], ...]] = {
    "access": (("faccessat", None),), "alarm": (("setitimer", None),), "chmod": (("fchmodat", None),),
    "chown": (("fchownat", None),), "creat": (("openat", None),), "dup2": (("dup3", None),),
    "epoll_create": (("epoll_create1", None),), "epoll_wait": (("epoll_pwait", None),),
    "eventfd": (("eventfd2", None),),
    "fork": (("clone", 17),), "futimesat": (("utimensat", None),), "getdents": (("getdents64", None),),
    "getpgrp": (("getpgid", None),), "inotify_init": (("inotify_init1", None),), "lchown": (("fchownat", None),),
    "link": (("linkat", None),), "lstat": (("newfstatat", None),), "mkdir": (("mkdirat", None),),
    "mknod": (("mknodat", None),), "open": (("openat", None),), "pause": (("ppoll", None),), "pipe": (("pipe2", None),),
    "poll": (("ppoll", None),), "readlink": (("readlinkat", None),),
    "rename": (("renameat", None), ("renameat2", None)), "rmdir": (("unlinkat", None),),
    "select": (("pselect6", None),), "signalfd": (("signalfd4", None),), "stat": (("newfstatat", None),),
    "symlink": (("symlinkat", None),), "time": (("gettimeofday", None),), "unlink": (("unlinkat", None),),
    "utime": (("utimensat", None),), "utimes": (("utimensat", None),), "vfork": (("clone", 0x4111),),
}  # fmt: skip
