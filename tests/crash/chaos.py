"""Four processes that do everything at once to one state directory, killed at random, against a model.

``python -m tests.crash.chaos SEED OPERATIONS DIRECTORY RUN_DIRECTORY [SECONDS]`` prints one JSON object. Every worker
owns two tenants, of which it knows what must be true; one more belongs to nobody, and all of them fight over it. An
operation is a child that a warm process forks: the project's own functions, and the real launcher for a start.
"""

import collections
import contextlib
import fcntl
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isochamber import paths
from isochamber.build import backup, durable, entry, fsck, gc, locks, recover, registry
from isochamber.build import restore as restoring
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import command, records
from isochamber.launch import disk as mounting
from tests.build.products import eventually, processes_of
from tests.crash.world import SCRIPT, World, make_missing

WORKERS = 4
OWNED = 2
DISKS = (1, 6)  # tenants with an image of their own
SHARED = "shared"
STUCK = 180.0  # seconds: an operation takes a fraction of one
KILLED = 0.25  # of all operations
PROGRAM = "#!/bin/sh\necho ran >> /home/ran\necho here\n"
RATES = ("1", "2", "3")

# What an operation may be refused with while others work on the same tenant; anything else is a finding.
REFUSED = (
    "runs already", "runs on its former layers", "is running", "was removed meanwhile",
    "there is nothing to go back to", "is not configured", "there is no such tenant", "ended meanwhile",
    "its base, layer or directories are missing", "its layer is missing", "has no directories yet", "no such tenant",
    "nothing is configured yet",
)  # fmt: skip


class Chaos(World):
    """A world with every worker's tenants."""

    def owned(self, worker: int) -> list[str]:
        return [f"w{worker}t{number}" for number in range(OWNED)]

    def every(self) -> list[str]:
        return [*(name for worker in range(WORKERS) for name in self.owned(worker)), SHARED]

    def make(self) -> None:
        super().make()
        lines = [f"root: {self.root}", "defaults: {ipc: none}", "bases: {default: {}}", "tenants:"]
        for number, name in enumerate(self.every()):
            more = "" if number % 4 == 0 else ", install_network: host"  # a bridge is most of what a layer takes
            more += ", limits: {disk: 64M}" if number in DISKS else ""
            lines.append(f"  {name}: {{package: packages/{name}{more}}}")
            progs = self.directory / "packages" / name / "progs"
            progs.mkdir(parents=True)
            script = number % 2 == 0
            config = {"tid": "", "cname": name, "dependencies": "/home/deps.sh" if script else "", "init": "/home/main"}
            (progs.parent / "config.json").write_text(json.dumps(config))
            for path, text in (("main", PROGRAM), ("settings", "1\n"), *((("deps.sh", SCRIPT),) if script else ())):
                (progs / path).write_text(text)
                (progs / path).chmod(0o755)
        self.file.write_text("\n".join(lines) + "\n")

    def settings(self, name: str) -> Path:
        return self.directory / "packages" / name / "progs/settings"

    def converge(self, names: list[str]) -> None:
        """What ./doit does for these tenants, with the lock of the whole run; entries are held back until its end."""
        pipeline = self.pipeline()
        recover.clean(pipeline.state)
        pipeline.hold()
        with registry.together(pipeline.state):
            registry._together.due = float("inf")  # type: ignore[union-attr] # as after a slow write
            for name in names:
                make_missing(pipeline, name)


@dataclass
class Known:
    """What must be true of a tenant; None for ``there`` and several tokens after something that was cut."""

    there: bool | None = False
    tokens: set[str] = field(default_factory=lambda: {""})
    saved: set[str] | None = None  # the tokens one of which its backup holds


class Worker:
    """One of the processes."""

    def __init__(self, world: Chaos, number: int, seed: int) -> None:
        self.world, self.number = world, number
        self.state = State(world.root)
        self.random = random.Random(f"{seed}-{number}")
        self.known = {name: Known() for name in world.owned(number)}
        self.took: dict[str, float] = collections.defaultdict(lambda: 0.05)
        self.done: collections.Counter[str] = collections.Counter()
        self.killed = self.refused = 0
        self.wrong: list[str] = []

    def work(self, operations: int, until: float) -> dict[str, Any]:
        """Do so many, fewer when the time is over."""
        before = len(os.listdir("/proc/self/fd"))
        for count in range(operations):
            told = len(self.wrong)
            self._one(count)
            for line in self.wrong[told:]:
                sys.stderr.write(f"operation {count}, worker {self.number}: {line}\n")
            if len(self.wrong) > 5 or time.monotonic() > until:
                break
        after = len(os.listdir("/proc/self/fd"))
        if after > before:
            self.wrong.append(f"{after - before} descriptors are left open")
        return {
            "done": dict(self.done), "killed": self.killed, "refused": self.refused, "wrong": self.wrong,
            "known": {name: [known.there, sorted(known.tokens)] for name, known in self.known.items()},
        }  # fmt: skip

    def _one(self, count: int) -> None:
        name = self.random.choice([*self.known, *self.known, SHARED])
        known = self.known.get(name, Known(None))
        choices = (
            ["configure"] * 4 + ["run"] * 4 + ["delete", "delete", "backup", "rollback", "prune", "fsck", "restore"]
        )
        choices += ["write", "write", "change", "repair", "thin"]
        what = self.random.choice(choices)
        owned = name in self.known
        if (what in ("write", "restore", "change") and not owned) or (what == "write" and known.there is not True):
            what = "configure"
        if what == "restore" and known.saved is None:
            what = "backup"
        if what == "change":
            self.world.settings(name).write_text(f"{self.random.choice(RATES)}\n")
            what = "configure"
        token = f"{self.number}-{count}"
        status, said = self._child(what, name, token)
        self._judge(what, name, known, token, status, said)
        self._look(f"{count} {what} {name} -> {status}")

    def _child(self, what: str, name: str, token: str) -> tuple[int, str]:
        """Do it in a child, which may be killed; returns its status (-9) and what it said."""
        delay = self.random.uniform(0, 1.2 * self.took[what]) if self.random.random() < KILLED else None
        read, write = os.pipe()
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            os.dup2(write, 2)
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            _be_child(self.world, what, name, token)
        os.close(write)
        pidfd = os.pidfd_open(child)
        try:
            if not select.select([pidfd], [], [], STUCK if delay is None else delay)[0]:
                if delay is None:
                    stack = Path(f"/proc/{child}/stack").read_text()
                    self.wrong.append(f"{what} {name} is stuck: {stack}")
                else:
                    self.killed += 1
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if delay is None:
                self.took[what] = 0.8 * self.took[what] + 0.2 * (time.monotonic() - began)
            os.set_blocking(read, False)
            said = b""
            with contextlib.suppress(BlockingIOError):
                said = os.read(read, 65536)
            self.done[what] += 1
            return os.waitstatus_to_exitcode(status), said.decode(errors="replace")
        finally:
            os.close(pidfd)
            os.close(read)

    def _judge(self, what: str, name: str, known: Known, token: str, status: int, said: str) -> None:
        if status == 125:
            self.refused += 1
            if not any(phrase in said for phrase in REFUSED):
                self.wrong.append(f"{what} {name}: {said.strip()}")
        elif status not in ((0, -9, 137) if (what, name) == ("run", SHARED) else (0, -9)):  # 137: deleted meanwhile
            self.wrong.append(f"{what} {name}: status {status}: {said.strip()[-1500:]}")
        lost = known.there is True and ("no such tenant" in said or "is not configured" in said)
        if lost and name in self.known:
            self.wrong.append(f"{what} {name}: lost: {said.strip()}")
        certain = status == 0
        if what == "configure":
            known.there = True if certain or known.there else None
        elif what == "delete" and certain:
            known.there, known.tokens = False, {""}
        elif what == "delete" and status == -9:
            known.there, known.tokens = None, known.tokens | {""}
        elif what == "write":
            known.tokens = {token} if certain else known.tokens | {token}
        elif what == "backup" and certain:
            known.saved = set(known.tokens)
        elif what == "backup" and status == -9 and known.saved is not None:
            known.saved |= known.tokens
        elif what == "restore" and known.saved is not None:
            if certain:
                known.tokens = set(known.saved)
            elif status == -9:
                known.tokens |= known.saved
            known.there = known.there or None  # it makes directories, and no entry

    def _look(self, after: str) -> None:
        """No tenant lost, none twice, none over something that was taken away; what it wrote is there."""
        try:
            entries = registry.read(self.state)
        except IsochamberError as error:
            self.wrong.append(f"{after}: {error.line()}")
            return
        for key in ("name", "uid_base"):
            values = [found[key] for found in entries.values()]
            if len(set(values)) != len(values):
                self.wrong.append(f"{after}: a {key} stands twice: {sorted(map(str, values))}")
        if self.state.namespace is None:
            return
        shared = self.state.tid(SHARED)
        if _lacks(self.state, entries.get(shared)) and (
            gone := _lacks(self.state, registry.read(self.state).get(shared))
        ):
            self.wrong.append(f"{after}: {SHARED} lacks {gone}")
        for name, known in self.known.items():
            found = entries.get(self.state.tid(name))
            if known.there is not None and (found is not None) != known.there:
                self.wrong.append(f"{after}: {name} is {'lost' if known.there else 'there again'}")
            if found is None or known.there is None:
                continue
            if gone := _lacks(self.state, found):
                self.wrong.append(f"{after}: {name} lacks {gone}")
            elif (held := _token(self.state, name)) not in known.tokens:
                self.wrong.append(f"{after}: /home of {name} holds {held!r}, not one of {sorted(known.tokens)}")


def _lacks(state: State, found: Mapping[str, Any] | None) -> list[str]:
    """Return what an entry refers to and is not there; no entry lacks nothing."""
    if found is not None and found["disk"] is not None:
        with contextlib.suppress(IsochamberError):  # it is being deleted: what is missing is told below
            mounting.attach(str(state.root), str(found["tid"]))  # as a start does
    named = () if found is None else (*found["lowers"], found["upper"], found["home"])
    return [path for path in named if not (state.root / path).is_dir()]


def _token(state: State, name: str) -> str:
    try:
        return (state.home(state.tid(name)) / "token").read_text()
    except FileNotFoundError:
        return ""


def _write(world: Chaos, name: str, token: str) -> None:
    state = State(world.root)
    tid = state.tid(name)
    durable.write_file(state.home(tid) / "token", token.encode(), staging=state.staging_of(tid))


def _delete(world: Chaos, name: str) -> None:
    pipeline = world.pipeline()
    pipeline.state.create()
    gc.delete(pipeline.state, name, pipeline.reporter)


def _prune(world: Chaos, until_free: int | None = None) -> None:
    pipeline = world.pipeline()
    gc.prune(pipeline.state, pipeline.spec, pipeline.reporter, until_free=until_free)


def _fsck(world: Chaos, *, repair: bool = False) -> None:
    """Find only what a cut may leave: never a product that is not whole, and nothing beyond repair."""
    state = State(world.root)
    found = fsck.check(state, deep=not repair)
    broken = [each.line() for each in found if not each.repairable or each.kind not in ("tenant", "leftover")]
    if broken:
        raise AssertionError(str(broken))
    if repair:
        fsck.repair(state, [each for each in found if each.kind == "leftover"])


def _be_child(world: Chaos, what: str, name: str, token: str) -> None:
    code = 99
    file = world.backups / name
    steps: dict[str, Callable[[], object]] = {
        "configure": lambda: world.converge([name, SHARED] if token.endswith(tuple("02468")) else [name]),
        "delete": lambda: _delete(world, name),
        "backup": lambda: backup.backup(State(world.root), name, file),
        "restore": lambda: restoring.restore(State(world.root), file, replace=True),
        "rollback": lambda: entry.rollback(State(world.root), name),
        "prune": lambda: _prune(world),
        "thin": lambda: _prune(world, 1 << 60),
        "fsck": lambda: _fsck(world),
        "repair": lambda: _fsck(world, repair=True),
        "write": lambda: _write(world, name, token),
    }
    try:
        if what == "run":
            argv = command.argv("run", "--root", str(world.root), name)
            os.execv(argv[0], argv)
        steps[what]()
        code = 0
    except IsochamberError as error:
        os.write(2, f"{error.line()}\n".encode())
        code = 125
    except BaseException:  # judged by the worker
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def left_on_the_host(world: Chaos, run: Path, bases: set[int]) -> list[str]:
    """Return what must not be there once every tenant is deleted: processes, mounts, cgroups, records, locks held."""
    found = [f"process {pid}" for base in bases for pid in processes_of(base)]
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    found += [f"mount {path}" for path in mounts if path.startswith((f"{world.root}/", f"{run}/"))]
    top = Path("/sys/fs/cgroup")
    for pattern in (f"{paths.cgroup_parent()}/*/", f"*/{paths.cgroup_parent()}/*/"):
        found += [f"cgroup {path}" for path in top.glob(pattern)]
    found += [f"record {path}" for path in (run / "tenants").glob("*") if (run / "tenants").is_dir()]
    for name in ("staging", "layers", "base_fs", "tenants_fs", "tenants_persist"):
        found += [f"{name}/{path.name}" for path in (world.root / name).iterdir()]
    for path in run.rglob("*"):
        if path.is_file() and "lock" in str(path.relative_to(run)):
            with path.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    found.append(f"held {path}")
    return found


def _settle(world: Chaos, run: Path, answers: list[dict[str, Any]]) -> list[str]:
    """Bring everything to one state, compare it with the model, then take all of it away and look what is left."""
    wrong = []
    state = State(world.root)
    tids = [state.tid(name) for name in world.every()]
    if not eventually(lambda: not any(map(records.held, tids))):
        wrong.append("a tenant does not end")
    for answer in answers:
        for name, (there, tokens) in answer["known"].items():
            held = _token(state, name)
            if there is not None and there != (state.tid(name) in registry.read(state)):
                wrong.append(f"at the end {name}: there should be {there}")
            if there and held not in tokens:
                wrong.append(f"at the end {name}: {held!r} in /home, not one of {tokens}")
    world.converge(world.every())
    entries = registry.read(state)
    bases = {int(found["uid_base"]) for found in entries.values()}
    if sorted(str(found["name"]) for found in entries.values()) != sorted(world.every()):
        wrong.append(f"configured are {[found['name'] for found in entries.values()]}")
    wrong += [finding.line() for finding in fsck.check(state, deep=True)]
    wrong += [f"left over: {name}" for name in world.leftovers()]
    for name in world.every():
        _delete(world, name)
    _prune(world)
    locks.let_builds_go()
    return wrong + left_on_the_host(world, run, bases)


def main() -> None:
    seed, operations = int(sys.argv[1]), int(sys.argv[2])
    world, run = Chaos(Path(sys.argv[3])), Path(sys.argv[4])
    os.environ["ISOCHAMBER_RUN"], os.environ["ISOCHAMBER_CGROUP"] = str(run), run.name
    world.make()
    world.pipeline().state.create()
    began = time.monotonic()
    until = began + float((*sys.argv, "inf")[5])
    pipes = []
    for number in range(WORKERS):
        read, write = os.pipe()
        if os.fork() == 0:
            os.close(read)
            answer: dict[str, Any] = {
                "wrong": ["the worker failed"],
                "done": {},
                "killed": 0,
                "refused": 0,
                "known": {},
            }
            try:
                answer = Worker(world, number, seed).work(operations // WORKERS, until)
            except BaseException:
                answer["wrong"] = [traceback.format_exc()]
            finally:
                with os.fdopen(write, "w") as file:
                    json.dump(answer, file)
                os._exit(0)
        os.close(write)
        pipes.append(os.fdopen(read))
    answers = [json.load(pipe) for pipe in pipes]
    for _ in pipes:
        os.wait()
    wrong = [f"worker {number}: {line}" for number, answer in enumerate(answers) for line in answer["wrong"]]
    try:
        wrong += _settle(world, run, answers)
    except Exception:
        wrong.append(traceback.format_exc())
    done: collections.Counter[str] = collections.Counter()
    for answer in answers:
        done.update(answer["done"])
    summary = {
        "seed": seed, "operations": done.total(), "each": dict(done), "killed": sum(a["killed"] for a in answers),
        "refused": sum(a["refused"] for a in answers), "seconds": round(time.monotonic() - began), "wrong": wrong,
    }  # fmt: skip
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
