"""The argument of a system call that matters for a filter: which one it is, and names for its values.

The numbers are Linux's generic ones (include/uapi/asm-generic), which every
architecture that Debian runs on here shares: amd64, i386, arm64, armhf, riscv64.
Comparing is done on the low 32 bits: the kernel takes each of these arguments as an
int (clone(2): lower_32_bits of the flags), whatever a caller puts into the high half.
"""

from collections.abc import Mapping
from dataclasses import dataclass

LOW_32_BITS = 0xFFFFFFFF

FAMILIES: Mapping[str, int] = {
    name: number
    for number, name in enumerate((
        "AF_UNSPEC", "AF_UNIX", "AF_INET", "AF_AX25", "AF_IPX", "AF_APPLETALK", "AF_NETROM", "AF_BRIDGE", "AF_ATMPVC",
        "AF_X25", "AF_INET6", "AF_ROSE", "AF_DECnet", "AF_NETBEUI", "AF_SECURITY", "AF_KEY", "AF_NETLINK", "AF_PACKET",
        "AF_ASH", "AF_ECONET", "AF_ATMSVC", "AF_RDS", "AF_SNA", "AF_IRDA", "AF_PPPOX", "AF_WANPIPE", "AF_LLC", "AF_IB",
        "AF_MPLS", "AF_CAN", "AF_TIPC", "AF_BLUETOOTH", "AF_IUCV", "AF_RXRPC", "AF_ISDN", "AF_PHONET", "AF_IEEE802154",
        "AF_CAIF", "AF_ALG", "AF_NFC", "AF_VSOCK", "AF_KCM", "AF_QIPCRTR", "AF_SMC", "AF_XDP", "AF_MCTP",
    ))
}  # fmt: skip

CLONE_FLAGS: Mapping[str, int] = {
    "CLONE_VM": 0x100, "CLONE_FS": 0x200, "CLONE_FILES": 0x400, "CLONE_SIGHAND": 0x800, "CLONE_PIDFD": 0x1000,
    "CLONE_PTRACE": 0x2000, "CLONE_VFORK": 0x4000, "CLONE_PARENT": 0x8000, "CLONE_THREAD": 0x10000,
    "CLONE_NEWNS": 0x20000, "CLONE_SYSVSEM": 0x40000, "CLONE_SETTLS": 0x80000, "CLONE_PARENT_SETTID": 0x100000,
    "CLONE_CHILD_CLEARTID": 0x200000, "CLONE_DETACHED": 0x400000, "CLONE_UNTRACED": 0x800000,
    "CLONE_CHILD_SETTID": 0x1000000, "CLONE_NEWCGROUP": 0x2000000, "CLONE_NEWUTS": 0x4000000,
    "CLONE_NEWIPC": 0x8000000, "CLONE_NEWUSER": 0x10000000, "CLONE_NEWPID": 0x20000000, "CLONE_NEWNET": 0x40000000,
    "CLONE_IO": 0x80000000, "SIGCHLD": 17,
}  # fmt: skip

# A new namespace, as clone(2) and unshare(2) take it. CLONE_NEWTIME is unshare's only: clone has a signal there.
NAMESPACES: Mapping[str, int] = {
    name: bit for name, bit in CLONE_FLAGS.items() if name.startswith("CLONE_NEW")
} | {"CLONE_NEWTIME": 0x80}  # fmt: skip

# Of a socket of AF_INET or AF_INET6. Each is a module of the kernel that a bare socket(2) may load.
PROTOCOLS: Mapping[str, int] = {
    "IPPROTO_IP": 0, "IPPROTO_ICMP": 1, "IPPROTO_TCP": 6, "IPPROTO_UDP": 17, "IPPROTO_DCCP": 33, "IPPROTO_ICMPV6": 58,
    "IPPROTO_L2TP": 115, "IPPROTO_SCTP": 132, "IPPROTO_UDPLITE": 136, "IPPROTO_SMC": 256, "IPPROTO_MPTCP": 262,
}  # fmt: skip

# Of a socket of AF_NETLINK.
NETLINKS: Mapping[str, int] = {
    "NETLINK_ROUTE": 0, "NETLINK_USERSOCK": 2, "NETLINK_SOCK_DIAG": 4, "NETLINK_XFRM": 6, "NETLINK_SELINUX": 7,
    "NETLINK_ISCSI": 8, "NETLINK_AUDIT": 9, "NETLINK_FIB_LOOKUP": 10, "NETLINK_CONNECTOR": 11, "NETLINK_NETFILTER": 12,
    "NETLINK_IP6_FW": 13, "NETLINK_KOBJECT_UEVENT": 15, "NETLINK_GENERIC": 16, "NETLINK_SCSITRANSPORT": 18,
    "NETLINK_RDMA": 20, "NETLINK_CRYPTO": 21, "NETLINK_SMC": 22,
}  # fmt: skip

IOCTLS: Mapping[str, int] = {
    "TCGETS": 0x5401, "TCSETS": 0x5402, "TCSETSW": 0x5403, "TCSETSF": 0x5404, "TCGETA": 0x5405, "TCSETA": 0x5406,
    "TCSETAW": 0x5407, "TCSETAF": 0x5408, "TCSBRK": 0x5409, "TCXONC": 0x540A, "TCFLSH": 0x540B, "TIOCEXCL": 0x540C,
    "TIOCNXCL": 0x540D, "TIOCSCTTY": 0x540E, "TIOCGPGRP": 0x540F, "TIOCSPGRP": 0x5410, "TIOCOUTQ": 0x5411,
    "TIOCSTI": 0x5412, "TIOCGWINSZ": 0x5413, "TIOCSWINSZ": 0x5414, "TIOCMGET": 0x5415, "TIOCMBIS": 0x5416,
    "TIOCMBIC": 0x5417, "TIOCMSET": 0x5418, "TIOCGSOFTCAR": 0x5419, "TIOCSSOFTCAR": 0x541A, "FIONREAD": 0x541B,
    "TIOCLINUX": 0x541C, "TIOCCONS": 0x541D, "TIOCGSERIAL": 0x541E, "TIOCSSERIAL": 0x541F, "TIOCPKT": 0x5420,
    "FIONBIO": 0x5421, "TIOCNOTTY": 0x5422, "TIOCSETD": 0x5423, "TIOCGETD": 0x5424, "TCSBRKP": 0x5425,
    "TIOCSBRK": 0x5427, "TIOCCBRK": 0x5428, "TIOCGSID": 0x5429, "TCGETS2": 0x802C542A, "TCSETS2": 0x402C542B,
    "TCSETSW2": 0x402C542C, "TCSETSF2": 0x402C542D, "TIOCGPTN": 0x80045430, "TIOCSPTLCK": 0x40045431,
    "TIOCGPTLCK": 0x80045439, "TIOCGPTPEER": 0x5441, "FIONCLEX": 0x5450, "FIOCLEX": 0x5451, "FIOASYNC": 0x5452,
    "FIOQSIZE": 0x5460, "FIOSETOWN": 0x8901, "SIOCSPGRP": 0x8902, "FIOGETOWN": 0x8903, "SIOCGPGRP": 0x8904,
    "SIOCATMARK": 0x8905, "SIOCGSTAMP": 0x8906, "SIOCGIFNAME": 0x8910, "SIOCGIFCONF": 0x8912, "SIOCGIFFLAGS": 0x8913,
    "SIOCSIFFLAGS": 0x8914, "SIOCGIFADDR": 0x8915, "SIOCSIFADDR": 0x8916, "SIOCGIFDSTADDR": 0x8917,
    "SIOCGIFBRDADDR": 0x8919, "SIOCGIFNETMASK": 0x891B, "SIOCGIFMETRIC": 0x891D, "SIOCGIFMTU": 0x8921,
    "SIOCGIFHWADDR": 0x8927, "SIOCGIFINDEX": 0x8933, "SIOCGIFTXQLEN": 0x8942, "SIOCETHTOOL": 0x8946,
    "FIBMAP": 0x0001, "FIGETBSZ": 0x0002, "FS_IOC_GETFLAGS": 0x80086601, "FS_IOC_SETFLAGS": 0x40086602,
    "FS_IOC_FIEMAP": 0xC020660B, "FS_IOC_FSGETXATTR": 0x801C581F, "FICLONE": 0x40049409, "FICLONERANGE": 0x4020940D,
    "FIDEDUPERANGE": 0xC0189436, "BLKGETSIZE": 0x1260, "BLKSSZGET": 0x1268, "BLKGETSIZE64": 0x80081272,
    "BLKDISCARD": 0x1277, "RTC_RD_TIME": 0x80247009, "RNDGETENTCNT": 0x80045200, "VT_GETSTATE": 0x5603,
    "KDGETMODE": 0x4B3B, "KDGKBTYPE": 0x4B33, "KDSETMODE": 0x4B3A, "EVIOCGVERSION": 0x80044501,
    "I2C_SLAVE": 0x0703, "I2C_FUNCS": 0x0705, "I2C_RDWR": 0x0707, "I2C_SMBUS": 0x0720,
    "SPI_IOC_MESSAGE_1": 0x40206B00, "GPIO_GET_CHIPINFO": 0x8044B401,
}  # fmt: skip

PRCTLS: Mapping[str, int] = {
    "PR_SET_PDEATHSIG": 1, "PR_GET_PDEATHSIG": 2, "PR_GET_DUMPABLE": 3, "PR_SET_DUMPABLE": 4, "PR_GET_UNALIGN": 5,
    "PR_SET_UNALIGN": 6, "PR_GET_KEEPCAPS": 7, "PR_SET_KEEPCAPS": 8, "PR_GET_TIMING": 13, "PR_SET_TIMING": 14,
    "PR_SET_NAME": 15, "PR_GET_NAME": 16, "PR_GET_SECCOMP": 21, "PR_SET_SECCOMP": 22, "PR_CAPBSET_READ": 23,
    "PR_CAPBSET_DROP": 24, "PR_GET_TSC": 25, "PR_SET_TSC": 26, "PR_GET_SECUREBITS": 27, "PR_SET_SECUREBITS": 28,
    "PR_SET_TIMERSLACK": 29, "PR_GET_TIMERSLACK": 30, "PR_TASK_PERF_EVENTS_DISABLE": 31,
    "PR_TASK_PERF_EVENTS_ENABLE": 32, "PR_MCE_KILL": 33, "PR_MCE_KILL_GET": 34, "PR_SET_MM": 35,
    "PR_SET_CHILD_SUBREAPER": 36, "PR_GET_CHILD_SUBREAPER": 37, "PR_SET_NO_NEW_PRIVS": 38, "PR_GET_NO_NEW_PRIVS": 39,
    "PR_GET_TID_ADDRESS": 40, "PR_SET_THP_DISABLE": 41, "PR_GET_THP_DISABLE": 42, "PR_CAP_AMBIENT": 47,
    "PR_SVE_SET_VL": 50, "PR_SVE_GET_VL": 51, "PR_GET_SPECULATION_CTRL": 52, "PR_SET_SPECULATION_CTRL": 53,
    "PR_PAC_RESET_KEYS": 54, "PR_SET_TAGGED_ADDR_CTRL": 55, "PR_GET_TAGGED_ADDR_CTRL": 56, "PR_SET_IO_FLUSHER": 57,
    "PR_GET_IO_FLUSHER": 58, "PR_SET_SYSCALL_USER_DISPATCH": 59, "PR_SCHED_CORE": 62, "PR_SET_VMA": 0x53564D41,
    "PR_SET_PTRACER": 0x59616D61,
}  # fmt: skip

FCNTLS: Mapping[str, int] = {
    "F_DUPFD": 0, "F_GETFD": 1, "F_SETFD": 2, "F_GETFL": 3, "F_SETFL": 4, "F_GETLK": 5, "F_SETLK": 6, "F_SETLKW": 7,
    "F_SETOWN": 8, "F_GETOWN": 9, "F_SETSIG": 10, "F_GETSIG": 11, "F_SETOWN_EX": 15, "F_GETOWN_EX": 16,
    "F_OFD_GETLK": 36, "F_OFD_SETLK": 37, "F_OFD_SETLKW": 38, "F_SETLEASE": 1024, "F_GETLEASE": 1025,
    "F_NOTIFY": 1026, "F_DUPFD_CLOEXEC": 1030, "F_SETPIPE_SZ": 1031, "F_GETPIPE_SZ": 1032, "F_ADD_SEALS": 1033,
    "F_GET_SEALS": 1034, "F_GET_RW_HINT": 1035, "F_SET_RW_HINT": 1036,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Argument:
    """Which argument of a call decides what it does, and the names of its values."""

    index: int
    names: Mapping[str, int]
    bits: bool = False  # the value is a set of flags, written A|B

    def text(self, value: int) -> str:
        """Return how ``value`` is written: its name, else its number."""
        value &= LOW_32_BITS
        if not self.bits:
            return next((name for name, number in self.names.items() if number == value), f"{value:#x}")
        words = []
        for name, bit in self.names.items():
            if bit > 0xFF and value & bit:
                words.append(name)
                value &= ~bit
        words += [next((name for name, number in self.names.items() if number == value), f"{value:#x}")] * bool(value)
        return "|".join(words) or "0x0"

    def number(self, text: str) -> int:
        """Return the value that :meth:`text` wrote as ``text``; raises ValueError."""
        value = 0
        for word in text.split("|") if self.bits else [text]:
            number = self.names.get(word)
            value |= int(word, 0) if number is None else number
        if not 0 <= value <= LOW_32_BITS:
            raise ValueError(text)
        return value


MATTERS: Mapping[str, Argument] = {
    "clone": Argument(0, CLONE_FLAGS, bits=True),
    "fcntl": Argument(1, FCNTLS),
    "ioctl": Argument(1, IOCTLS),
    "prctl": Argument(0, PRCTLS),
    "socket": Argument(0, FAMILIES),
}
