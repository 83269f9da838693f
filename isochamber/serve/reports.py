"""What the nursery tells its supervisor: without ever waiting for it.

A supervisor that is busy reads it later. One that is stopped for so long that too much
waits is hung up on: it asks for everything anew, or the next one does.
"""

from __future__ import annotations

import _socket
import select

from isochamber.serve import wire
from isochamber.serve.dump import dump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from isochamber.serve.loop import Loop

_MOST = 1 << 25  # bytes that may wait: more than the list of as many tenants as a machine has uid ranges for


class Reports:
    """One connection with a supervisor; ``on_orders`` is called when there is something to read from it."""

    def __init__(self, loop: Loop, descriptor: int, on_orders: Callable[[], None]) -> None:
        self.end = _socket.socket(fileno=descriptor)
        self._loop, self._on_orders = loop, on_orders
        self._waiting: list[bytes] = []
        self._bytes = 0
        loop.watch(descriptor, self._happened)

    def send(self, message: dict[str, Any]) -> None:
        """Send a report, or keep it until there is room, in order; raises OSError when it is dead or too far behind."""
        packet = dump(message).encode()
        if not self._waiting:
            try:
                wire.send_packet(self.end, packet, flags=_socket.MSG_DONTWAIT)
                return
            except BlockingIOError:
                self._loop.watch_for_room(self.end.fileno(), wanted=True)
        self._waiting.append(packet)
        self._bytes += len(packet)
        if self._bytes > _MOST:
            raise BlockingIOError

    def _happened(self, happened: int) -> None:
        if happened & select.EPOLLOUT:
            self._send_what_waits()
        if happened & ~select.EPOLLOUT:
            self._on_orders()

    def _send_what_waits(self) -> None:
        sent = 0
        try:
            for packet in self._waiting:
                wire.send_packet(self.end, packet, flags=_socket.MSG_DONTWAIT)
                sent += 1
                self._bytes -= len(packet)
        except BlockingIOError:
            pass
        except OSError:
            sent = len(self._waiting)  # its end is read as well
        del self._waiting[:sent]
        if not self._waiting:
            self._loop.watch_for_room(self.end.fileno(), wanted=False)

    def close(self) -> None:
        """Hang up."""
        self._loop.unwatch(self.end.fileno())
        self.end.close()
