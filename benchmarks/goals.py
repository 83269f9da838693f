"""The promises: what is compared, the bound, and how the figure is read off what was measured."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import graph, idle, layers, rates, starts
from benchmarks.harness import Group

_FIRST, _WHOLE = "to first instruction", "whole process"

Figure = Callable[[Sequence[Group]], float | None]


@dataclass(frozen=True)
class Row:
    """A goal and what became of it."""

    text: str
    bound: float
    least: bool
    measured: float | None
    outcome: str


@dataclass(frozen=True)
class Goal:
    """One promise; a figure at ``bound`` meets it. ``least``: more is better."""

    text: str
    bound: float
    figure: Figure
    least: bool = False

    def row(self, groups: Sequence[Group]) -> Row:
        """Return the row of the goals' table."""
        found = self.figure(groups)
        if found is None:
            outcome = "not measured"
        else:
            outcome = "met" if (found >= self.bound if self.least else found <= self.bound) else "**missed**"
        return Row(self.text, self.bound, self.least, found, outcome)


def ratio(case: str, other: str, figure: str, other_figure: str | None = None, *, title: str = "") -> Figure:
    """Return case/other, the median of the rounds' ratios, in the first group that has both and begins with title."""

    def of(groups: Sequence[Group]) -> float | None:
        found = (group.ratio(case, other, figure, other_figure) for group in groups if group.title.startswith(title))
        return next((number for number in found if number is not None), None)

    return of


def median(case: str, figure: str, *, title: str) -> Figure:
    """Return a case's median."""

    def of(groups: Sequence[Group]) -> float | None:
        return next((group.median(case, figure) for group in groups if group.title.startswith(title)), None)

    return of


def over(first: Figure, second: Figure) -> Figure:
    """Return the quotient of two figures, as of two groups."""

    def of(groups: Sequence[Group]) -> float | None:
        one, other = first(groups), second(groups)
        return one / other if one is not None and other else None

    return of


def starting(case: str, figure: str, *, title: str) -> Figure:
    """Return the median of the case whose name starts so: some say in it how many they are."""

    def of(groups: Sequence[Group]) -> float | None:
        for group in groups:
            for name in group.samples:
                if group.title.startswith(title) and name.startswith(case):
                    return statistics.median(group.values(name, figure))
        return None

    return of


def _noop(size: int, case: str) -> Figure:
    return median(case, _WHOLE, title=f"graph of {size} tenants")


def _per_build(peer: str) -> Figure:
    """Return how often a tenant's part of our no-op of 1,000 goes into one cached build of the peer."""

    def of(groups: Sequence[Group]) -> float | None:
        ours, theirs = _noop(1000, graph.NOOP)(groups), median(peer, _WHOLE, title=graph.CACHED)(groups)
        return (theirs / graph.BUILDS) / (ours / 1000) if ours and theirs else None

    return of


def _growth(groups: Sequence[Group]) -> float | None:
    """Return what a tenant costs between 1,000 and 5,000, over what one costs between 100 and 1,000."""
    few, some, many = (_noop(size, graph.NOOP)(groups) for size in (100, 1000, 5000))
    if few is None or some is None or many is None:
        return None
    return ((many - some) / 4000) / ((some - few) / 900)


_AT_ONCE = f"{rates.TITLE}, 500 at once"
_BY_ONE = f"{rates.TITLE}, 100 one after another"

GOALS = (
    Goal("start by the supervisor, first instruction, over bwrap's whole process", 1.0,
         ratio(starts.SUPERVISOR, "bwrap", _FIRST, _WHOLE)),
    Goal("start by the supervisor, first instruction, over crun's", 0.4, ratio(starts.SUPERVISOR, "crun", _FIRST)),
    Goal("start by the supervisor, first instruction, over runc's", 0.15, ratio(starts.SUPERVISOR, "runc", _FIRST)),
    Goal("the same, warm, over bwrap's", 0.3, ratio(starts.WARM, "bwrap", _FIRST)),
    Goal("the same, warm, over raw C's exec alone", 1.5, ratio(starts.WARM, starts.EXEC, _FIRST)),
    Goal("isochamber run through the supervisor over crun, whole process", 1.0,
         ratio(starts.THROUGH, "crun", _WHOLE)),
    Goal("isochamber run, cold, over runc, whole process", 1.0, ratio(starts.COLD, "runc", _WHOLE)),
    Goal("isochamber run, cold, over python3 -I -S -c pass", 2.2, ratio(starts.COLD, starts.INTERPRETER, _WHOLE)),
    Goal("starts per second, 500 at once, over crun's", 1.0,
         over(starting(rates.START, rates.FIGURE, title=_AT_ONCE), starting("crun", rates.FIGURE, title=_AT_ONCE)),
         least=True),
    Goal("starts per second, one after another, over bwrap's", 1.0,
         over(starting(rates.SUPERVISED, rates.FIGURE, title=_BY_ONE), starting("bwrap", rates.FIGURE, title=_BY_ONE)),
         least=True),
    *(Goal(f"no-op doit of {size} tenants over bare doit on the same graph", 3.0,
           ratio(graph.NOOP, graph.BARE, _WHOLE, title=f"graph of {size} tenants")) for size in graph.SIZES),
    Goal("one of 1,000 tenants changed over bare doit on the same graph", 3.0,
         ratio(graph.CHANGED, graph.BARE, _WHOLE, title="graph of 1000 tenants")),
    Goal("docker's cached build over a tenant's part of our no-op of 1,000", 50, _per_build(graph.DOCKER), least=True),
    Goal("buildah's cached build over a tenant's part of our no-op of 1,000", 100, _per_build(graph.BUILDAH),
         least=True),
    Goal("growth: a tenant's part from 1,000 to 5,000 over that from 100 to 1,000", 1.2, _growth),
    Goal("isochamber run with 5,000 tenants configured over 10", 1.1,
         ratio(graph.among(graph.RUN, 5000), graph.among(graph.RUN, 10), _WHOLE)),
    Goal("base_fs over debootstrap", 0.55, ratio("base_fs", "debootstrap", _WHOLE)),
    Goal("base_fs with the package cache warm over debootstrap", 0.4,
         ratio("base_fs, cache warm", "debootstrap", _WHOLE)),
    *(goal for what in ("same", "different") for goal in (
        Goal(f"docker build over 20 tenants with {layers.KINDS[what]}", 3.0,
             ratio("docker build", layers.OURS, _WHOLE, title=f"20 tenants with {layers.KINDS[what]}"), least=True),
        Goal(f"disk of 20 tenants with {layers.KINDS[what]} over docker's", 1.0,
             ratio(layers.OURS, "docker build", layers.DISK, title=f"20 tenants with {layers.KINDS[what]}")),
    )),
    Goal("docker's memory of 100 idle tenants, beyond their own processes, over ours", 10,
         ratio("docker", idle.OURS, idle.MEMORY), least=True),
    Goal("stop of a tenant that ignores SIGTERM, grace 0, over docker's", 1.0,
         ratio(idle.OURS, "docker", _WHOLE, title="stop of one")),
    Goal("stop of 200 of them at once, seconds", 1.0, median(idle.OURS, _WHOLE, title="stop of 200")),
)  # fmt: skip

# What the README at the top tells.
HEADLINES = tuple(
    goal.text
    for goal in GOALS
    if not any(word in goal.text for word in ("raw C", "python3", "of 10 ", "of 100 tenants", "one of 1,000", "growth"))
)
