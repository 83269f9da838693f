"""Room on the disk: asked for before a build begins, so that it does not end in the middle for want of it."""

import errno
import os
from pathlib import Path

from isochamber.build import durable
from isochamber.errors import IsochamberError

# What is kept free whatever is built: entries, manifests, journals.
MARGIN_BYTES = 2 * durable.RESERVE_BYTES
MARGIN_NAMES = 64


def free(root: Path) -> tuple[int, int]:
    """Return the bytes and the names (inodes) that are left to us; file systems without a limit have many."""
    status = os.statvfs(root)
    names = status.f_favail if status.f_files else 1 << 62
    return status.f_bavail * status.f_frsize, names


def require(root: Path, size: int, *, names: int = 0, stage: str, tenant: str | None = None) -> None:
    """Raise IsochamberError (ENOSPC) unless ``size`` bytes and ``names`` names fit below ``root``, with a margin."""
    bytes_left, names_left = free(root)
    for what, needed, left in (
        ("bytes", size + MARGIN_BYTES, bytes_left),
        ("inodes", names + MARGIN_NAMES, names_left),
    ):
        if needed > left:
            raise IsochamberError(
                f"needs {needed} {what}, {left} are free", stage=stage, tenant=tenant, path=root, errno=errno.ENOSPC,
                hint="isochamber prune",
            )  # fmt: skip
