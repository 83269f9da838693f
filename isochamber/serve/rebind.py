"""What is done to a tenant while it runs: its IPC directory bound anew, its terminal resized."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios

from isochamber.errors import IsochamberError
from isochamber.launch import ipc as directory
from isochamber.launch import mounts, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from isochamber.launch.entry import Entry


def resize(master: int, packet: bytes) -> None:
    """Set the size of a terminal; ``packet`` is rows and columns, two 16-bit numbers. Raises OSError."""
    if len(packet) == 4:
        rows, columns = struct.unpack("=HH", packet)
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("=HHHH", rows, columns, 0, 0))


def ipc(entry: Entry, tenant: int, pid: int) -> None:
    """Bind the host's IPC directory, removed and made again, anew into the running tenant (its pidfd, its pid).

    A helper joins the tenant's mount namespace, so that ours stays the host's; the clone
    is made before, while we are a peer of the host's mount. What is mounted there now
    goes first: it is the directory that was removed. Raises IsochamberError.
    """
    source = entry.ipc
    if source is None:
        return
    try:
        user = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        try:
            clone = directory.clone(source, user)
        finally:
            os.close(user)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="ipc", tenant=entry.name, path=source) from error
    child = os.fork()
    if child == 0:
        status = 1
        try:
            syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)  # the tenant's file systems are around us now
            syscalls.setns(tenant, syscalls.CLONE_NEWNS)
            root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            former = mounts.reopen(root, directory.TARGET)
            os.fchdir(former)
            syscalls.umount2(".", syscalls.MNT_DETACH)
            os.chdir("/")
            mounts.attach(root, directory.TARGET, clone, entry.uid_base)
            status = 0
        except OSError as error:
            status = error.errno or 1
        except BaseException:  # a bug of ours: in the log
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    os.close(clone)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise IsochamberError(
            os.strerror(code) if code > 0 else "was killed", stage="ipc", tenant=entry.name, path=source
        )
