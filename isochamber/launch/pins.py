"""The tenant's user and network namespace: made once, pinned in the run-time directory, joined at every start.

A pin is a bind mount of the namespace's file (namespaces(7)); a reboot forgets it
and the next start makes it anew. Both namespaces are owned by the host's user
namespace, so that a capability inside the tenant's own counts for neither.
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import os
import struct
import sys

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.launch import mounts, records, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_NS_GET_NSTYPE = 0xB703  # ioctl_ns(2)
_SIOCGIFFLAGS = 0x8913  # netdevice(7)
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1

_BESIDE = ("network", "resolv.conf", "hosts", "build")  # written by isochamber.net for this very namespace

_KINDS = {"user": syscalls.CLONE_NEWUSER, "net": syscalls.CLONE_NEWNET}


def ensure(tid: str, uid_base: int, uid_count: int) -> tuple[int, int]:
    """Return descriptors of the pinned (user, network) namespaces, made if they are missing.

    The user namespace maps 0..``uid_count`` to the host ids from ``uid_base`` on; one
    pinned with another map (the state directory was restored) is made anew. Which map
    it was made with stands in a file beside it, and ``verify`` reads the real one back
    at every start. Raises IsochamberError.
    """
    directory = _directory(tid)
    wanted = _map(uid_base, uid_count)
    try:
        os.makedirs(directory, 0o700, exist_ok=True)
        lock = os.open(f"{directory}/map", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="launch", tenant=tid, hint="run as root") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.pread(lock, 64, 0) != wanted:
            os.ftruncate(lock, 0)  # first: a start that is cut off after this leaves nothing to believe in
            remove_pins(tid)
        found = {kind: _open(tid, kind) for kind in _KINDS}
        if found["user"] is None:
            # The kernel makes no user namespace for who is in a chroot (user_namespaces(7), EPERM).
            _make(tid, "user", lambda pid: _write_maps(pid, uid_base, uid_count), before=mounts.leave_chroot)
        if found["net"] is None:
            _make(tid, "net", lambda _pid: None, inside=lambda: _prepare_network(uid_base, uid_count))
        os.pwrite(lock, wanted, 0)
        user, net = (found[kind] if found[kind] is not None else _open(tid, kind) for kind in ("user", "net"))
    except OSError as error:
        raise IsochamberError.from_os(
            error,
            stage="launch",
            tenant=tid,
            hint="are user and network namespaces enabled (sysctl user.max_user_namespaces)?",
        ) from error
    finally:
        os.close(lock)
    if user is None or net is None:
        raise IsochamberError("could not be pinned", stage="launch", tenant=tid, path=directory)
    return user, net


def _directory(tid: str) -> str:
    return os.path.dirname(paths.namespace_pin(tid, "user"))


def _map(uid_base: int, uid_count: int) -> bytes:
    """Return what the file "map" says of a user namespace that was made whole."""
    return f"{uid_base} {uid_count}\n".encode()


def problem(tid: str, uid_base: int, uid_count: int) -> str | None:
    """Return what a start would have to make anew of the pins, or None; one that is not there is none."""
    try:
        lock = os.open(f"{_directory(tid)}/map", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        text = os.pread(lock, 64, 0)
        if not text and not _any(tid):
            return None
        if text != _map(uid_base, uid_count):
            return "its namespaces were cut while they were made, or are of another range of ids"
        for kind in _KINDS:
            pin = _open(tid, kind)
            if pin is None:
                return f"its {kind} namespace is not pinned, or something else is"
            os.close(pin)
    except BlockingIOError:
        pass  # they are being made
    finally:
        os.close(lock)
    return None


def _open(tid: str, kind: str) -> int | None:
    """Return a descriptor of the pinned namespace, or None when nothing (or something else) is there."""
    try:
        descriptor = os.open(paths.namespace_pin(tid, kind), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        if fcntl.ioctl(descriptor, _NS_GET_NSTYPE) == _KINDS[kind]:
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _nothing() -> None:
    pass


def _make(
    tid: str,
    kind: str,
    from_outside: Callable[[int], None],
    *,
    before: Callable[[], None] = _nothing,
    inside: Callable[[], None] = _nothing,
) -> None:
    """Make a namespace with a short-lived child, prepare it, and bind its file to the pin. Raises OSError."""
    path = paths.namespace_pin(tid, kind)
    _unpin(path)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    ready_read, ready_write = os.pipe()
    done_read, done_write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(done_write)
            before()
            syscalls.unshare(_KINDS[kind])
            inside()
            os.write(ready_write, b"\0\0\0\0")
            os.read(done_read, 1)
            status = 0
        except OSError as error:
            os.write(ready_write, struct.pack("=i", error.errno or errno.EIO))
        except BaseException:  # a bug of ours: shown, and never run on with the parent's code
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    os.close(ready_write)
    os.close(done_read)
    try:
        (number,) = struct.unpack("=i", os.read(ready_read, 4) or b"\5\0\0\0")
        if number:
            raise OSError(number, f"a {kind} namespace can't be made: {os.strerror(number)}", path)
        seen = records.as_proc_counts(child)
        from_outside(seen)
        syscalls.mount(f"/proc/{seen}/ns/{kind}", path, None, syscalls.MS_BIND)
    finally:
        os.close(done_write)
        os.close(ready_read)
        os.waitpid(child, 0)


def _write_maps(pid: int, uid_base: int, uid_count: int) -> None:
    for name in ("uid_map", "gid_map"):
        descriptor = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, f"0 {uid_base} {uid_count}\n".encode())  # one write: user_namespaces(7)
        finally:
            os.close(descriptor)


def _prepare_network(uid_base: int, uid_count: int) -> None:
    """Bring loopback up and give the tenant what a capability over a namespace of the host's can't give it."""
    control = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    request = fcntl.ioctl(control.fileno(), _SIOCGIFFLAGS, struct.pack("16sH22x", b"lo", 0))
    flags = struct.unpack_from("16sH", request)[1]
    fcntl.ioctl(control.fileno(), _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))
    control.close()
    for name, value in (
        ("ip_unprivileged_port_start", "0"),
        ("ping_group_range", f"{uid_base} {uid_base + uid_count - 1}"),
    ):
        descriptor = os.open(f"/proc/sys/net/ipv4/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)


def _unpin(path: str) -> None:
    """Unmount and remove a pin; one that is not there, or not mounted, is fine."""
    try:
        while True:
            syscalls.umount2(path, syscalls.MNT_DETACH)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):  # not a mount, not there
            raise
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def remove_pins(tid: str) -> None:
    """Unpin both namespaces; the kernel frees them with their last process. Raises OSError."""
    for name in _BESIDE:
        try:
            os.unlink(paths.network_file(tid, name))
        except FileNotFoundError:
            pass
    for kind in _KINDS:
        _unpin(paths.namespace_pin(tid, kind))


def _any(tid: str) -> bool:
    return any(os.path.lexists(paths.namespace_pin(tid, kind)) for kind in _KINDS)


def remove_half_made(tid: str) -> bool:
    """Unpin what a cut left of namespaces that were being made; says whether there was something. Raises OSError.

    Their directory stays: a start may have it open already.
    """
    if os.stat(f"{_directory(tid)}/map").st_size or not _any(tid):
        return False
    lock = os.open(f"{_directory(tid)}/map", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_size:
            return False
        remove_pins(tid)
    except BlockingIOError:
        return False  # they are being made
    finally:
        os.close(lock)
    return True


def remove(tid: str) -> None:
    """Unpin both namespaces and remove their directory: the tenant is deleted. Raises OSError."""
    directory = _directory(tid)
    try:
        lock = os.open(f"{directory}/map", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return  # never pinned
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_pins(tid)
        os.unlink(f"{directory}/map")
        os.rmdir(directory)
    except FileNotFoundError:
        pass  # somebody else has just removed it
    finally:
        os.close(lock)
