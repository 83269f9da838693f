"""What the supervisor knows of one tenant, and the decisions that follow from it: pure, and tested without root."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Any

from isochamber.errors import exit_code_of

_FIRST_DELAY = 0.1  # seconds, as docker's
_LONGEST_DELAY = 60.0
_LONG_ENOUGH = 10.0  # seconds of running after which former failures do not count


@dataclass
class Unit:
    """A tenant that was started, waits warm, or has run."""

    tid: str
    name: str
    held: dict[str, Any] | None = None  # the nursery's last word on it; None: never started
    warm: dict[str, Any] | None = None
    warm_failed: str | None = None  # the digest whose warm sandbox could not be made
    warm_failures: int = 0  # sandboxes that ended soon after they were made, in a row
    warm_timer: asyncio.TimerHandle | None = None  # until the next one is made
    paused: bool = False
    stopping: bool = False
    failures: int = 0  # in a row, for the delay and for on-failure:MAX
    restarts: int = 0
    unhealthy: bool = False
    health: str = ""  # "", "starting", "healthy", "unhealthy"
    status_text: str = ""
    restart_at: float | None = None  # event loop's clock
    restart_timer: asyncio.TimerHandle | None = None
    health_task: asyncio.Task[None] | None = None
    limits_hit: int = 0
    refused_before: int = 0  # system calls that its filters refused in the runs before this one
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def runs(self) -> bool:
        """Whether its first process is there."""
        return self.held is not None and self.held["status"] is None

    @property
    def refused(self) -> int:
        """Count the system calls that its filters refused, as far as anybody was told."""
        return self.refused_before + int((self.held or {}).get("refused", 0))

    @property
    def is_ready(self) -> bool:
        """Whether what comes after it may start."""
        if self.held is None or not self.runs:
            return False
        return bool(self.held["ready"] if self.note.get("ready") == "notify" else self.held["running"])

    @property
    def note(self) -> dict[str, Any]:
        """What an earlier supervisor, or this one, wrote down for its successor."""
        note = (self.held or {}).get("note")
        return note if isinstance(note, dict) else {}

    def state(self) -> str:
        """Return podman's word for it."""
        if self.held is None:
            return "created"
        if self.runs:
            if self.paused:
                return "paused"
            return "stopping" if self.stopping else "running"
        return "restarting" if self.restart_timer is not None else "exited"

    def touch(self) -> None:
        """Wake whoever waits for a change."""
        self.changed.set()
        self.changed = asyncio.Event()


def exit_code(held: dict[str, Any]) -> int | None:
    """Return what `run` would have exited with; None while it runs."""
    if held["status"] is None:
        return None
    if held["failure"] is not None:
        return int(held["failure"]["exit_code"])
    return exit_code_of(int(held["status"]))


def delay(failures: int, chance: float) -> float:
    """Return the seconds until restart number ``failures`` (from 1): doubled each time, 25 % more or less.

    ``chance`` is from 0 to 1: without it, tenants that fell together would start together.
    """
    return min(_FIRST_DELAY * 2.0 ** max(0, failures - 1), _LONGEST_DELAY) * (0.75 + chance / 2)


def after_end(policy: str, most: int, code: int, seconds: float, failures: int) -> tuple[bool, int]:
    """Return (restart it?, failures in a row) for a tenant that ended with ``code`` after ``seconds``."""
    counted = 1 if seconds >= _LONG_ENOUGH else failures + 1
    if policy == "always":
        return True, counted
    if policy == "on-failure" and code != 0:
        return (most == 0 or counted <= most), counted
    return False, 0


def wait_before_restart(unit: Unit) -> float:
    """Return the seconds until ``unit`` is started again."""
    return delay(unit.failures, random.random())  # noqa: S311 - to spread, not to hide


def now() -> float:
    """Return seconds since the epoch, for people."""
    return time.time()
