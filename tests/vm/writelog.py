"""A disk whose writes and flushes are recorded, and every state that a power cut can leave of it.

qemu-storage-daemon exports an image as a file by FUSE and notes each write and flush
in dm-log-writes' format; a loop device lies on that file. What a disk promises is that
what came before a flush is there after it. So the states are: everything up to a flush,
and of the writes after it some, whole or by the page, in any order.
"""

import contextlib
import hashlib
import os
import random
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DAEMON = "qemu-storage-daemon"
PAGE = 4096  # what a disk writes whole
_SECTOR = 512
_ENTRY = struct.Struct("<QQQQ")  # sector, number of sectors, flags, length of a mark's text
_MAGIC = 0x6A736677736872
_FLUSH, _DISCARD = 1, 4
_STARTED = 20.0  # seconds until the daemon exports


@dataclass(frozen=True)
class Write:
    """One write to the disk."""

    offset: int
    data: bytes

    def pages(self) -> Iterator["Write"]:
        """Yield it in pieces that a disk writes whole."""
        start = 0
        while start < len(self.data):
            end = min(len(self.data), (self.offset + start) // PAGE * PAGE + PAGE - self.offset)
            yield Write(self.offset + start, self.data[start:end])
            start = end


Entry = Write | None  # None: a flush


class Log:
    """A log that may still be written to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = _SECTOR
        self.entries: list[Entry] = []

    def read(self) -> int:
        """Read what was added; returns the number of entries."""
        with self._path.open("rb") as file:
            magic, version, _, sector = struct.unpack("<QQQI", file.read(28))
            assert (magic, version, sector) == (_MAGIC, 1, _SECTOR), f"{self._path} is no log of writes"
            while True:
                file.seek(self._place)
                head = file.read(_SECTOR)
                if len(head) < _SECTOR or not any(head):
                    return len(self.entries)
                start, number, flags, _ = _ENTRY.unpack_from(head)
                self._place += _SECTOR
                if flags & _FLUSH:
                    self.entries.append(None)
                elif flags & _DISCARD:
                    self.entries.append(Write(start * _SECTOR, bytes(number * _SECTOR)))
                else:
                    self.entries.append(Write(start * _SECTOR, file.read(number * _SECTOR)))
                    self._place += number * _SECTOR


@contextlib.contextmanager
def recorded(image: Path, log: Path) -> Iterator[Path]:
    """Give a file that is ``image``, for a loop device; what is written to it and flushed is noted in ``log``.

    In a mount namespace of the caller's own: the file is a mount.
    """
    exported = image.with_suffix(".exported")
    exported.touch()
    with log.open("wb") as file:
        file.truncate(4 << 30)  # sparse: the daemon does not write behind the end of a file
    words = [
        f"driver=raw,node-name=data,file.driver=file,file.filename={image}",
        f"driver=raw,node-name=log,file.driver=file,file.filename={log}",
        "driver=blklogwrites,node-name=logged,file=data,log=log",
    ]
    daemon = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "--", DAEMON, *(word for each in words for word in ("--blockdev", each)),
         "--export", f"type=fuse,id=disk,node-name=logged,mountpoint={exported},writable=on"],
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + _STARTED
        while exported.stat().st_size == 0:
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"{DAEMON} does not export {image}: it ended with {daemon.poll()}")
            time.sleep(0.01)
        yield exported
    finally:
        daemon.terminate()
        daemon.wait(60)


@dataclass(frozen=True)
class State:
    """What a cut left: all entries before ``flushed``, and of the writes from there to ``reached`` the ``kept``."""

    flushed: int
    reached: int
    kept: tuple[Write, ...]
    how: str

    def __str__(self) -> str:
        return f"cut after entry {self.reached}, flushed until {self.flushed}, of the writes between: {self.how}"


def states(entries: list[Entry], seed: int, count: int) -> list[State]:
    """Return about ``count`` states in the order of their cuts, chosen by ``seed``.

    When there is room for them every prefix is one; the rest are subsets.
    """
    dice = random.Random(seed)
    ends = [number + 1 for number, entry in enumerate(entries) if entry is not None]
    prefixes = ends if count >= len(ends) else dice.sample(ends, count // 2)
    chosen = [_state(entries, end, None) for end in prefixes]
    chosen += [_state(entries, dice.choice(ends), dice) for _ in range(count - len(prefixes))]
    return sorted(chosen, key=lambda state: state.reached)


def _state(entries: list[Entry], reached: int, dice: random.Random | None) -> State:
    flushed = reached
    while flushed and entries[flushed - 1] is not None:
        flushed -= 1
    since = [entry for entry in entries[flushed:reached] if entry is not None]
    if dice is None:
        return State(flushed, reached, tuple(since), f"all {len(since)}")
    pieces = [piece for write in since for piece in write.pages()] if dice.random() < 0.5 else since
    share = dice.choice((0.1, 0.5, 0.5, 0.9))
    kept = [number for number in range(len(pieces)) if dice.random() < share]
    return State(flushed, reached, tuple(pieces[number] for number in kept), f"{kept} of {len(pieces)}")


class Disk:
    """An image at a moment of the log, which only goes on; states are copies of it with some writes more."""

    def __init__(self, initial: Path, entries: list[Entry], image: Path) -> None:
        self._entries = entries
        self._place = 0
        copy(initial, image)
        self._image = image
        self._file = image.open("r+b", buffering=0)
        self._pages: dict[int, int] = {}  # page -> hash of what was written there
        self._sum = 0

    def close(self) -> None:
        """Remove the image."""
        self._file.close()
        self._image.unlink()

    def make(self, state: State, target: Path) -> int:
        """Write the image of ``state``, not before the former; returns a number that tells different images apart."""
        for entry in self._entries[self._place : state.flushed]:
            if entry is not None:
                self._apply(entry)
        self._place = max(self._place, state.flushed)
        copy(self._image, target)
        kept: dict[int, int] = {}
        with target.open("r+b", buffering=0) as file:
            for write in state.kept:
                os.pwrite(file.fileno(), write.data, write.offset)
                for page in _touched(write):
                    kept[page] = _hash(file.fileno(), page)
        return self._sum + sum(each - self._before(page) for page, each in kept.items())

    def _before(self, page: int) -> int:
        return self._pages[page] if page in self._pages else _hash(self._file.fileno(), page)

    def _apply(self, write: Write) -> None:
        for page in _touched(write):
            self._sum -= self._before(page)
        os.pwrite(self._file.fileno(), write.data, write.offset)
        for page in _touched(write):
            self._pages[page] = _hash(self._file.fileno(), page)
            self._sum += self._pages[page]


def _touched(write: Write) -> range:
    return range(write.offset // PAGE, (write.offset + len(write.data) - 1) // PAGE + 1)


def _hash(descriptor: int, page: int) -> int:
    content = os.pread(descriptor, PAGE, page * PAGE)
    return int.from_bytes(hashlib.blake2b(content, digest_size=16, salt=page.to_bytes(8, "little")).digest(), "little")


def copy(source: Path, target: Path) -> None:
    """Copy an image, its holes left out."""
    with source.open("rb") as old, target.open("wb") as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        place = 0
        while place < size:
            try:
                place = os.lseek(old.fileno(), place, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                return
            end = os.lseek(old.fileno(), place, os.SEEK_HOLE)
            os.lseek(new.fileno(), place, os.SEEK_SET)
            while place < end:
                place += os.sendfile(new.fileno(), old.fileno(), place, end - place)
