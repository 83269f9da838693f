"""A client that looks at a tenant which the supervisor keeps: its output here, and what is typed to its terminal."""

from __future__ import annotations

import _socket
import fcntl
import os
import select
import struct
import termios

from isochamber.launch import channel, screen
from isochamber.launch.lean import signal
from isochamber.serve import client

_DETACH = b"\x10\x11"  # Ctrl-P Ctrl-Q, as docker and podman have it


def attach(tenant: str) -> int:
    """Show a tenant's output until it ends or Ctrl-P Ctrl-Q; returns its exit code, or 0. Raises IsochamberError."""
    ours, theirs = channel.pair()
    control = client.need()
    answer = client.ask(control, {"verb": "attach", "tenant": tenant}, (theirs.fileno(),))
    theirs.close()
    typed = bool(answer["terminal"]) and os.isatty(0)
    former = termios.tcgetattr(0) if typed else None
    try:
        if typed:
            screen.make_raw(0)
            _resize(ours)
            signal.signal(signal.SIGWINCH, lambda _number, _frame: _resize(ours))
        let_go = _shuttle(ours, typed=typed)
    finally:
        ours.close()
        if former is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, former)
    if let_go:
        control.close()
        return 0
    codes = client.ask(control, {"verb": "wait", "tenants": [tenant]})["codes"]
    control.close()
    return int(codes[0])


def _shuttle(end: _socket.socket, *, typed: bool) -> bool:
    """Pass bytes both ways until the tenant ends (False) or the keys to let go are typed (True)."""
    poller = select.poll()
    poller.register(end.fileno(), select.POLLIN)
    if typed:
        poller.register(0, select.POLLIN)
    last = b""
    while True:
        ready = dict(poller.poll())
        if end.fileno() in ready:
            packet = end.recv(1 << 17)
            if not packet:
                return False
            target = 2 if packet[:1] == b"2" else 1
            data = packet[1:]
            while data:
                data = data[os.write(target, data) :]
        if typed and 0 in ready:
            data = os.read(0, 4096)
            if not data or _DETACH in last + data:
                return True
            last = data[-1:]
            end.send(b"0" + data)


def _resize(end: _socket.socket) -> None:
    rows, columns, _, _ = struct.unpack("=HHHH", fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8))
    try:
        end.send(b"W" + struct.pack("=HH", rows, columns), _socket.MSG_DONTWAIT)
    except OSError:
        pass  # it has ended
