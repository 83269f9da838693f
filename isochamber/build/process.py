"""Running a tool or a sandbox for a build: its output to a log and to the progress, its end bounded."""

import contextlib
import os
import subprocess
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from isochamber.build.progress import Product
from isochamber.errors import IsochamberError

MAX_LOG_BYTES = 16 << 20
MAX_LINE_BYTES = 4096
LAST_LINES = 12


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a process ended: its status (128+N after signal N) and the last lines it wrote."""

    status: int
    last_lines: tuple[str, ...]


def run(
    argv: Sequence[str], *, log: Path, product: Product, pass_fds: Sequence[int] = (), env: dict[str, str] | None = None
) -> Outcome:
    """Run ``argv`` to its end; its output (both streams) goes to ``log``, bounded, and to ``product`` line by line.

    A line without an end is cut at MAX_LINE_BYTES; past MAX_LOG_BYTES output is still
    read, so that nobody blocks on it, but not kept. Raises OSError when it can't be started.
    """
    last: deque[str] = deque(maxlen=LAST_LINES)
    left = MAX_LOG_BYTES
    with contextlib.ExitStack() as stack:
        log.unlink(missing_ok=True)
        file = stack.enter_context(log.open("xb"))
        process = stack.enter_context(
            subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=pass_fds, env=env, cwd="/", umask=0o022,
            )
        )  # fmt: skip
        stack.callback(process.kill)
        output = process.stdout
        if output is None:
            raise RuntimeError("a pipe was asked for")
        while line := output.readline(MAX_LINE_BYTES):
            if left > 0:
                file.write(line[:left])
            left -= len(line)
            text = line.decode("utf-8", "backslashreplace").rstrip("\r\n")
            last.append(text)
            product.line(text)
        if left < 0:
            file.write(f"\n... {-left} bytes more; the last lines:\n".encode())
            file.writelines(f"{text}\n".encode("utf-8", "backslashreplace") for text in last)
        status = process.wait()
    return Outcome(status if status >= 0 else 128 - status, tuple(last))


def require(program: str, package: str, *, stage: str) -> None:
    """Raise IsochamberError unless ``program`` is on root's PATH; the line names the Debian package."""
    directories = [*os.get_exec_path(), "/usr/sbin", "/sbin"]
    if not any(os.access(os.path.join(directory, program), os.X_OK) for directory in directories):  # noqa: PTH118
        raise IsochamberError(f"{program} is not installed", stage=stage, hint=f"apt-get install {package}")
