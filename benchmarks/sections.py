"""The parts of a benchmark by name: each fills its Section group by group, so that what came before a failure stays."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import builds, graph, idle, layers, learn, rates, starts
from benchmarks.harness import Section
from benchmarks.world import PROJECT, World


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    rounds: int
    sizes: tuple[int, ...] = graph.SIZES
    small: bool = False

    def few(self, part: int) -> int:
        """Return one ``part``-th of the rounds, at least 1."""
        return max(self.rounds // part, 1)


def _starts(world: World, settings: Settings, section: Section) -> None:
    section.groups += starts.measure(world, settings.rounds)


def _rates(world: World, settings: Settings, section: Section) -> None:
    counts = {"sequential": 10, "at_once": 20} if settings.small else {}
    section.groups += rates.measure(world, settings.few(7), **counts)


def _graph(world: World, settings: Settings, section: Section) -> None:
    graph.measure(world, settings.few(3), settings.sizes, section.groups)


def _layers(world: World, settings: Settings, section: Section) -> None:
    section.groups += layers.measure(world, settings.few(7), tenants=2 if settings.small else layers.TENANTS)


def _idle(world: World, settings: Settings, section: Section) -> None:
    counts = {"idle": 4, "stopped": 6} if settings.small else {}
    section.groups += idle.measure(world, settings.few(2), **counts)


def _bases(world: World, settings: Settings, section: Section) -> None:
    section.groups += builds.measure(world, settings.few(5))


def _learn(world: World, settings: Settings, section: Section) -> None:
    section.groups += learn.measure(world, settings.few(3))


def _network(world: World, settings: Settings, section: Section) -> None:
    """Have benchmarks.network measure: in a process of its own, since it leaves our network namespace."""
    for parts, quick in ((["starts", "making"], settings.small), (["rates", "sharing", "throughput"], True)):
        target = world.scratch / "network.json"
        argv = world.python("benchmarks.network", "--json", str(target), *(["--quick"] if quick else []))
        subprocess.run([*argv, "--only", *parts], cwd=PROJECT, check=True, timeout=600, stdout=subprocess.DEVNULL)
        section.rows += json.loads(target.read_text())["rows"]


ALL: dict[str, Callable[[World, Settings, Section], None]] = {
    "starts": _starts,
    "rates": _rates,
    "graph": _graph,
    "layers": _layers,
    "idle": _idle,
    "bases": _bases,
    "learn": _learn,
    "network": _network,
}
