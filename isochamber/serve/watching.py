"""The files that the supervisor watches (inotify(7)): containers.json, and the IPC directories of the host."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any

from isochamber import paths
from isochamber.launch import syscalls
from isochamber.launch.lean import signal
from isochamber.serve.unit import Unit

if TYPE_CHECKING:
    from isochamber.serve.supervisor import Supervisor


class Watching:
    """Notices what changes on the host, and does to the tenants what follows."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._watches: dict[str, int] = {}

    def begin(self) -> None:
        """Watch everything; the directories are there or will be."""
        self._watch(self._supervisor.root, self._containers_changed)
        self._watch_ipc()

    def close(self) -> None:
        """Watch nothing any more."""
        for descriptor in self._watches.values():
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)
        self._watches.clear()

    def _watch(self, path: str, action: Any) -> None:
        try:
            mask = syscalls.IN_MOVED_TO | syscalls.IN_CLOSE_WRITE | syscalls.IN_CREATE
            descriptor = syscalls.inotify(path, mask)
        except OSError:
            return
        former = self._watches.get(path)
        loop = asyncio.get_running_loop()
        if former is not None:
            loop.remove_reader(former)
            os.close(former)
        self._watches[path] = descriptor

        def happened() -> None:
            names = set()
            with contextlib.suppress(BlockingIOError):
                data = os.read(descriptor, 65536)
                while data:
                    length = int.from_bytes(data[12:16], "little")
                    names.add(data[16 : 16 + length].rstrip(b"\0").decode("utf-8", "replace"))
                    data = data[16 + length :]
            action(names)

        loop.add_reader(descriptor, happened)

    def _containers_changed(self, names: set[str]) -> None:
        if paths.CONTAINERS not in names or not self._supervisor.containers.refresh():
            return
        for one in self._supervisor.units.values():
            raw = self._supervisor.containers.find(one.tid)
            if one.warm is not None and (raw is None or raw.get("digest") != one.warm["note"]):
                self._supervisor.tell({"do": "signal", "key": one.tid, "number": int(signal.SIGKILL)})
        self._supervisor.warm.refill()
        self._watch_ipc()

    def _watch_ipc(self) -> None:
        """Watch the parents of the IPC directories: one that is made anew is bound anew into who runs."""
        for source in {entry["ipc"] for entry in self._supervisor.containers.all() if entry.get("ipc")}:
            parent = os.path.dirname(source.rstrip("/"))
            if parent not in self._watches:
                self._watch(parent, lambda names, source=source: self._ipc_changed(source, names))

    def _ipc_changed(self, source: str, names: set[str]) -> None:
        if os.path.basename(source.rstrip("/")) not in names or not os.path.isdir(source):
            return
        for one in self._supervisor.units.values():
            raw = self._supervisor.containers.find(one.tid)
            if raw is not None and raw.get("ipc") == source and (one.runs or one.warm is not None):
                self._supervisor.spawn(self._rebind(one))

    async def _rebind(self, one: Unit) -> None:
        if one.warm is not None and not one.runs:  # made with the former one
            self._supervisor.tell({"do": "signal", "key": one.tid, "number": int(signal.SIGKILL)})
            return
        await self._supervisor.ask({"do": "ipc", "key": one.tid, "name": one.name})
        self._supervisor.event("ipc", one)
