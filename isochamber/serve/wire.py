"""JSON packets with descriptors over SOCK_SEQPACKET: between nursery and supervisor, and for attached clients.

A packet is one JSON object, and an order to start something has a second line: the tenant's
entry, which is passed on as it is. What is longer than a socket takes at once travels in a
memfd, named by the key ``long``. Used by the lean half, so no import of json.
"""

from __future__ import annotations

import _socket
import os
import struct

from isochamber.launch import channel, lean
from isochamber.serve.dump import dump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = 2  # of what nursery and supervisor say to each other
MAXIMUM = 1 << 16  # bytes a packet
MOST_DESCRIPTORS = 8
_LONG = b'{"long":true}'


def send(end: _socket.socket, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
    """Send one message; raises OSError (BlockingIOError where the end is non-blocking and full)."""
    send_packet(end, dump(message).encode(), descriptors)


def with_entry(message: dict[str, Any], entry: bytes) -> bytes:
    """Return a packet: ``message``, and the JSON of an entry as its second line if there is any."""
    packet = dump(message).encode()
    return packet + b"\n" + entry if entry else packet


def send_packet(end: _socket.socket, packet: bytes, descriptors: tuple[int, ...] = (), flags: int = 0) -> None:
    """Send one message that is JSON already; raises OSError."""
    memory = -1
    if len(packet) > MAXIMUM:
        memory = os.memfd_create("long", os.MFD_CLOEXEC)
        with open(memory, "wb", closefd=False) as file:
            file.write(packet)
        packet = _LONG
        descriptors = (memory, *descriptors)
    try:
        end.sendmsg([packet], channel.rights(descriptors), _socket.MSG_NOSIGNAL | flags)
    finally:
        if memory >= 0:
            os.close(memory)


def receive(end: _socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Return the next message and its descriptors, (None, []) at the end. Raises OSError, ValueError."""
    packet, descriptors = receive_json(end)
    if not packet:
        return None, []
    try:
        return parse(packet), descriptors
    except ValueError:
        close_all(descriptors)
        raise


def parse(packet: bytes) -> dict[str, Any]:
    """Return the message that ``packet`` is; raises ValueError."""
    message = lean.parse(packet)
    if not isinstance(message, dict):
        raise ValueError("a message is no object")
    return message


def receive_json(end: _socket.socket) -> tuple[bytes, list[int]]:
    """Return the next message as the JSON that it is, however it came, and its descriptors. Raises OSError."""
    packet, descriptors = receive_packet(end)
    if packet == _LONG and descriptors:
        with open(descriptors.pop(0), "rb") as file:
            file.seek(0)
            packet = file.read()
    return packet, descriptors


def receive_packet(end: _socket.socket, size: int = MAXIMUM, flags: int = 0) -> tuple[bytes, list[int]]:
    """Return the next packet as it is and its descriptors; no bytes at the end. Raises OSError."""
    room = _socket.CMSG_SPACE(4 * MOST_DESCRIPTORS)
    packet, extra, _, _ = end.recvmsg(size, room, _socket.MSG_CMSG_CLOEXEC | flags)
    descriptors: list[int] = []
    for level, kind, data in extra:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            count = len(data) // 4
            descriptors.extend(struct.unpack(f"={count}i", data[: 4 * count]))
    return packet, descriptors


def close_all(descriptors: list[int]) -> None:
    """Close what came along and nobody wanted."""
    for descriptor in descriptors:
        try:
            os.close(descriptor)
        except OSError:
            pass  # EIO of a file that its sender had: not ours to repair
    descriptors.clear()
