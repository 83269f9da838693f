"""What a tenant says, kept on disk: a ring of files of bounded size, each line with its time and stream.

    2026-11-24T22:02:05.123456Z stdout F a line
    2026-11-24T22:02:05.200000Z stdout P a piece of a line, the rest follows

(the format of Kubernetes' CRI logging, which other tools read). What was read is
written at once, so nothing waits in memory to be lost; what has no line end yet is a
piece (P). The newest file is ``log``, the one before it ``log.1``. No sync: a power
cut may cost the last seconds of output.
"""

from __future__ import annotations

import os
import time

NAME = "log"
_LONGEST = 16384  # bytes of a piece: a line without end becomes many


class Ring:
    """The writing end of one tenant's ring."""

    __slots__ = ("_count", "_directory", "_fd", "_size", "_written", "failed", "lines")

    def __init__(self, directory: str, size: int, count: int) -> None:
        """Open (or make) the ring in ``directory``; raises OSError."""
        self._directory, self._size, self._count = directory, size, count
        os.makedirs(directory, 0o700, exist_ok=True)
        self.failed = 0  # bytes that could not be written (a full disk): output goes on, and is said to be missing
        self.lines = 0
        self._open()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(f"{self._directory}/{NAME}", flags, 0o600)
        self._written = os.fstat(self._fd).st_size

    def write(self, stream: bytes, data: bytes) -> None:
        """Keep ``data`` as it came from ``stream``; never raises for a disk that is full, counts what is lost."""
        head = _now() + b" " + stream
        out = []
        lines = data.split(b"\n")  # and not splitlines: a carriage return is part of a line
        for number, line in enumerate(lines, 1):
            ended = number < len(lines)
            if not line and not ended:
                continue  # what came ended with a newline
            start = 0
            while len(line) - start > _LONGEST:
                out.append(b"%b P %b\n" % (head, line[start : start + _LONGEST]))
                start += _LONGEST
            out.append(b"%b %b %b\n" % (head, b"F" if ended else b"P", line[start:]))
        self.lines += len(out)
        batch: list[bytes] = []
        length = 0
        for record in out:
            if length and length + len(record) > self._size:
                self._put(b"".join(batch))
                batch, length = [], 0
            batch.append(record)
            length += len(record)
        self._put(b"".join(batch))

    def _put(self, record: bytes) -> None:
        if self._written and self._written + len(record) > self._size:
            self._turn()
        try:
            while record:
                done = os.write(self._fd, record)
                self._written += done
                record = record[done:]
        except OSError:
            self.failed += len(record)

    def _turn(self) -> None:
        """Rename every file one on, the oldest away, and begin a new one."""
        try:
            path = f"{self._directory}/{NAME}"
            for number in range(self._count - 1, 0, -1):
                former = path if number == 1 else f"{path}.{number - 1}"
                try:
                    os.rename(former, f"{path}.{number}")
                except FileNotFoundError:
                    continue
            if self._count == 1:
                os.unlink(path)
            os.close(self._fd)
            self._open()
        except OSError:
            pass  # the directory was deleted with its tenant: what is left of it goes to the file that is open

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _now() -> bytes:
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).encode() + b".%06dZ" % (nanoseconds // 1000)
