"""The SOCK_SEQPACKET pair between the processes of one start (see messages.py), with descriptors passed along."""

import _socket
import errno
import os
import sys

from isochamber.errors import IsochamberError
from isochamber.launch import messages
from isochamber.launch.messages import Failure, Word

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def pair() -> tuple[_socket.socket, _socket.socket]:
    """Return the launcher's end and the other end, both close-on-exec (as Python makes every descriptor)."""
    first, second = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    return first, second


def _send(end: _socket.socket, packet: bytes, descriptor: int | None = None) -> None:
    try:
        if descriptor is None:
            os.write(end.fileno(), packet)  # not sendmsg: after its filters are loaded the tenant's side may only write
        else:
            end.sendmsg([packet], rights((descriptor,)), _socket.MSG_NOSIGNAL)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the launcher is gone, and we go with it


def rights(descriptors: "Sequence[int]") -> list[tuple[int, int, bytes]]:
    """Return what sendmsg(2) is given to pass ``descriptors`` along (unix(7)); nothing where there is none."""
    if not descriptors:
        return []
    return [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, b"".join(one.to_bytes(4, sys.byteorder) for one in descriptors))]


def send_failure(end: _socket.socket, step: str, error: IsochamberError, word: bytes = Word.FAILED) -> None:
    """Say which step failed, and how; with Word.LEFT, what could not be cleaned up."""
    _send(end, failure_packet(step, error, word))


def failure_packet(step: str, error: IsochamberError, word: bytes = Word.FAILED) -> bytes:
    """Return what :func:`send_failure` sends."""
    failure = Failure(step, error.path, error.errno, error.what, error.hint, error.exit_code)
    return messages.encode_failure(word, failure)


def failure_of(packet: bytes, tenant: str | None) -> IsochamberError:
    """Return what a packet of :func:`send_failure` says as the error that it was, of ``tenant``."""
    told = messages.decode_failure(packet)
    return IsochamberError(
        told.what, stage=told.step, tenant=tenant, path=told.path, errno=told.errno, hint=told.hint,
        exit_code=told.code,
    )  # fmt: skip


def send_started(end: _socket.socket, pidfd: int, pid: int | None = None) -> None:
    """Hand over the pidfd of the tenant's first process, and its number if the other side is to reap it."""
    _send(end, Word.STARTED + (b"" if pid is None else b"%d" % pid), pidfd)


def send_terminal(end: _socket.socket, master: int) -> None:
    """Hand over the master of the tenant's terminal."""
    _send(end, Word.TERMINAL, master)


def send_listener(end: _socket.socket, descriptor: int) -> None:
    """Say which descriptor of ours is the listener, and wait until the launcher has a copy of it; raises OSError.

    By write(2) and read(2) alone: this process is filtered by now.
    """
    _send(end, Word.LISTENER + str(descriptor).encode())
    if os.read(end.fileno(), messages.MAXIMUM)[:1] != Word.GO:
        raise OSError(errno.EPIPE, "the launcher is gone")


def send_go(end: _socket.socket) -> None:
    """Say that the listener is taken, or that the groups are made."""
    _send(end, Word.GO)


def await_groups(end: _socket.socket) -> None:
    """Wait until the other side has made the control groups; raises IsochamberError when it has given up."""
    if end.recv(messages.MAXIMUM)[:1] != Word.GO:
        raise IsochamberError("nobody wants it any more", stage="launch")


def send_ended(end: _socket.socket, status: int) -> None:
    """Say that the tenant ended with the wait status ``status`` (wait(2))."""
    _send(end, Word.ENDED + str(status).encode())


def receive(end: _socket.socket, flags: int = 0) -> tuple[bytes | None, bytes, int | None]:
    """Return the next packet's word, the packet, and the descriptor that came with it; None at the end.

    Raises OSError; BlockingIOError with MSG_DONTWAIT among ``flags`` when there is none yet.
    """
    try:
        packet, extra = _receive(end, flags)
    except ConnectionResetError:
        # The peer left something of ours unread. That is said once, and before what it had said itself.
        packet, extra = _receive(end, flags)
    descriptor = None
    for level, kind, data in extra:  # a peer may have asked for its credentials to be passed: these are no descriptor
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            descriptor = int.from_bytes(data, sys.byteorder)
    if packet:
        return packet[:1], packet, descriptor
    if descriptor is not None:
        os.close(descriptor)
    return None, b"", None


def _receive(end: _socket.socket, flags: int) -> tuple[bytes, list[tuple[int, int, bytes]]]:
    # CMSG_LEN, not CMSG_SPACE: its padding has room for a second descriptor, which the kernel would then give us.
    packet, extra, _, _ = end.recvmsg(messages.MAXIMUM, _socket.CMSG_LEN(4), _socket.MSG_CMSG_CLOEXEC | flags)
    return packet, extra
