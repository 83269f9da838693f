"""One life of two tenants on a recorded disk, and what must be true of every state that a power cut leaves of it.

Each part runs in a forked child with a mount namespace and a run-time directory of its
own, which is what a reboot is for the project; everything is imported already.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from isochamber import paths
from isochamber.build import fsck, gc, manifest, registry
from isochamber.build.state import State as StateDirectory
from isochamber.launch import syscalls
from isochamber.serve import logs
from isochamber.serve.ring import Ring
from isochamber.tasks.__main__ import main as doit
from tests.crash import variants, world
from tests.vm import writelog

_LONGEST = 120  # seconds of a child
_SHOWN = 2000  # characters of what it said, in a failure
RING = "logs/tenant-sensor"
Facts = dict[str, Any]


class DiskWorld(world.World):
    """A world of which the state directory and the backups lie on a disk of their own; the packages do not."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.disk = directory / "disk"
        self.root = self.disk / "state"
        self.backups = self.disk / "backups"

    def make(self) -> None:
        """Write everything but what is on the disk."""
        self.disk.mkdir(parents=True)
        super().make()
        self.backups.rmdir()


@dataclass(frozen=True)
class Step:
    """Something that is done, and what the operator has written before it."""

    name: str
    do: Callable[[DiskWorld], None]
    rate: int = 1
    tenants: tuple[str, ...] = ("sensor", "plain")

    def operate(self, made: DiskWorld) -> None:
        """Write what the operator has written until now."""
        made.change(self.rate)
        listed = "".join(f"  {name}: {{package: packages/{name}}}\n" for name in self.tenants)
        made.file.write_text(
            f"root: {made.root}\ndefaults: {{ipc: none, install_network: host}}\n"
            f"bases: {{default: {{}}}}\ntenants:\n{listed}"
        )


def _log(made: DiskWorld) -> None:
    """Write so much that the ring of logs turns more than once."""
    ring = Ring(str(made.root / RING), 4096, 3)
    for number in range(150):
        ring.write(b"stdout", b"%d %s\n" % (number, b"x" * 60))
    ring.close()


def _save(made: DiskWorld) -> None:
    made.backups.mkdir(exist_ok=True)
    os.sync()  # the directory is the operator's
    world.save(made)


STEPS = (
    Step("configure", world.configure),
    Step("log", _log),
    Step("change", world.configure, 2),
    Step("save", _save, 2),
    Step("rollback", world.rollback, 2),
    Step("restore", world.restore, 2),
    Step("prune", world.prune, 2),
    Step("log again", _log, 2),
    Step("delete", world.delete, 2, ("plain",)),
    Step("end", lambda made: None, 2, ("plain",)),
)


@dataclass(frozen=True)
class Announced:
    """A step was done when so many entries had been noted: from there on its facts must hold."""

    step: int
    entries: int
    facts: Facts


def facts(made: DiskWorld) -> Facts:
    """Return what must not be lost: entries, what was deployed, whole products, the backup."""
    found: Facts = {}
    entries = registry.read(StateDirectory(made.root)) if made.root.exists() else {}
    for entry in entries.values():
        found[f"entry of {entry['name']}"] = dict(entry)
        settings = made.root / entry["home"] / "settings"
        found[f"settings of {entry['name']}"] = settings.read_text() if settings.exists() else None
        for lower in entry["lowers"]:
            product = (made.root / lower).parent
            differs = "is gone" if not product.exists() else "; ".join(manifest.differences(product, contents=True))
            found[f"lower {lower} of {entry['name']}"] = differs
    saved = made.backups / "sensor"
    found["backup"] = hashlib.sha256(saved.read_bytes()).hexdigest() if saved.exists() else None
    return found


def _lost(now: Facts, before: Facts, after: Facts) -> list[str]:
    """Return what is neither as it was announced nor as the step that was at work would have made it."""
    return [
        f"{key} is {now.get(key)!r}, and was {before.get(key)!r}"
        for key in before.keys() | after.keys() | now.keys()
        if now.get(key) not in (before.get(key), after.get(key)) and not _made_between(key, now)
    ]


def _made_between(key: str, now: Facts) -> bool:
    """Say whether this is a lower that is there whole: a step may pass through an entry of its own."""
    return key.startswith("lower ") and now.get(key) == ""


def _apart(work: Callable[[], Any], directory: Path, slot: int = 0) -> int:
    """Fork a child that does ``work`` apart from the host and from other slots; its result goes to ``directory``.

    Returns its pid.
    """
    run = directory / "run"
    run.mkdir(exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_LONGEST)
        with (directory / "said").open("wb") as said:
            for descriptor in (1, 2):
                os.dup2(said.fileno(), descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)  # pytest has put its own there
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("run", os.fspath(run), "tmpfs")
        os.environ["ISOCHAMBER_RUN"] = str(run)
        os.environ["ISOCHAMBER_CGROUP"] = f"{paths.cgroup_parent()}-{slot}"  # two may build for the same tid at once
        result = work()
        (directory / "result").write_text(json.dumps(result))
        status = 0
    except BaseException:  # told by what it said
        traceback.print_exc()
    finally:
        os._exit(status)


def _result(status: int, directory: Path) -> Any:
    if status:
        raise AssertionError(f"ended with {status}: {(directory / 'said').read_text(errors='replace')[-4000:]}")
    return json.loads((directory / "result").read_text())


@contextlib.contextmanager
def mounted(image: Path, target: Path) -> Iterator[None]:
    """Mount ``image`` at ``target`` by a loop device."""
    subprocess.run(["mount", "-o", "loop,noatime", image, target], check=True, timeout=60)
    try:
        yield
    finally:
        syscalls.umount2(os.fspath(target))


@dataclass(frozen=True)
class Recording:
    """A disk before its life, everything that was written to it, and when what had been announced."""

    made: DiskWorld
    image: Path
    entries: list[writelog.Entry]
    announced: list[Announced]


def record(made: DiskWorld, image: Path, variant: str | None = None) -> Recording:
    """Do all steps on a copy of ``image``, and return what was written; ``variant`` is of tests.crash.variants."""
    place = Path(tempfile.mkdtemp(dir=image.parent))
    path, copied = place / "log", place / "image"

    def live() -> list[dict[str, Any]]:
        variants.apply(variant)
        log = writelog.Log(path)
        told = [asdict(Announced(-1, 0, {"backup": None}))]
        with writelog.recorded(copied, path) as exported, mounted(exported, made.disk):
            for number, step in enumerate(STEPS):
                step.operate(made)
                step.do(made)
                told.append(asdict(Announced(number, log.read(), facts(made))))
        return told

    writelog.copy(image, copied)
    _, status = os.waitpid(_apart(live, place), 0)
    announced = [Announced(**each) for each in _result(status, place)]
    log = writelog.Log(path)
    log.read()
    shutil.rmtree(place)
    return Recording(made, image, log.entries, announced)


def _judge(made: DiskWorld, place: Path, before: Announced, after: Announced) -> list[str]:
    """Look at the state of which ``place`` has the image, as after a boot; returns what is wrong."""
    shutil.copytree(made.directory, place / "world")  # the operator's files: others may look at another state meanwhile
    syscalls.mount(os.fspath(place / "world"), os.fspath(made.directory), None, syscalls.MS_BIND)
    with mounted(place / "image", made.disk):
        step = STEPS[after.step]
        step.operate(made)
        wrong = _lost(facts(made), before.facts, after.facts)
        wrong += _converge(made, step)
        for name in step.tenants:
            was, now = (each.get(f"entry of {name}") for each in (before.facts, facts(made)))
            if was and now and [was[key] for key in ("tid", "uid_base")] != [now[key] for key in ("tid", "uid_base")]:
                wrong.append(f"{name} is another than before: {now}")
        if step.name == "delete":
            world.delete(made)
            state = StateDirectory(made.root)
            wrong += [f"after the deletion: {finding.line()}" for finding in fsck.check(state, deep=True)]
            if gc.known_tid(state, "sensor"):
                wrong.append("sensor is still there after the deletion")
        return wrong


def _converge(made: DiskWorld, step: Step) -> list[str]:
    made.pipeline()  # puts the stand-in in front of the real tool
    os.environ["ISOCHAMBER_TENANTS"] = str(made.file)
    status = doit([])
    wrong = [f"./doit ended with {status}"] if status else []
    wrong += [finding.line() for finding in fsck.check(StateDirectory(made.root), deep=True)]
    wrong += [f"left over: {name}" for name in made.leftovers()]
    pipeline = made.pipeline()
    wrong += [f"{name} is not configured" for name in step.tenants if not pipeline.configured(name)]
    _log(made)
    ring = logs.files(str(made.root / RING))
    if not ring or not any(logs.parse(line) for line in Path(ring[-1]).read_bytes().split(b"\n")):
        wrong.append(f"the ring of logs does not go on: {ring}")
    return wrong


@dataclass
class Found:
    """What was found in the states of a recording."""

    states: int = 0  # different images
    judged: int = 0  # some of them twice: before and after something was announced without a write
    same: int = 0
    wrong: list[str] = field(default_factory=list)


def judge(recording: Recording, directory: Path, *, seed: int, count: int, at_once: int = 2, until: int = 5) -> Found:
    """Judge ``count`` different states (or as many as there are), ``at_once`` side by side, until so many are wrong.

    ``directory`` should lie in memory.
    """
    found = Found()
    seen: set[tuple[int, int]] = set()
    images: set[int] = set()
    running: dict[int, tuple[int, int, Path, writelog.State]] = {}  # by pidfd

    free = list(range(at_once))

    def reap() -> None:
        (descriptor, *_), _, _ = select.select(list(running), [], [])
        pid, slot, place, state = running.pop(descriptor)
        free.append(slot)
        os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        try:
            wrong = _result(status, place)
        except AssertionError as error:
            wrong = [str(error)]
        found.judged += 1
        if found.judged % 50 == 0:
            logging.getLogger(__name__).info("%d states judged, %d wrong", found.judged, len(found.wrong))
        if wrong:
            wrong.append((place / "said").read_text(errors="replace")[-_SHOWN:])
            found.wrong.append(f"seed {seed}: {state}: {'; '.join(wrong)}")
        shutil.rmtree(place)

    for attempt in range(20):
        if len(images) >= count or len(found.wrong) >= until:
            break
        disk = writelog.Disk(recording.image, recording.entries, directory / "disk.img")
        for state in writelog.states(recording.entries, seed + attempt, count - len(images)):
            place = Path(tempfile.mkdtemp(dir=directory))
            before = [each for each in recording.announced if each.entries <= state.reached][-1]
            after = recording.announced[min(before.step + 2, len(recording.announced) - 1)]
            number = disk.make(state, place / "image")
            if (number, before.step) in seen:
                found.same += 1
                shutil.rmtree(place)
                continue
            seen.add((number, before.step))
            images.add(number)
            if not free:
                reap()
            slot = free.pop()
            work = functools.partial(_judge, recording.made, place, before, after)
            pid = _apart(work, place, slot)
            running[os.pidfd_open(pid)] = (pid, slot, place, state)
            if len(found.wrong) >= until:
                break
        while running:
            reap()
        disk.close()
    found.states = len(images)
    return found
