"""Who is started without being asked for: at the beginning, and again after an end, as the policies say."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from isochamber.errors import IsochamberError
from isochamber.serve import containers, unit
from isochamber.serve.unit import Unit

if TYPE_CHECKING:
    from isochamber.serve.supervisor import Supervisor


class Restarts:
    """Starts the supervisor's tenants, now or in a while."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def decide(self, one: Unit) -> None:
        """Restart a tenant that has ended, if its policy says so."""
        assert one.held is not None  # noqa: S101 - the caller looked
        raw = self._supervisor.containers.find(one.tid)
        if raw is None or one.restart_timer is not None:
            return
        policy = containers.service(raw)
        seconds = (one.held["ended_at"] or 0) - one.held["started_at"]
        code = 1 if one.unhealthy else unit.exit_code(one.held) or 0
        again, one.failures = unit.after_end(
            policy.get("restart", "no"), policy.get("retries", 0), code, seconds, one.failures
        )
        if again:
            wait = unit.wait_before_restart(one)
            one.restart_timer = asyncio.get_running_loop().call_later(wait, self._restart_now, one)
            self._supervisor.event("restart-in", one, seconds=round(wait, 3))

    def _restart_now(self, one: Unit) -> None:
        one.restart_timer = None
        one.restarts += 1
        self._supervisor.spawn(self._restart_and_tell(one))

    async def _restart_and_tell(self, one: Unit) -> None:
        try:
            await self._supervisor.start(one.tid, by="restart")
        except IsochamberError as error:
            self._supervisor.event("error", one, error=error.line())
            if one.held is not None and not one.runs and self._supervisor.containers.find(one.tid) is not None:
                one.held = {**one.held, "ended_at": unit.now(), "started_at": unit.now(), "status": 256}
                self.decide(one)

    async def start_all(self) -> None:
        """Start every tenant that is to be kept running, each after those it names."""
        wanted = [
            raw for raw in self._supervisor.containers.all() if containers.service(raw).get("restart", "no") != "no"
        ]
        await asyncio.gather(*(self._start_quietly(raw["tid"]) for raw in wanted))

    async def _start_quietly(self, tid: str) -> None:
        try:
            await self._supervisor.start(tid)
        except IsochamberError as error:
            self._supervisor.event("error", self._supervisor.units.get(tid), error=error.line())
            one = self._supervisor.units.get(tid)
            raw = self._supervisor.containers.find(tid)
            if raw is not None and not (one and one.runs):
                one = self._supervisor.unit_of(tid, raw["name"])
                one.failures += 1
                if one.restart_timer is None:  # the IPC directory is not there yet, say
                    wait = unit.wait_before_restart(one)
                    one.restart_timer = asyncio.get_running_loop().call_later(wait, self._restart_now, one)
