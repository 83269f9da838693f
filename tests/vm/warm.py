"""A machine stopped when everything is imported, from which others go on: most of an emulator's boot is not ours.

The data disk is not mounted then, and nothing of it is in the guest's memory: whoever goes on has a disk of its
own, of the same size. /run is as after a boot, and so is all that the project looks at to tell one.
"""

import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.vm import image
from tests.vm.machine import Machine, Parts, Saved
from tests.vm.power import LIFE

_DEADLINE = 300.0


def _ask(monitor: socket.socket, command: str, **arguments: Any) -> Any:
    """Give the emulator one command (QMP) and return its answer."""
    monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
    with monitor.makefile("r") as lines:
        for line in lines:
            message = json.loads(line)
            assert "error" not in message, message
            if "return" in message:
                return message["return"]
    raise AssertionError(f"the emulator is gone after {command}")


def _save(path: Path, memory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(str(path))
        _ask(monitor, "qmp_capabilities")
        _ask(monitor, "migrate", uri=f"exec:cat >{memory}")
        deadline = time.monotonic() + _DEADLINE
        while (found := _ask(monitor, "query-migrate"))["status"] != "completed":
            assert found["status"] not in ("failed", "cancelled"), found
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        _ask(monitor, "quit")


def save(parts: Parts, directory: Path, *, size: str, memory: str) -> Saved:
    """Boot a machine with a data disk of ``size``, let the program of the power cuts import what it needs, and stop."""
    directory.mkdir()
    root, monitor = directory / "root.img", directory / "monitor"
    saved = Saved(directory / "memory", root)
    subprocess.run(["cp", "--sparse=always", parts.root, root], check=True, timeout=300)
    machine = _Kept(
        parts, directory, image.make_data(directory / "data.img", None, size), data_options="later", memory=memory,
        more=("-qmp", f"unix:{monitor},server=on,wait=off"), kept=root,
    )  # fmt: skip
    with machine:
        for _, text in machine.stream(*LIFE, "wait", timeout=_DEADLINE, direct=True):
            assert json.loads(text) == {"warm": 1}, text
            break
        _save(monitor, saved.memory)
    return saved


class _Kept(Machine):
    """A machine whose root disk's writes are kept."""

    def __init__(self, *arguments: Any, kept: Path, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kept = kept

    def _root(self) -> str:
        return f"format=raw,file={self._kept}"
