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
from collections.abc import Iterable
from typing import Any

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.launch import cgroup, records, running, syscalls
from isochamber.launch.lean import signal
from isochamber.serve import containers, link, unit
from isochamber.serve.containers import Containers, Raw
from isochamber.serve.link import Link, Report
from isochamber.serve.unit import Unit

_REMEMBERED = 4096  # events
_READY_PATIENCE = 90.0  # seconds that a tenant may take to be ready before what comes after it starts all the same
_KILL_PATIENCE = 30.0


class Supervisor:
    """All units, over one state directory and one nursery."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.containers = Containers(root)
        self.units: dict[str, Unit] = {}
        self.link: Link | None = None
        self.events: deque[dict[str, Any]] = deque(maxlen=_REMEMBERED)
        self.listeners: set[asyncio.Queue[dict[str, Any]]] = set()
        self.refused = 0
        self._execs: dict[str, asyncio.Future[Report]] = {}
        self._numbers = itertools.count(1)
        self._refill_task: asyncio.Task[None] | None = None
        self._refill_wanted = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._watches: dict[str, int] = {}
        self._starting = 0
        self._closing = False

    # Beginning and end.

    async def begin(self) -> None:
        """Find or start the nursery, take over what it holds, start what should run."""
        fresh = await self._connect()
        self._watch(self.root, self._containers_changed)
        self._watch_ipc()
        if fresh:
            self.spawn(self.start_all())
        else:
            for one in tuple(self.units.values()):
                self._take_over(one)
        self.refill()

    async def _connect(self) -> bool:
        end, fresh = link.find_or_start()
        self.link = Link(end, self._report, self._nursery_gone)
        await self._ask({"do": "list"})
        if fresh:
            for raw in self.containers.all():
                _clean_after_nursery(raw)
        return fresh

    def _take_over(self, one: Unit) -> None:
        """Go on where a former supervisor stopped: a command of health, a restart that was due, a stop."""
        if one.held is None or one.held["kind"] != "service":
            return
        if one.runs:
            one.failures, one.restarts = one.note.get("failures", 0), one.note.get("restarts", 0)
            if one.note.get("stopping"):
                self.spawn(self.stop(one.tid))
            elif one.held["running"]:
                self._watch_health(one)
        elif not one.note.get("stopping"):
            one.failures, one.restarts = one.note.get("failures", 0), one.note.get("restarts", 0)
            self._decide(one)

    def _nursery_gone(self) -> None:
        if not self._closing:
            self.link = None
            self.spawn(self._again())

    async def _again(self) -> None:
        """Find the nursery again, or begin with a new one: every tenant has died with the former."""
        for waiting in self._execs.values():
            if not waiting.done():
                waiting.set_exception(IsochamberError("the nursery has hung up", stage="exec"))
        self._execs.clear()
        if not await self._connect():
            return
        self.event("nursery-died", None)
        for one in tuple(self.units.values()):
            one.warm = None
            if one.runs and one.held is not None:
                one.held = {**one.held, "status": int(signal.SIGKILL), "ended_at": unit.now()}
                self._ended(one)
        self.refill()

    def close(self) -> None:
        """Let go of everything; tenants run on."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        for descriptor in self._watches.values():
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)
        self._watches.clear()
        if self.link is not None:
            self.link.close()

    async def quit_nursery(self) -> None:
        """End the nursery, and with it every tenant that is still there."""
        self._closing = True
        if self.link is not None:
            self.link.tell({"do": "quit"})

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

    def _ask(self, order: Report, descriptors: tuple[int, ...] = ()) -> Any:
        if self.link is None:
            raise IsochamberError("there is no nursery", stage="serve")
        return self.link.ask(order, descriptors)

    def tell(self, order: Report) -> None:
        """Send an order that needs no answer."""
        if self.link is not None:
            self.link.tell(order)

    # Watching files.

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
        if paths.CONTAINERS not in names or not self.containers.refresh():
            return
        for one in self.units.values():
            raw = self.containers.find(one.tid)
            if one.warm is not None and (raw is None or raw.get("digest") != one.warm["note"]):
                self.tell({"do": "signal", "key": one.tid, "number": int(signal.SIGKILL)})
        self.refill()
        self._watch_ipc()

    def _watch_ipc(self) -> None:
        """Watch the parents of the IPC directories: one that is made anew is bound anew into who runs."""
        for source in {entry["ipc"] for entry in self.containers.all() if entry.get("ipc")}:
            parent = os.path.dirname(source.rstrip("/"))
            if parent not in self._watches:
                self._watch(parent, lambda names, source=source: self._ipc_changed(source, names))

    def _ipc_changed(self, source: str, names: set[str]) -> None:
        if os.path.basename(source.rstrip("/")) not in names or not os.path.isdir(source):
            return
        for one in self.units.values():
            raw = self.containers.find(one.tid)
            if raw is not None and raw.get("ipc") == source and (one.runs or one.warm is not None):
                self.spawn(self._rebind(one))

    async def _rebind(self, one: Unit) -> None:
        if one.warm is not None and not one.runs:
            self.tell({"do": "signal", "key": one.tid, "number": int(signal.SIGKILL)})  # made with the former one
            return
        await self._ask({"do": "ipc", "key": one.tid, "name": one.name})
        self.event("ipc", one)

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
            one.warm = None
            one.paused = one.unhealthy = False
            one.health = "starting" if one.note.get("health") else ""
        one.held = report
        one.touch()
        if kind == "started":
            self.event("start", one)
            if report["running"]:
                self._runs(one)
        elif kind == "ended":
            self._ended(one)

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
                self._runs(one)
            else:
                self.event("ready", one)
        one.touch()

    def _runs(self, one: Unit) -> None:
        self._watch_health(one)

    def _warm_report(self, one: Unit, kind: str, report: Report) -> None:
        if kind in ("started", "held") and report["status"] is None:
            one.warm = report
            if kind == "started":
                self.event("warm", one)
        elif kind == "ended" or report["status"] is not None:
            one.warm = None
            self.tell({"do": "forget", "key": report["key"], "ended_at": report["ended_at"]})
            if report["failure"] is not None:
                one.warm_failed = report["note"]
                self.event("error", one, error=link.error_of(report["failure"]).line())
            self.refill()
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
            self._decide(one)
        one.touch()
        self.refill()

    def _decide(self, one: Unit) -> None:
        """Restart a tenant that has ended, if its policy says so."""
        assert one.held is not None  # noqa: S101 - the caller looked
        raw = self.containers.find(one.tid)
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
            self.event("restart-in", one, seconds=round(wait, 3))

    def _restart_now(self, one: Unit) -> None:
        one.restart_timer = None
        one.restarts += 1
        self.spawn(self._restart_and_tell(one))

    async def _restart_and_tell(self, one: Unit) -> None:
        try:
            await self.start(one.tid, by="restart")
        except IsochamberError as error:
            self.event("error", one, error=error.line())
            if one.held is not None and not one.runs and self.containers.find(one.tid) is not None:
                one.held = {**one.held, "ended_at": unit.now(), "started_at": unit.now(), "status": 256}
                self._decide(one)

    # What an operator asks for.

    async def start_all(self) -> None:
        """Start every tenant that is to be kept running, each after those it names."""
        wanted = [raw for raw in self.containers.all() if containers.service(raw).get("restart", "no") != "no"]
        await asyncio.gather(*(self._start_quietly(raw["tid"]) for raw in wanted))

    async def _start_quietly(self, tid: str) -> None:
        try:
            await self.start(tid)
        except IsochamberError as error:
            self.event("error", self.units.get(tid), error=error.line())
            one = self.units.get(tid)
            raw = self.containers.find(tid)
            if raw is not None and not (one and one.runs):
                one = self.unit_of(tid, raw["name"])
                one.failures += 1
                if one.restart_timer is None:  # the IPC directory is not there yet, say
                    wait = unit.wait_before_restart(one)
                    one.restart_timer = asyncio.get_running_loop().call_later(wait, self._restart_now, one)

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
            "do": "start", "kind": "service", "root": self.root, "entry": raw, "digest": raw.get("digest"),
            "logs": log_directory(self.root, raw["tid"]), "terminal": terminal, "note": note,
        }  # fmt: skip
        self._starting += 1
        try:
            await self._ask(order)
            await self._until_running(one)
        finally:
            self._starting -= 1
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
        order = {
            "do": "start", "kind": "run", "root": self.root, "entry": raw, "digest": raw.get("digest"), "note": {},
            **more,
        }  # fmt: skip
        answer: Report = await self._ask(order, descriptors)
        return answer

    async def stop(self, tenant: str, grace: float | None = None) -> bool:
        """Stop a tenant: its signal, its grace, then SIGKILL; returns whether it ran. Waits until nothing is left."""
        one = self._known(tenant)
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
        if seconds > 0 and one.held["running"] and running.catches(one.held["pid"], number):
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
        await self._ask({"do": "freeze", "key": one.tid, "frozen": paused})
        one.paused = paused
        self.event("pause" if paused else "unpause", one)
        one.touch()

    async def exec_for(self, tenant: str, descriptors: tuple[int, ...], **more: Any) -> Report:
        """Start a command beside a running tenant for a client: its channel, and 0, 1 and 2."""
        one = self._running(tenant)
        self.event("exec", one)
        answer: Report = await self._ask({"do": "exec", "tid": one.tid, "name": one.name, **more}, descriptors)
        return answer

    async def exec_quietly(self, one: Unit, argv: list[str], seconds: float) -> int:
        """Run a command beside a tenant with no output and return its status; 137 when it took too long."""
        label = f"health-{next(self._numbers)}"
        ended: asyncio.Future[Report] = asyncio.get_running_loop().create_future()
        self._execs[label] = ended
        started = await self._ask({"do": "exec", "tid": one.tid, "name": one.name, "argv": argv, "note": label})
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
        answer: Report = await self._ask({"do": "attach", "key": one.tid, "name": one.name}, (end,))
        self.event("attach", one)
        return answer

    def _known(self, tenant: str) -> Unit:
        """Return the unit of a name or tid, of one that is configured or still held; raises IsochamberError."""
        for one in self.units.values():
            if tenant in (one.tid, one.name):
                return one
        raw = self.containers.need(tenant)
        return self.unit_of(raw["tid"], raw["name"])

    known = _known

    def _running(self, tenant: str) -> Unit:
        one = self._known(tenant)
        if not one.runs:
            raise IsochamberError("does not run", stage="serve", tenant=one.name, hint=f"isochamber start {one.name}")
        return one

    # Health.

    def _watch_health(self, one: Unit) -> None:
        raw = self.containers.find(one.tid)
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
                code = await self.exec_quietly(one, health["argv"], health["timeout"])
            except IsochamberError:
                continue  # it has just ended
            if code == 0:
                failed = 0
                self._healthy(one, "healthy")
            elif asyncio.get_running_loop().time() - begun >= health["start_period"]:
                failed += 1
            if failed >= health["retries"]:
                self._healthy(one, "unhealthy")
                raw = self.containers.find(one.tid)
                if raw is not None and containers.service(raw).get("restart") != "no":
                    one.unhealthy = True
                    self.tell({"do": "signal", "key": one.tid, "number": int(signal.SIGKILL)})
                    return

    def _healthy(self, one: Unit, word: str) -> None:
        if one.health != word:
            one.health = word
            self.event(f"health-{word}", one)
            one.touch()

    # Warm sandboxes.

    def refill(self) -> None:
        """See to it, in a while, that a sandbox waits for every tenant that is to have one."""
        self._refill_wanted = True
        if (self._refill_task is None or self._refill_task.done()) and not self._closing:
            self._refill_task = asyncio.get_running_loop().create_task(self._refill())
            self._tasks.add(self._refill_task)
            self._refill_task.add_done_callback(self._tasks.discard)

    async def _refill(self) -> None:
        while self._refill_wanted:
            self._refill_wanted = False
            for raw in tuple(self._cold_ones()):
                while self._starting:
                    await asyncio.sleep(0.02)  # whoever waits for a start goes first
                one = self.unit_of(raw["tid"], raw["name"])
                if not one.runs and one.warm is None:
                    await self._warm_up(one, raw)

    async def _warm_up(self, one: Unit, raw: Raw) -> None:
        order = {"do": "start", "kind": "warm", "root": self.root, "entry": raw, "digest": raw.get("digest")}
        try:
            await self._ask(order)
        except IsochamberError as error:
            if not one.runs:  # else somebody was faster, and started it
                one.warm_failed = raw.get("digest")
                self.event("error", one, error=error.line())

    def _cold_ones(self) -> Iterable[Raw]:
        for raw in self.containers.all():
            if not containers.service(raw).get("warm"):
                continue
            one = self.units.get(raw["tid"])
            if one is None or not (
                one.runs
                or one.warm is not None
                or one.warm_failed == raw.get("digest")
                or one.restart_timer is not None
            ):
                yield raw

    def memory_of_warm(self, one: Unit) -> int | None:
        """Return the pid of the process that waits, for whoever counts its memory."""
        return None if one.warm is None else int(one.warm["pid"])


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
