"""The supervisor: which tenants should run, which do, and what happens when one ends.

It forks nothing and holds nothing of a tenant: the nursery does. So it can be killed,
replaced and restarted while they run.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections import deque
from typing import Any

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.launch import cgroup, records
from isochamber.launch.lean import signal
from isochamber.serve import containers, link, unit
from isochamber.serve.containers import Containers, Raw
from isochamber.serve.health import Health
from isochamber.serve.link import Report
from isochamber.serve.nurseries import Nurseries
from isochamber.serve.restarts import Restarts
from isochamber.serve.unit import Unit
from isochamber.serve.warm import Warm
from isochamber.serve.watching import Watching

_REMEMBERED = 4096  # events
_READY_PATIENCE = 90.0  # seconds that a tenant may take to be ready before what comes after it starts all the same
_KILL_PATIENCE = 30.0


class Supervisor:
    """All units, over one state directory and one nursery."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.containers = Containers(root)
        self.units: dict[str, Unit] = {}
        self.nurseries = Nurseries(self._report, self._nursery_gone)
        self.events: deque[dict[str, Any]] = deque(maxlen=_REMEMBERED)
        self.listeners: set[asyncio.Queue[dict[str, Any]]] = set()
        self.refused = 0
        self._execs: dict[str, asyncio.Future[Report]] = {}
        self._numbers = itertools.count(1)
        self.warm, self.health, self.restarts, self._watching = Warm(self), Health(self), Restarts(self), Watching(self)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.starting = 0
        self.closing = False

    # Beginning and end.

    async def begin(self) -> None:
        """Find or start the nursery, take over what it holds, start what should run."""
        fresh = await self._connect()
        self._watching.begin()
        if fresh:
            self.spawn(self.restarts.start_all())
        else:
            for one in tuple(self.units.values()):
                self._take_over(one)
        self.warm.refill()

    async def _connect(self) -> bool:
        fresh = await self.nurseries.connect()
        if self.nurseries.refused is not None:
            self.event("error", None, error=self.nurseries.refused)
            self.nurseries.refused = None
        if fresh:
            for raw in self.containers.all():
                _clean_after_nursery(raw)
        return fresh

    async def renew(self) -> None:
        """Start another nursery for every start from now on; tenants run on. Raises IsochamberError."""
        await self.nurseries.renew()
        self.event("nursery-renewed", None)
        self.warm.refill()

    def _take_over(self, one: Unit) -> None:
        """Go on where a former supervisor stopped: a command of health, a restart that was due, a stop."""
        if one.held is None or one.held["kind"] != "service":
            return
        if one.runs:
            one.failures, one.restarts = one.note.get("failures", 0), one.note.get("restarts", 0)
            if one.note.get("stopping"):
                self.spawn(self.stop(one.tid))
            elif one.held["running"]:
                self.health.watch(one)
        elif not one.note.get("stopping"):
            one.failures, one.restarts = one.note.get("failures", 0), one.note.get("restarts", 0)
            self.restarts.decide(one)

    def _nursery_gone(self) -> None:
        if not self.closing:
            self.spawn(self._again())

    async def _again(self) -> None:
        """Find the nurseries again, or begin with a new one: with one that has died, all its tenants have."""
        lost = [one for one in self.units.values() if self.nurseries.is_lost(one.tid)]
        ran = [one for one in lost if one.runs]
        if ran:
            for waiting in self._execs.values():
                if not waiting.done():
                    waiting.set_exception(IsochamberError("the nursery has hung up", stage="exec"))
            self._execs.clear()
        for one in lost:
            one.warm = None  # one that still waits is listed
        if await self._connect():
            self.event("nursery-died", None)
        for one in lost:
            if not self.nurseries.is_lost(one.tid):
                self._meanwhile(one, ran=one in ran)
            elif one.runs and one.held is not None:
                one.held = {**one.held, "status": int(signal.SIGKILL), "ended_at": unit.now()}
                self._ended(one)
        self.warm.refill()

    def _meanwhile(self, one: Unit, *, ran: bool) -> None:
        """Catch up with what became of a unit while its nursery, which lives, was not listened to."""
        if one.runs and one.held is not None and one.held["running"]:
            self.health.watch(one)
        elif ran and not one.runs:
            self._ended(one)

    def close(self) -> None:
        """Let go of everything; tenants run on."""
        self.closing = True
        for task in self._tasks:
            task.cancel()
        self.warm.close()
        self._watching.close()
        self.nurseries.close()

    async def quit_nursery(self) -> None:
        """End the nursery, and with it every tenant that is still there."""
        self.closing = True
        self.nurseries.quit()

    def spawn(self, work: Any) -> None:
        """Run ``work`` beside everything else; what it fails with becomes an event."""
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Any) -> None:
        try:
            await work
        except IsochamberError as error:
            self.event("error", None, error=error.line())

    def ask(self, order: Report, descriptors: tuple[int, ...] = ()) -> Any:
        """Send an order to the nursery that it is for, and return its answer; raises IsochamberError."""
        return self.nurseries.ask(order, descriptors)

    def ask_to_start(self, raw: Raw, order: Report, descriptors: tuple[int, ...] = ()) -> Any:
        """Have the tenant of the entry ``raw`` started as ``order`` says; raises IsochamberError."""
        head = {
            "do": "start", "root": self.root, "tid": raw["tid"], "name": raw["name"], "digest": raw.get("digest"),
            **order,
        }  # fmt: skip
        return self.nurseries.ask(head, descriptors, self.containers.text_of(raw))

    def tell(self, order: Report) -> None:
        """Send an order that needs no answer."""
        self.nurseries.tell(order)

    # Reports.

    def event(self, what: str, one: Unit | None, **more: Any) -> None:
        """Remember an event and tell who listens."""
        made = {"time": unit.now(), "event": what}
        if one is not None:
            made |= {"name": one.name, "tid": one.tid}
        made |= more
        self.events.append(made)
        for queue in tuple(self.listeners):
            if queue.qsize() < _REMEMBERED:
                queue.put_nowait(made)

    def unit_of(self, tid: str, name: str) -> Unit:
        """Return the unit of a tenant, made when it is new."""
        one = self.units.get(tid)
        if one is None:
            one = self.units[tid] = Unit(tid, name)
        return one

    def _report(self, report: Report) -> None:
        kind = report["on"]
        if kind in ("running", "ready", "status"):
            self._step(kind, report)
            return
        if kind == "syscall":
            self._refused(report)
            return
        if kind == "left":
            self.event("error", None, error=link.error_of(report["error"]).line())
            return
        if report["kind"] == "exec":
            if kind == "ended":
                self.tell({"do": "forget", "key": report["key"], "ended_at": report["ended_at"]})
                waiting = self._execs.pop(report["note"] or "", None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(report)
            return
        one = self.unit_of(report["tid"], report["name"])
        if report["kind"] == "warm":
            self._warm_report(one, kind, report)
            return
        if kind == "started":
            one.refused_before = one.refused
            one.warm, one.warm_failures = None, 0
            one.paused = one.unhealthy = False
            one.health = "starting" if one.note.get("health") else ""
        one.held = report
        one.touch()
        if kind == "started":
            self.event("start", one)
            if report["running"]:
                self.health.watch(one)
        elif kind == "ended":
            self._ended(one)

    def _refused(self, report: Report) -> None:
        """A learned filter has refused something: how often until now, and a line where it is news."""
        one = self.units.get(report["key"])
        if one is None or one.held is None:
            return
        one.held["refused"] = report["refused"]
        if report["text"]:
            self.event("refused", one, text=report["text"])

    def _step(self, kind: str, report: Report) -> None:
        one = self.units.get(report["key"])
        if one is None:
            return
        if kind == "status":
            one.status_text = report["text"]
        elif one.warm is not None and not one.runs:
            return
        elif one.held is not None:
            one.held[kind] = True
            if kind == "running":
                self.health.watch(one)
            else:
                self.event("ready", one)
        one.touch()

    def _warm_report(self, one: Unit, kind: str, report: Report) -> None:
        if kind in ("started", "held") and report["status"] is None:
            one.warm = report
            if kind == "started":
                self.event("warm", one)
        elif kind == "ended" or report["status"] is not None:
            one.warm = None
            self.tell({"do": "forget", "key": report["key"], "ended_at": report["ended_at"]})
            self.warm.ended(one, report)
        one.touch()

    def _ended(self, one: Unit) -> None:
        assert one.held is not None  # noqa: S101 - it has just ended
        if one.health_task is not None:
            one.health_task.cancel()
            one.health_task = None
        code = unit.exit_code(one.held)
        self.event("died", one, exit_code=code)
        if one.held["failure"] is not None:
            self.event("error", one, error=link.error_of({**one.held["failure"], "tenant": one.name}).line())
        if one.held["kind"] == "service" and not one.stopping:
            self.restarts.decide(one)
        one.touch()
        self.warm.refill()

    # What an operator asks for.

    async def start(
        self, tenant: str, *, terminal: bool = False, by: str = "operator", _above: tuple[str, ...] = ()
    ) -> Unit:
        """Start a tenant as a service and return when its program runs; one that runs already is fine."""
        raw = self.containers.need(tenant)
        one = self.unit_of(raw["tid"], raw["name"])
        if one.runs:
            if one.held is not None and not one.held["running"]:
                await self._until_running(one)
            return one
        if one.restart_timer is not None:
            one.restart_timer.cancel()
            one.restart_timer = None
        if by == "operator":
            one.failures = 0
        one.stopping = one.unhealthy = False
        service = containers.service(raw)
        for name in service.get("after", ()):
            if name not in _above:
                await self._after(name, (*_above, raw["name"]))
        if self.units[one.tid].runs:  # asked anew: somebody else may have started it meanwhile
            return one
        note = {
            "ready": service.get("ready", "started"), "failures": one.failures, "restarts": one.restarts,
            "health": service.get("health") is not None,
        }  # fmt: skip
        order = {
            "kind": "service", "logs": log_directory(self.root, raw["tid"]), "terminal": terminal, "note": note,
        }  # fmt: skip
        self.starting += 1
        try:
            await self.ask_to_start(raw, order)
            await self._until_running(one)
        finally:
            self.starting -= 1
        return one

    async def _after(self, name: str, above: tuple[str, ...]) -> None:
        other = await self.start(name, by="restart", _above=above)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_READY_PATIENCE):
                while other.runs and not other.is_ready:
                    await other.changed.wait()

    async def _until_running(self, one: Unit) -> None:
        while one.held is not None and one.runs and not one.held["running"]:
            await one.changed.wait()
        if one.held is not None and one.held["failure"] is not None:
            raise link.error_of({**one.held["failure"], "tenant": one.name})

    async def run(self, raw: Raw, descriptors: tuple[int, ...], **more: Any) -> Report:
        """Start a tenant for a launcher: ``descriptors`` are its channel and the tenant's 0, 1 and 2."""
        one = self.unit_of(raw["tid"], raw["name"])  # whether it runs, the nursery knows best
        if one.restart_timer is not None:
            one.restart_timer.cancel()
            one.restart_timer = None
        answer: Report = await self.ask_to_start(raw, {"kind": "run", "note": {}, **more}, descriptors)
        return answer

    async def stop(self, tenant: str, grace: float | None = None) -> bool:
        """Stop a tenant: its signal, its grace, then SIGKILL; returns whether it ran. Waits until nothing is left."""
        one = self.known(tenant)
        raw = self.containers.find(one.tid)
        service = containers.service(raw) if raw is not None else {}
        how = service.get("stop") or {"signal": "TERM", "grace": 10}
        if one.restart_timer is not None:
            one.restart_timer.cancel()
            one.restart_timer = None
            one.touch()
        if not one.runs or one.held is None:
            return False
        one.stopping = True
        self.tell({"do": "note", "key": one.tid, "note": {**one.note, "stopping": True}})
        seconds = how["grace"] if grace is None else grace
        number = int(getattr(signal, f"SIG{how['signal']}"))
        # A PID 1 without a handler would sleep through the signal, and we through the grace.
        if seconds > 0 and one.held["running"] and records.catches(one.held["pid"], number):
            if one.paused:
                await self.pause(one.tid, paused=False)
            self.tell({"do": "signal", "key": one.tid, "number": number})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.wait_for_end(one)
        if one.runs:
            self.tell({"do": "signal", "key": one.tid, "number": int(signal.SIGKILL)})
            async with asyncio.timeout(_KILL_PATIENCE):
                await self.wait_for_end(one)
        self.event("stop", one)
        return True

    async def wait_for_end(self, one: Unit) -> int:
        """Return the exit code when it has ended; at once if it does not run."""
        while one.runs:
            await one.changed.wait()
        return (unit.exit_code(one.held) if one.held is not None else 0) or 0

    async def kill(self, tenant: str, number: int) -> None:
        """Send a signal to PID 1."""
        one = self._running(tenant)
        self.tell({"do": "signal", "key": one.tid, "number": number})
        self.event("kill", one, signal=number)

    async def pause(self, tenant: str, *, paused: bool) -> None:
        """Stop or continue every process of it."""
        one = self._running(tenant)
        await self.ask({"do": "freeze", "key": one.tid, "frozen": paused})
        one.paused = paused
        self.event("pause" if paused else "unpause", one)
        one.touch()

    async def exec_for(self, tenant: str, descriptors: tuple[int, ...], **more: Any) -> Report:
        """Start a command beside a running tenant for a client: its channel, and 0, 1 and 2."""
        one = self._running(tenant)
        self.event("exec", one)
        answer: Report = await self.ask({"do": "exec", "tid": one.tid, "name": one.name, **more}, descriptors)
        return answer

    async def exec_quietly(self, one: Unit, argv: list[str], seconds: float) -> int:
        """Run a command beside a tenant with no output and return its status; 137 when it took too long."""
        label = f"health-{next(self._numbers)}"
        ended: asyncio.Future[Report] = asyncio.get_running_loop().create_future()
        self._execs[label] = ended
        started = await self.ask({"do": "exec", "tid": one.tid, "name": one.name, "argv": argv, "note": label})
        try:
            async with asyncio.timeout(seconds):
                report = await asyncio.shield(ended)
        except TimeoutError:
            self.tell({"do": "signal", "key": started["key"], "number": int(signal.SIGKILL)})
            report = await ended
        return unit.exit_code(report) or 0

    async def attach(self, tenant: str, end: int) -> Report:
        """Let a client see a tenant's output and type into its terminal."""
        one = self._running(tenant)
        answer: Report = await self.ask({"do": "attach", "key": one.tid, "name": one.name}, (end,))
        self.event("attach", one)
        return answer

    def known(self, tenant: str) -> Unit:
        """Return the unit of a name or tid, of one that is configured or still held; raises IsochamberError."""
        for one in self.units.values():
            if tenant in (one.tid, one.name):
                return one
        raw = self.containers.need(tenant)
        return self.unit_of(raw["tid"], raw["name"])

    def _running(self, tenant: str) -> Unit:
        one = self.known(tenant)
        if not one.runs:
            raise IsochamberError("does not run", stage="serve", tenant=one.name, hint=f"isochamber start {one.name}")
        return one


def log_directory(root: str, tid: str) -> str:
    """Return where a tenant's ring of logs lies."""
    return f"{root}/{paths.TENANTS_PERSIST}/{tid}/log"


def _clean_after_nursery(raw: Raw) -> None:
    """Remove what a nursery that was killed left of a tenant: its groups and its record; of one that runs, nothing."""
    tid = raw["tid"]
    if records.read(tid) is None:
        return
    try:
        lock = records.lock(tid, raw["name"])
    except IsochamberError:
        return  # it runs in the foreground
    try:
        found = cgroup.trees()
        cgroup.remove_all(cgroup.groups_of(tid, found.v1, found))
        records.forget(tid)
    except OSError:
        pass  # the next start of the tenant tries again, and says so
    finally:
        os.close(lock)
