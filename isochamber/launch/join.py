"""A tenant's network was made ahead of the start; this looks whether it still is, and has it made when not.

After a reboot the pinned namespace is new and empty. What isochamber.net made is
known by a file beside the pin: the digest of what was asked for and the namespace's
inode number. When it does not match, ``isochamber net join`` is run once, in a
process of its own: the launcher speaks no netlink.
"""

from __future__ import annotations

import os
import sys

from isochamber import paths
from isochamber.errors import IsochamberError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from isochamber.launch.entry import Entry

INTERFACE = "eth0"


def stamp(digest: str, net: int) -> bytes:
    """Return what the file says when the namespace open as ``net`` holds what ``digest`` names."""
    return f"{digest} {os.fstat(net).st_ino}\n".encode()


def is_ready(tid: str, digest: str, net: int) -> bool:
    """Say whether the network of ``tid`` was made, in this very namespace and from this very grant."""
    try:
        with open(paths.network_file(tid, "network"), "rb", buffering=0) as file:
            return file.read(128) == stamp(digest, net)
    except FileNotFoundError:
        return False


def ensure(root: str, entry: Entry, net: int) -> None:
    """Return when the network of ``entry`` is there; nothing is done for one without. Raises IsochamberError."""
    if entry.network != "bridge" or entry.net_digest is None or is_ready(entry.tid, entry.net_digest, net):
        return
    _make(root, entry)
    if not is_ready(entry.tid, entry.net_digest, net):
        raise IsochamberError(
            "its network could not be made", stage="launch", tenant=entry.name, hint="isochamber net check"
        )


def _make(root: str, entry: Entry) -> None:
    """Run ``isochamber net join`` with the entry on its standard input; its own line says what failed."""
    import json  # noqa: PLC0415 - slow to import, and only the first start after a reboot comes here

    request = {key: getattr(entry, key) for key in ("tid", "name", "uid_base", "uid_count", "net")}
    reading, writing = os.pipe()
    words = [sys.executable, "-I", "-m", "isochamber", "--root", root, "net", "join"]
    child = os.fork()
    if child == 0:
        try:
            os.dup2(reading, 0)
            os.dup2(2, 1)
            os.execv(sys.executable, words)  # noqa: S606 - an argv list, no shell
        finally:
            os._exit(127)
    os.close(reading)
    with open(writing, "wb") as file:
        file.write(json.dumps(request).encode())
    os.waitpid(child, 0)


def check() -> None:
    """Refuse the start when the interface is gone: read as the tenant, in its namespace. Raises IsochamberError."""
    with open("/proc/self/net/dev", "rb", buffering=0) as file:
        names = [line.split(b":")[0].strip() for line in file.read().splitlines()]
    if INTERFACE.encode() not in names:
        raise IsochamberError("its network interface is gone", stage="launch", hint="isochamber net repair")
