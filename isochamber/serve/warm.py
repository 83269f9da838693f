"""Warm sandboxes: one waits for every tenant that is to have one while it does not run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

from isochamber.errors import IsochamberError
from isochamber.serve import containers
from isochamber.serve.containers import Raw
from isochamber.serve.unit import Unit

if TYPE_CHECKING:
    from isochamber.serve.supervisor import Supervisor


class Warm:
    """Has sandboxes made, in the background and one at a time."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._task: asyncio.Task[None] | None = None
        self._wanted = False

    def close(self) -> None:
        """Make no more."""
        if self._task is not None:
            self._task.cancel()

    def refill(self) -> None:
        """See to it, in a while, that a sandbox waits for every tenant that is to have one."""
        self._wanted = True
        if (self._task is None or self._task.done()) and not self._supervisor.closing:
            self._task = asyncio.get_running_loop().create_task(self._refill())

    async def _refill(self) -> None:
        while self._wanted:
            self._wanted = False
            for raw in tuple(self._cold_ones()):
                while self._supervisor.starting:
                    await asyncio.sleep(0.02)  # whoever waits for a start goes first
                one = self._supervisor.unit_of(raw["tid"], raw["name"])
                if not one.runs and one.warm is None:
                    await self._warm_up(one, raw)

    async def _warm_up(self, one: Unit, raw: Raw) -> None:
        try:
            await self._supervisor.ask_to_start(raw, {"kind": "warm"})
        except IsochamberError as error:
            if not one.runs:  # else somebody was faster, and started it
                one.warm_failed = raw.get("digest")
                self._supervisor.event("error", one, error=error.line())

    def _cold_ones(self) -> Iterable[Raw]:
        for raw in self._supervisor.containers.all():
            if not containers.service(raw).get("warm"):
                continue
            one = self._supervisor.units.get(raw["tid"])
            if one is None or not (
                one.runs
                or one.warm is not None
                or one.warm_failed == raw.get("digest")
                or one.restart_timer is not None
            ):
                yield raw
