"""A client in the foreground: what it started or looks at through the supervisor, on this terminal."""

from __future__ import annotations

import _socket
import fcntl
import os
import select
import struct
import termios

from isochamber.errors import IsochamberError
from isochamber.launch import channel, foreground, terminal
from isochamber.launch.lean import signal
from isochamber.serve import client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_DETACH = b"\x10\x11"  # Ctrl-P Ctrl-Q, as docker and podman have it


def run_tenant(root: str, tenant: str, argv: list[str], *, no_terminal: bool) -> int | None:
    """Run a tenant through the supervisor with our descriptors; returns its exit code. Raises IsochamberError.

    None: there is no supervisor, or it looks after another state directory.
    """
    probe = client.connect()
    if probe is None:
        return None
    probe.close()
    wants = not no_terminal and terminal.wanted()
    try:
        return run({"verb": "run", "root": root, "tenant": tenant, "argv": argv, "terminal": wants})
    except IsochamberError as error:
        if error.stage == client.OTHER_ROOT:
            return None
        raise


def run(request: dict[str, Any]) -> int:
    """Start what ``request`` says with our descriptors, signals and terminal; returns its exit code."""
    if os.isatty(0) and os.environ.get("TERM"):
        request["term"] = os.environ["TERM"]
    started = client.Remote(request)
    shown = foreground.Foreground(started)
    started.say = shown.say
    code = shown.supervise()
    if started.failure is not None:
        raise started.failure
    return code


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
            foreground.make_raw(0)
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
