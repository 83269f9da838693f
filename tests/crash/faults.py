"""A cut or an error at the Nth call of every kind, and what must be true afterwards."""

import collections
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.crash.client import FAMILIES, Server, step_of
from tests.crash.world import World

KINDS = {"KILL": "signal=KILL", "EIO": "error=EIO", "ENOSPC": "error=ENOSPC"}
_NAME = re.compile(r"^(?:\d+ +)?(\w+)\(", re.MULTILINE)


@dataclass(frozen=True)
class Point:
    """One fault: in which case, at which call, and what."""

    case: str
    call: str
    number: int
    kind: str

    def __str__(self) -> str:
        return f"{self.case}: {self.kind} at {self.call} {self.number}"


def points(server: Server, worlds: dict[str, World], directory: Path) -> Iterator[Point]:
    """Yield every fault of every case, counted on a trace of it."""
    for case, world in worlds.items():
        copy = world.copy(directory / f"counted {case}")
        counts = collections.Counter(_NAME.findall(server.trace(step_of(case), copy, children=False)))
        copy.remove()
        for call in FAMILIES:
            for number in range(1, counts[call] + 1):
                for kind in KINDS:
                    yield Point(case, call, number, kind)


def sample(every: list[Point], count: int, seed: int) -> list[Point]:
    """Return ``count`` points: one at least of every case, call and kind, the rest at random."""
    shuffled = random.Random(seed).sample(every, len(every))
    first = {(point.case, point.call, point.kind): point for point in shuffled}
    rest = [point for point in shuffled if point not in set(first.values())]
    return [*first.values(), *rest][:count]


def judge(server: Server, point: Point, world: World, wanted: dict[str, str], directory: Path) -> list[str]:
    """Do the case with the fault in it, then again without; returns what is wrong."""
    copy = world.copy(directory)
    inject = f"inject={point.call}:{KINDS[point.kind]}:when={point.number}"
    step = step_of(point.case)
    atomic = point.kind != "KILL" and step in ("rollback", "restore", "save")
    before = copy.snapshot() if atomic else {}
    wrong = []
    try:
        cut = server.ask(step, copy, strace=["-o", "/dev/null", "-e", f"trace={point.call}", "-e", inject])
        if point.kind == "KILL":
            if cut["status"] not in (-9, 0):
                wrong.append(f"ended with {cut}")
        elif cut["status"] not in (0, 125) or len(cut["stderr"].splitlines()) > 1:
            wrong.append(f"no single line: {cut}")
        if atomic and cut["status"] == 125:
            now = copy.snapshot()
            wrong += [f"not as before: {name}" for name in before.keys() | now.keys()
                      if before.get(name) != now.get(name) and "/.tmp-" not in name]  # fmt: skip
        if point.kind == "KILL" and point.number % 2:
            copy.detach()  # as after a boot
        again = server.ask("again", copy, case=step)
        if again["status"]:
            wrong.append(f"again: {again}")
        found = copy.snapshot()
        wrong += [f"{name}: {found.get(name)} instead of {wanted.get(name)}" for name in wanted.keys() | found.keys()
                  if found.get(name) != wanted.get(name)][:5]  # fmt: skip
        wrong += [f"left over: {name}" for name in copy.leftovers()]
        checked = server.ask("check", copy)
        if checked["status"]:
            wrong.append(f"fsck: {checked}")
    finally:
        copy.remove()
    return [f"{point}: {what}" for what in wrong]
