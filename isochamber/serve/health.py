"""Health: a command beside a tenant, again and again, that tells whether it is well."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from isochamber.errors import IsochamberError
from isochamber.launch.lean import signal
from isochamber.serve import containers
from isochamber.serve.unit import Unit

if TYPE_CHECKING:
    from isochamber.serve.supervisor import Supervisor


class Health:
    """Looks after the supervisor's tenants."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def watch(self, one: Unit) -> None:
        """Look after a tenant that has just begun to run, if it has such a command."""
        raw = self._supervisor.containers.find(one.tid)
        health = containers.service(raw).get("health") if raw is not None else None
        if health is None or one.held is None or one.held["kind"] != "service" or one.health_task is not None:
            return
        one.health = "starting"
        task = asyncio.get_running_loop().create_task(self._look_after(one, health))
        one.health_task = task

    async def _look_after(self, one: Unit, health: dict[str, Any]) -> None:
        failed = 0
        begun = asyncio.get_running_loop().time()
        while one.runs:
            await asyncio.sleep(health["interval"])
            if one.paused or not one.runs:
                continue
            try:
                code = await self._supervisor.exec_quietly(one, health["argv"], health["timeout"])
            except IsochamberError:
                continue  # it has just ended
            if code == 0:
                failed = 0
                self._healthy(one, "healthy")
            elif asyncio.get_running_loop().time() - begun >= health["start_period"]:
                failed += 1
            if failed >= health["retries"]:
                self._healthy(one, "unhealthy")
                raw = self._supervisor.containers.find(one.tid)
                if raw is not None and containers.service(raw).get("restart") != "no":
                    one.unhealthy = True
                    self._supervisor.tell({"do": "signal", "key": one.tid, "number": int(signal.SIGKILL)})
                    return

    def _healthy(self, one: Unit, word: str) -> None:
        if one.health != word:
            one.health = word
            self._supervisor.event(f"health-{word}", one)
            one.touch()
