"""The supervisor's process: one at a time, in the foreground, until it is told to end."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import struct
import sys
from typing import Any

from isochamber import paths
from isochamber.errors import IsochamberError, printable
from isochamber.serve import accounts, metrics, server, systemd
from isochamber.serve.supervisor import Supervisor

_FLOCK = "hhqqi4x"


def _lock() -> int:
    """Be the only supervisor of this run-time directory; raises IsochamberError."""
    path = paths.serve_file("lock")
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except BlockingIOError:
        os.close(descriptor)
        raise IsochamberError("another supervisor runs", stage="serve", path=path) from None
    return descriptor


def _say(line: str) -> None:
    sys.stderr.write(f"isochamber: {printable(line)}\n")
    sys.stderr.flush()


async def _serve(
    root: str, group: int | None, textfile: str | None, interval: float, account: float, *, stay: bool
) -> None:
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    supervisor = Supervisor(root)
    # The socket stands before the work: who is started beside us may wait for it.
    listener = systemd.listening_socket() or server.listen(group)
    await supervisor.begin()
    serving = server.Server(supervisor, listener, group)
    systemd.notify("READY=1\nSTATUS=supervising")
    seconds = systemd.watchdog_seconds()
    tasks: list[asyncio.Task[Any]] = [loop.create_task(accounts.keep(supervisor, account))]
    if seconds is not None:
        tasks.append(loop.create_task(_watchdog(seconds)))
    if textfile is not None:
        tasks.append(loop.create_task(_textfile(supervisor, textfile, interval)))
    try:
        await over.wait()
        systemd.notify("STOPPING=1")
        if not stay:
            await asyncio.gather(*(supervisor.stop(one.tid) for one in supervisor.units.values() if one.runs))
            await supervisor.quit_nursery()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        serving.close()
        supervisor.close()
        listener.close()


async def _watchdog(seconds: float) -> None:
    while True:
        systemd.notify("WATCHDOG=1")
        await asyncio.sleep(seconds)


async def _textfile(supervisor: Supervisor, path: str, interval: float) -> None:
    while True:
        try:
            metrics.write(supervisor, path)
        except OSError as error:
            _say(IsochamberError.from_os(error, stage="metrics", path=path).line())
        await asyncio.sleep(interval)


def main(
    root: str, *, group: str | None = None, textfile: str | None = None, interval: float = 15.0,
    account: float = 60.0, stay: bool = True,
) -> int:  # fmt: skip
    """Supervise the tenants of ``root`` until SIGTERM or SIGINT; with ``stay`` they run on after it.

    Raises IsochamberError.
    """
    if os.geteuid() != 0:
        raise IsochamberError("needs root", stage="serve", hint="sudo isochamber serve")
    number = server.group_number(group)
    try:
        lock = _lock()
        try:
            asyncio.run(_serve(root, number, textfile, interval, account, stay=stay))
        finally:
            os.close(lock)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="serve") from error
    return 0
