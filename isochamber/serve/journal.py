"""A tenant's lines for the systemd journal, in its native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""

from __future__ import annotations

import _socket

from isochamber import paths

_PRIORITY = {1: b"6", 2: b"3"}  # info, err: as conmon gives them
_MOST = 32768  # bytes a message: a datagram has to fit


def encode(name: str, tid: str, pid: int, stream: int, line: bytes) -> bytes:
    """Return the datagram for one line."""
    fields = [
        b"PRIORITY=" + _PRIORITY[stream],
        b"SYSLOG_IDENTIFIER=" + name.encode(),
        b"CONTAINER_NAME=" + name.encode(),
        b"CONTAINER_ID=" + tid[:12].encode(),
        b"CONTAINER_ID_FULL=" + tid.encode(),
        b"OBJECT_PID=%d" % pid,
    ]
    # With its length, so that whatever is in it is one field.
    message = b"MESSAGE\n" + len(line).to_bytes(8, "little") + line
    return b"\n".join([*fields, message]) + b"\n"


def send(name: str, tid: str, pid: int, stream: int, data: bytes, path: str | None = None) -> int:
    """Send each line of ``data``; returns how many the journal did not take: it never makes a tenant wait."""
    refused = 0
    end = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK)
    try:
        end.connect(path or paths.JOURNAL)
    except OSError:
        end.close()
        return data.count(b"\n") or 1
    for line in data.split(b"\n"):
        for start in range(0, len(line), _MOST):
            try:
                end.send(encode(name, tid, pid, stream, line[start : start + _MOST]))
            except OSError:
                refused += 1
    end.close()
    return refused
