"""What of the host the attempts must leave as it was: looked at by the host itself, never by the tenant's word."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.escape.worlds import Worlds

_SETTINGS = (
    "kernel/core_pattern", "kernel/modprobe", "kernel/hostname", "kernel/domainname", "kernel/sysrq", "kernel/panic",
    "kernel/randomize_va_space", "net/ipv4/ip_forward", "vm/overcommit_memory", "fs/suid_dumpable",
    "kernel/cap_last_cap", "kernel/threads-max", "kernel/pid_max",
)  # fmt: skip


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        return str(error)


def tree_digest(root: Path) -> str:
    """Return a digest of every name, owner, mode, size and time below ``root``."""
    digest = hashlib.sha256()
    for directory, names, files in os.walk(root):
        names.sort()
        for name in sorted(files):
            status = os.lstat(os.path.join(directory, name))
            fields = (status.st_ino, status.st_uid, status.st_mode, status.st_size, status.st_mtime_ns, status.st_nlink)
            digest.update(f"{directory}/{name} {fields}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def boot_time() -> float:
    """Return when the machine booted, by its wall clock."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class Host:
    """One look at the host; two looks are equal when nothing was done to it."""

    settings: tuple[str, ...]
    mounts: tuple[str, ...]
    modules: str
    swaps: str
    base: str
    canary: str
    sentinel_lives: bool
    launcher: tuple[tuple[int, int, int], ...]  # the program, and the C library it runs with
    clock_is_right: bool  # as far from the time since boot as when the session began, give or take a minute

    @staticmethod
    def now(worlds: Worlds) -> Host:
        """Look."""
        programs = [os.path.realpath("/proc/self/exe"), os.__file__]
        stats = [os.stat(path) for path in programs]
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return Host(
            tuple(_text(f"/proc/sys/{name}") for name in _SETTINGS),
            tuple(sorted(line.split()[4] for line in lines if " - nsfs " not in line)),
            " ".join(sorted(line.split()[0] for line in _text("/proc/modules").splitlines())),  # and not how often used
            _text("/proc/swaps"),
            tree_digest(worlds.root / worlds.base),
            worlds.canary.read_text(),
            worlds.sentinel.poll() is None,
            tuple((status.st_ino, status.st_size, status.st_mtime_ns) for status in stats),
            abs(boot_time() - worlds.boot_time) < 60,
        )
