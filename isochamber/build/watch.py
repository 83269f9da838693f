"""Which files of the staged progs/ an install script opened: fanotify(7) marks on their inodes.

Marks on the inodes and not on the mount: what the script itself makes (a FIFO, say)
must not be opened by us, a file counts wherever it is seen, and a marked inode keeps
its number. Only opening is reported, of files and of directories; a bare stat(2) is
not. Events are taken while the script runs, because the kernel queues a bounded
number of them; when some are lost all the same, everything counts as opened.
"""

import os
import select
import struct
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from isochamber.launch import syscalls

# struct fanotify_event_metadata
_EVENT = struct.Struct("=IBBHQii")
_BUFFER = 64 << 10


class Watch:
    """Marks everything below a directory; ask :meth:`opened` when every process that could open it is dead."""

    def __init__(self, root: Path) -> None:
        """Mark ``root`` and all below it; raises OSError (ENOSYS where the kernel has no fanotify)."""
        self._paths: dict[tuple[int, int], str] = {}
        self._opened: set[str] = set()
        flags = syscalls.FAN_CLASS_NOTIF | syscalls.FAN_CLOEXEC | syscalls.FAN_NONBLOCK | syscalls.FAN_UNLIMITED_MARKS
        self._fd = syscalls.fanotify_init(flags, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            for directory, _, files in os.walk(root):
                self._mark(root, Path(directory))
                for name in files:
                    self._mark(root, Path(directory) / name)
        except BaseException:
            os.close(self._fd)
            raise
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._take, name="fanotify", daemon=True)
        self._thread.start()

    def _mark(self, root: Path, path: Path) -> None:
        status = path.lstat()
        relative = path.relative_to(root)
        self._paths[status.st_dev, status.st_ino] = "" if path == root else str(relative)
        mask = syscalls.FAN_OPEN | syscalls.FAN_ONDIR
        syscalls.fanotify_mark(self._fd, syscalls.FAN_MARK_ADD, mask, syscalls.AT_FDCWD, str(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()
        for descriptor in (self._fd, self._stop_read, self._stop_write):
            os.close(descriptor)

    def _stop(self) -> None:
        if self._thread.is_alive():
            os.write(self._stop_write, b"\0")
            self._thread.join()

    def _take(self) -> None:
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        poller.register(self._stop_read, select.POLLIN)
        while self._stop_read not in dict(poller.poll()):
            self._drain()
        self._drain()

    def _drain(self) -> None:
        """Read every event that is queued."""
        while True:
            try:
                buffer = os.read(self._fd, _BUFFER)
            except BlockingIOError:
                return
            except OSError:  # an event whose file can't be opened any more
                self._lost()
                continue
            for mask, descriptor in _events(buffer):
                if descriptor < 0 or mask & syscalls.FAN_Q_OVERFLOW:
                    self._lost()
                    continue
                status = os.fstat(descriptor)
                os.close(descriptor)
                self._opened.update({path} if (path := self.path_of(status)) is not None else ())

    def _lost(self) -> None:
        self._opened.update(self._paths.values())

    def path_of(self, status: os.stat_result) -> str | None:
        """Return the path that the file with this stat(2) was marked at, wherever it lies now; None: not marked."""
        return self._paths.get((status.st_dev, status.st_ino))

    def opened(self) -> frozenset[str]:
        """Return the paths that were opened, "" for the directory itself; no more events are taken after this."""
        self._stop()
        return frozenset(self._opened)


def _events(buffer: bytes) -> list[tuple[int, int]]:
    events, offset = [], 0
    while offset < len(buffer):
        length, _version, _reserved, _metadata, mask, descriptor, _pid = _EVENT.unpack_from(buffer, offset)
        events.append((mask, descriptor))
        offset += length
    return events
