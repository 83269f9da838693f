"""The verbs of the protocol: a request in, objects out. docs/reference/protocol.md is their reference."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from isochamber import __version__
from isochamber.errors import IsochamberError
from isochamber.launch.lean import signal
from isochamber.serve import containers, logs, metrics, unit, usage
from isochamber.serve.client import OTHER_ROOT
from isochamber.serve.supervisor import Supervisor, log_directory
from isochamber.serve.unit import Unit

Answer = dict[str, Any]
Items = AsyncIterator[Answer]


async def do(supervisor: Supervisor, request: Answer, descriptors: list[int]) -> Items:
    """Yield the answers to one request, the last of them with "ok"; raises IsochamberError."""
    verb = request.get("verb")
    stream = _STREAMS.get(str(verb))
    if stream is not None:
        async for item in stream(supervisor, request):
            yield {"item": item}
        yield {"ok": True}
        return
    single = _SINGLES.get(str(verb))
    if single is None:
        raise IsochamberError(f"there is no verb {verb!r}", stage="serve", exit_code=2)
    answer = await single(supervisor, request, descriptors)
    yield {"ok": True, **(answer or {})}


def row(one: Unit, raw: Answer) -> Answer:
    """Return what ps shows of a tenant; ``raw`` is its entry, if it still has one."""
    held = one.held or {}
    return {
        "name": one.name, "tid": one.tid, "state": one.state(), "warm": one.warm is not None,
        "pid": held.get("pid") if one.runs else None, "kind": held.get("kind"),
        "base": raw["lowers"][-1].split("/")[1].rsplit("-", 1)[0] if raw.get("lowers") else None,
        "command": " ".join(raw.get("argv", ())), "started_at": held.get("started_at"),
        "exited_at": held.get("ended_at"), "exit_code": unit.exit_code(held) if held else None,
        "restarts": one.restarts, "health": one.health, "ready": one.is_ready, "status_text": one.status_text,
        "log_bytes_lost": held.get("lost", 0), "stale": bool(one.runs and raw and held.get("digest") not in
                                                             (None, raw.get("digest"))),
    }  # fmt: skip


async def _version(supervisor: Supervisor, _request: Answer, _descriptors: list[int]) -> Answer:
    return {"program": __version__, "root": supervisor.root}


async def _ps(supervisor: Supervisor, request: Answer, _descriptors: list[int]) -> Answer:
    known = supervisor.containers.by_tid()
    if request.get("all"):
        for raw in known.values():
            supervisor.unit_of(raw["tid"], raw["name"])
        units = list(supervisor.units.values())
    else:
        units = [one for one in supervisor.units.values() if one.runs or one.restart_timer is not None]
    rows = [row(one, known.get(one.tid, {})) for one in units]
    return {"rows": sorted(rows, key=lambda found: str(found["name"]))}


async def _each(request: Answer, action: Callable[[str], Awaitable[Any]]) -> Answer:
    """Do ``action`` to every tenant named, all at once; the first error is raised when all are done."""
    results = await asyncio.gather(*(action(name) for name in request["tenants"]), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return {"tenants": request["tenants"]}


def _names(supervisor: Supervisor, request: Answer, *, running: bool) -> None:
    if request.get("all"):
        request["tenants"] = [
            one.tid for one in supervisor.units.values() if not running or one.runs or one.restart_timer is not None
        ]


async def _start(supervisor: Supervisor, request: Answer, _descriptors: list[int]) -> Answer:
    if request.get("all"):
        request["tenants"] = [raw["tid"] for raw in supervisor.containers.all()]
    return await _each(request, lambda name: supervisor.start(name, terminal=bool(request.get("terminal"))))


async def _stop(supervisor: Supervisor, request: Answer, _descriptors: list[int]) -> Answer:
    _names(supervisor, request, running=True)
    return await _each(request, lambda name: supervisor.stop(name, request.get("time")))


async def _restart(supervisor: Supervisor, request: Answer, _descriptors: list[int]) -> Answer:
    _names(supervisor, request, running=True)

    async def again(name: str) -> None:
        await supervisor.stop(name, request.get("time"))
        await supervisor.start(name)

    return await _each(request, again)


def _signal(word: object) -> int:
    text = str(word).removeprefix("SIG")
    number = int(text) if text.isdecimal() else int(getattr(signal, f"SIG{text}", 0))
    if not 0 < number < signal.NSIG:
        raise IsochamberError(f"there is no signal {word}", stage="kill", exit_code=2)
    return number


async def _kill(supervisor: Supervisor, request: Answer, _descriptors: list[int]) -> Answer:
    number = _signal(request.get("signal", "KILL"))
    _names(supervisor, request, running=True)

    async def kill(name: str) -> None:
        one = supervisor.known(name)
        if number == signal.SIGKILL:
            one.stopping = True  # the operator means it: no restart
        await supervisor.kill(name, number)
        if number == signal.SIGKILL:
            await supervisor.wait_for_end(one)

    return await _each(request, kill)


async def _pause(supervisor: Supervisor, request: Answer, _descriptors: list[int]) -> Answer:
    _names(supervisor, request, running=True)
    return await _each(request, lambda name: supervisor.pause(name, paused=request["verb"] == "pause"))


async def _run(supervisor: Supervisor, request: Answer, descriptors: list[int]) -> Answer:
    if len(descriptors) != 4:
        raise IsochamberError("run needs four descriptors", stage="serve", exit_code=2)
    if request.get("root", supervisor.root) != supervisor.root:
        raise IsochamberError("the supervisor looks after another one", stage=OTHER_ROOT, path=supervisor.root)
    raw = supervisor.containers.need(request["tenant"])
    more = {"argv": request.get("argv") or [], "terminal": bool(request.get("terminal")), "env": _term(request)}
    answer = await supervisor.run(raw, tuple(descriptors), **more)
    return {"name": raw["name"], "tid": raw["tid"], "pid": answer["pid"]}


def _term(request: Answer) -> dict[str, str]:
    term = request.get("term")
    return {"TERM": term} if isinstance(term, str) and term and "\0" not in term else {}


async def _exec(supervisor: Supervisor, request: Answer, descriptors: list[int]) -> Answer:
    if len(descriptors) != 4:
        raise IsochamberError("exec needs four descriptors", stage="serve", exit_code=2)
    argv, env = request["argv"], {**_term(request), **(request.get("env") or {})}
    texts = [*argv, *env, *env.values()]
    if not argv or not all(isinstance(word, str) and "\0" not in word for word in texts):
        raise IsochamberError("what is to be run must be texts", stage="exec", exit_code=2)
    more: Answer = {"argv": argv, "terminal": bool(request.get("terminal")), "env": env}
    if request.get("cwd"):
        more["cwd"] = str(request["cwd"])
    for key in ("uid", "gid"):
        if request.get(key) is not None:
            number = int(request[key])
            if not 0 <= number < 65536:
                raise IsochamberError(f"{key} is from 0 to 65535", stage="exec", exit_code=2)
            more[key] = number
    answer = await supervisor.exec_for(request["tenant"], tuple(descriptors), **more)
    return {"pid": answer["pid"]}


async def _attach(supervisor: Supervisor, request: Answer, descriptors: list[int]) -> Answer:
    if len(descriptors) != 1:
        raise IsochamberError("attach needs one descriptor", stage="serve", exit_code=2)
    answer = await supervisor.attach(request["tenant"], descriptors[0])
    return {"terminal": answer["terminal"]}


async def _stats(supervisor: Supervisor, request: Answer) -> Items:
    names = request.get("tenants") or []
    while True:
        units = [supervisor.known(name) for name in names] or list(supervisor.units.values())
        known = supervisor.containers.by_tid()
        rows = [
            found for one in units if (found := usage.of(one, has_network=containers.has_network(known.get(one.tid))))
        ]
        yield {"time": unit.now(), "rows": sorted(rows, key=lambda found: str(found["name"]))}
        if not request.get("stream"):
            return
        await asyncio.sleep(max(0.2, float(request.get("interval", 1))))


class _Over:
    """Whether a tenant will say no more, for a reader that follows its log."""

    def __init__(self, one: Unit) -> None:
        self._one = one

    def __call__(self) -> bool:
        return not self._one.runs and self._one.restart_timer is None

    async def changed(self) -> None:
        """Return when it may be another answer."""
        await self._one.changed.wait()


async def _logs(supervisor: Supervisor, request: Answer) -> Items:
    one = supervisor.known(request["tenant"])
    tail = request.get("tail")
    async for line in logs.read(
        log_directory(supervisor.root, one.tid),
        tail=None if tail is None else max(0, int(tail)),
        since=request.get("since"),
        follow=bool(request.get("follow")),
        over=_Over(one),
    ):
        yield line


async def _events(supervisor: Supervisor, request: Answer) -> Items:
    since, stream = request.get("since"), request.get("stream", True)
    queue: asyncio.Queue[Answer] = asyncio.Queue()
    supervisor.listeners.add(queue)
    try:
        for event in tuple(supervisor.events):
            if (since is not None or not stream) and event["time"] >= (since or 0):
                yield event
        if stream:
            yield {"event": "listening", "time": unit.now()}
        while stream:
            yield await queue.get()
    finally:
        supervisor.listeners.discard(queue)


async def _wait(supervisor: Supervisor, request: Answer, _descriptors: list[int]) -> Answer:
    condition = request.get("condition", "stopped")

    async def wait(name: str) -> int:
        one = supervisor.known(name)
        if condition == "stopped":
            return await supervisor.wait_for_end(one)
        while not _reached(one, condition):
            await one.changed.wait()
        return 0

    return {"codes": await asyncio.gather(*(wait(name) for name in request["tenants"]))}


def _reached(one: Unit, condition: str) -> bool:
    known = {
        "running": one.runs and bool(one.held and one.held["running"]), "ready": one.is_ready,
        "healthy": one.health == "healthy", "unhealthy": one.health == "unhealthy", "warm": one.warm is not None,
        "restarting": one.restart_timer is not None,
    }  # fmt: skip
    if condition not in known:
        allowed = ", ".join(["stopped", *known])
        raise IsochamberError(f"there is no condition {condition}, allowed: {allowed}", stage="wait", exit_code=2)
    return known[condition]


async def _metrics(supervisor: Supervisor, _request: Answer, _descriptors: list[int]) -> Answer:
    return {"text": metrics.text(supervisor)}


async def _forget(supervisor: Supervisor, request: Answer, _descriptors: list[int]) -> Answer:
    """Let go of a tenant that is being deleted: stopped, its warm sandbox too, and not started again."""
    tenant = request["tenant"]
    one = next((one for one in supervisor.units.values() if tenant in (one.tid, one.name)), None)
    if one is not None:
        await supervisor.stop(one.tid, 0)
        one.warm_failed = (supervisor.containers.find(one.tid) or {}).get("digest")
        if one.warm is not None:
            supervisor.tell({"do": "signal", "key": one.tid, "number": int(signal.SIGKILL)})
        while one.warm is not None:
            await one.changed.wait()
    return {}


async def _renew(supervisor: Supervisor, _request: Answer, _descriptors: list[int]) -> Answer:
    await supervisor.renew()
    return {}


_SINGLES: dict[str, Callable[[Supervisor, Answer, list[int]], Awaitable[Answer]]] = {
    "version": _version, "ps": _ps, "start": _start, "stop": _stop, "restart": _restart, "kill": _kill,
    "pause": _pause, "resume": _pause, "run": _run, "exec": _exec, "attach": _attach, "wait": _wait,
    "metrics": _metrics, "forget": _forget, "renew": _renew,
}  # fmt: skip
_STREAMS: dict[str, Callable[[Supervisor, Answer], Items]] = {"stats": _stats, "logs": _logs, "events": _events}
