#!/usr/bin/env python3
"""The host's side of the courier: a unix socket in /tmp/tenant_ipc/courier that answers every line with a receipt.

Run it as root, leave it running, and start the tenant in another terminal. It stands
for the daemon that serves tenants on a real machine, so it also shows how to treat
them: a tenant is hostile, so a line has a length limit, a connection a time limit,
descriptors are never received (recv(2) drops them), and what is printed is escaped.
"""

import argparse
import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

_DIRECTORY = Path("/tmp/tenant_ipc")  # noqa: S108 - the name is fixed, see docs/how-to/speak-over-ipc.md
_LONGEST = 4096  # bytes a line
_PATIENCE = 5.0  # seconds a connection


def read_line(connection: socket.socket) -> str:
    """Return one line without its end; what does not end within the limits counts as it is. Raises OSError."""
    received = b""
    while b"\n" not in received and len(received) < _LONGEST:
        chunk = connection.recv(_LONGEST - len(received))
        if not chunk:
            break
        received += chunk
    return received.partition(b"\n")[0].decode("utf-8", "replace")


def serve(listener: socket.socket, visits: int | None) -> None:
    """Answer ``visits`` connections (None: until stopped), one after another."""
    number = 0
    while visits is None or number < visits:
        connection, _ = listener.accept()
        number += 1
        with connection:
            connection.settimeout(_PATIENCE)
            try:
                item = read_line(connection)
                connection.sendall(f"receipt {number}: {len(item)} characters\n".encode())
            except OSError as error:
                sys.stdout.write(f"{number}: {error}\n")
            else:
                sys.stdout.write(f"{number}: {item!a}\n")
            sys.stdout.flush()


@contextlib.contextmanager
def bound_socket(path: Path) -> Iterator[socket.socket]:
    """Give a listening socket at ``path``, which is removed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(path))
        try:
            # Connecting takes write permission, and the tenant's root owns the socket only where the
            # file system allows id-mapped mounts (a tmpfs does from Linux 6.3 on).
            path.chmod(0o666)
            listener.listen()
            yield listener
        finally:
            path.unlink(missing_ok=True)


def main() -> int:
    """Serve until Ctrl-C, or for ``--visits``."""
    parser = argparse.ArgumentParser(description="the host's side of the courier example")
    parser.add_argument("--directory", type=Path, default=_DIRECTORY, help="default: %(default)s")
    parser.add_argument("--visits", type=int, help="answer so many connections and end (default: until Ctrl-C)")
    arguments = parser.parse_args()
    path = arguments.directory / "courier" / "desk.sock"
    with contextlib.suppress(KeyboardInterrupt), bound_socket(path) as listener:
        sys.stdout.write(f"the desk is open: {path}\n")
        sys.stdout.flush()
        serve(listener, arguments.visits)
    return 0


if __name__ == "__main__":
    sys.exit(main())
