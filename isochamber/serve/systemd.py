"""The service manager: readiness, watchdog, socket activation (sd_notify(3), sd_listen_fds(3))."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """Send ``state`` to $NOTIFY_SOCKET; without one, nothing."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as end:
            end.connect("\0" + path[1:] if path.startswith("@") else path)
            end.send(state.encode())
    except OSError:
        pass  # whoever started us does not listen


def watchdog_seconds() -> float | None:
    """Return how often the watchdog wants to hear of us, or None."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if microseconds.isdigit() and int(microseconds) else None


def listening_socket() -> socket.socket | None:
    """Return the socket that was handed to us, or None."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        return None
    os.set_inheritable(3, False)
    return socket.socket(fileno=3)
