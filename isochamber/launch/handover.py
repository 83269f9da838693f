"""A tenant that is set up until the exec waits here, as the tenant already, until somebody wants it.

What it inherited is closed before it waits: it may wait for hours, and a copy of another
tenant's pipe in it would keep that pipe open. Its own three descriptors come with the word.
"""

from __future__ import annotations

import _socket
import os
import struct

from isochamber.errors import IsochamberError
from isochamber.launch import channel, messages, syscalls
from isochamber.launch.messages import Word

TYPE_CHECKING = False
if TYPE_CHECKING:
    from isochamber.launch.entry import Entry


def send(end: _socket.socket, argv: list[str], descriptors: list[int]) -> bool:
    """Let the tenant behind ``end`` go on: with ``argv`` in place of its own if any, and its descriptors 0, 1, 2.

    False when it is dead, or the words are too long for one packet.
    """
    packet = Word.GO + "\0".join(argv).encode("utf-8", "surrogateescape")
    if len(packet) > messages.MAXIMUM:
        return False
    try:
        end.sendmsg([packet], channel.rights(descriptors), _socket.MSG_NOSIGNAL | _socket.MSG_DONTWAIT)
    except OSError:
        return False
    return True


def wait(entry: Entry, end: _socket.socket) -> None:
    """Wait for GO; whoever was to say it being gone ends this process. Raises OSError."""
    own = end.fileno()
    if own > 3:
        syscalls.close_range(3, own - 1)
    syscalls.close_range(own + 1)
    packet, extra, _, _ = end.recvmsg(messages.MAXIMUM, _socket.CMSG_SPACE(12), _socket.MSG_CMSG_CLOEXEC)
    if packet[:1] != Word.GO:
        raise IsochamberError("nobody wants it any more", stage="launch")
    if extra:
        for number, descriptor in enumerate(struct.unpack("=3i", extra[0][2][:12])):
            os.dup2(descriptor, number)
    if len(packet) > 1:
        entry.argv = packet[1:].decode("utf-8", "surrogateescape").split("\0")
