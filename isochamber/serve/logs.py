"""Reading a tenant's ring of logs: the last lines, since when, and following it across its turns."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any

from isochamber.launch import syscalls
from isochamber.serve.ring import NAME

_CHUNK = 1 << 16
Line = dict[str, Any]


def files(directory: str) -> list[str]:
    """Return the ring's files, oldest first."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    numbers = sorted((int(name[len(NAME) + 1 :]) for name in names if name[len(NAME) + 1 :].isdigit()), reverse=True)
    found = [f"{directory}/{NAME}.{number}" for number in numbers]
    return [*found, f"{directory}/{NAME}"] if NAME in names else found


def parse(record: bytes) -> Line | None:
    """Return one record as an object; None for what is none (a file cut by a full disk)."""
    fields = record.split(b" ", 3)
    if len(fields) != 4:
        return None
    return {
        "time": fields[0].decode("ascii", "replace"),
        "stream": fields[1].decode("ascii", "replace"),
        "partial": fields[2] == b"P",
        "text": fields[3].decode("utf-8", "surrogateescape"),
    }


class _Place:
    """Where a reader stands: in which file of the ring, and what of a record it has read so far."""

    def __init__(self) -> None:
        self.descriptor = -1
        self._rest = b""

    def go_to(self, path: str) -> bool:
        """Stand at the beginning of a file; False when it is not there (it has just been renamed)."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        self.close()
        self.descriptor, self._rest = descriptor, b""
        return True

    def lines(self, first: str) -> Iterator[Line]:
        """Yield the whole lines from here on that are not older than ``first``."""
        if self.descriptor < 0:
            return
        while data := os.read(self.descriptor, _CHUNK):
            *whole, self._rest = (self._rest + data).split(b"\n")
            for record in whole:
                line = parse(record)
                if line is not None and line["time"] >= first:
                    yield line

    def is_at(self, path: str) -> bool:
        """Say whether ``path`` is the file that we stand in."""
        try:
            return self.descriptor >= 0 and os.path.samestat(os.stat(path), os.fstat(self.descriptor))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Close the file."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def timestamp(seconds: float) -> str:
    """Return seconds since the epoch as the ring writes times, to compare with."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


async def read(
    directory: str, *, tail: int | None, since: float | None, follow: bool, over: Any = None
) -> AsyncIterator[Line]:
    """Yield lines; with ``follow`` until cancelled, or until ``over()`` says that nothing more will come."""
    first = timestamp(since) if since is not None else ""
    place = _Place()
    try:
        if not follow:
            async for line in _what_is_there(directory, place, first, tail):
                yield line
            return
        os.makedirs(directory, 0o700, exist_ok=True)
        with _Watch(directory) as woken:
            async for line in _what_is_there(directory, place, first, tail):
                yield line
            while True:
                ended = over is not None and over()  # asked first: what was written before is read below
                woken.clear()
                for line in _added(directory, place, first):
                    yield line
                if ended:
                    return
                await _either(woken, over)
    finally:
        place.close()


async def _what_is_there(directory: str, place: _Place, first: str, tail: int | None) -> AsyncIterator[Line]:
    last: deque[Line] = deque(maxlen=tail)
    count = 0
    for path in files(directory):
        if not place.go_to(path):
            continue
        for line in place.lines(first):
            if tail is None:
                yield line
            else:
                last.append(line)
            count += 1
            if not count % 4096:
                await asyncio.sleep(0)  # a long log is not everybody's wait
    for line in last:
        yield line


def _added(directory: str, place: _Place, first: str) -> Iterator[Line]:
    """Yield what has been added since, through every turn that the ring has taken."""
    while True:
        yield from place.lines(first)
        if place.is_at(f"{directory}/{NAME}"):
            return
        known = files(directory)
        here = next((number for number, path in enumerate(known) if place.is_at(path)), -1)
        later = known[here + 1 :]  # all of them, where ours has fallen out of the ring
        if not later or not place.go_to(later[0]):
            return


class _Watch:
    """An event that is set when something in a directory changes (inotify(7))."""

    def __init__(self, directory: str) -> None:
        self._descriptor = syscalls.inotify(directory, syscalls.IN_MODIFY | syscalls.IN_CREATE | syscalls.IN_MOVED_TO)
        self._woken = asyncio.Event()

    def __enter__(self) -> asyncio.Event:
        asyncio.get_running_loop().add_reader(self._descriptor, self._wake)
        return self._woken

    def _wake(self) -> None:
        try:
            while os.read(self._descriptor, _CHUNK):
                pass
        except BlockingIOError:
            pass
        self._woken.set()

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)


async def _either(woken: asyncio.Event, over: Any) -> None:
    if over is None:
        await woken.wait()
        return
    tasks = {asyncio.ensure_future(woken.wait()), asyncio.ensure_future(over.changed())}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
