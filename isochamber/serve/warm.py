"""Warm sandboxes: one waits for every tenant that is to have one while it does not run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

from isochamber.errors import IsochamberError
from isochamber.serve import containers, link, unit
from isochamber.serve.containers import Raw
from isochamber.serve.link import Report
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
        except link.HungUpError:
            pass  # what holds then is listed, and what does not is made again
        except IsochamberError as error:
            if not one.runs:  # else somebody was faster, and started it
                one.warm_failed = raw.get("digest")
                self._supervisor.event("error", one, error=error.line())

    def ended(self, one: Unit, report: Report) -> None:
        """A sandbox that waited has ended: it failed, it was told to, or something killed it.

        One that failed would fail again until the tenant's entry changes. One that was
        killed soon after it was made is made again in a while, later each time.
        """
        seconds = (report["ended_at"] or 0) - report["started_at"]
        _, one.warm_failures = unit.after_end("always", 0, 1, seconds, one.warm_failures)
        if report["failure"] is not None:
            one.warm_failed = report["note"]
            self._supervisor.event("error", one, error=link.error_of({**report["failure"], "tenant": one.name}).line())
        elif one.warm_failures > 1:
            wait = unit.delay(one.warm_failures, 0.5)
            one.warm_timer = asyncio.get_running_loop().call_later(wait, self._once_more, one)
            self._supervisor.event("warm-in", one, seconds=round(wait, 3))
        self.refill()

    def _once_more(self, one: Unit) -> None:
        one.warm_timer = None
        self.refill()

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
                or one.warm_timer is not None
            ):
                yield raw
