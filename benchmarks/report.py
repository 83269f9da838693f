"""What was measured, as tables and as JSON; goals against figures, missed ones too."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Group

HERE = Path(__file__).parent
README, RESULT = HERE / "README.md", HERE / "result.json"
_MARKS = ("<!-- benchmark: begin -->", "<!-- benchmark: end -->")


@dataclass(frozen=True)
class Goal:
    """One promise: what is compared, the bound, and how it is read off the groups (None: not measured)."""

    text: str
    bound: float
    figure: Callable[[Sequence[Group]], float | None]

    def row(self, groups: Sequence[Group]) -> dict[str, object]:
        """Return the row of the goals' table."""
        found = self.figure(groups)
        outcome = "not measured" if found is None else "reached" if found <= self.bound else "missed"
        return {"goal": self.text, "bound": self.bound, "measured": found, "outcome": outcome}


def ratio(
    case: str, other: str, figure: str, other_figure: str | None = None
) -> Callable[[Sequence[Group]], float | None]:
    """Return a goal's figure: case/other, round by round, in the first group that has both."""

    def of(groups: Sequence[Group]) -> float | None:
        found = (group.ratio(case, other, figure, other_figure) for group in groups)
        return next((number for number in found if number is not None), None)

    return of


def tell(groups: Sequence[Group], goals: Sequence[Goal], *, write: bool) -> str:
    """Return the tables; with ``write``, put them into README.md and the samples into result.json."""
    rows = [goal.row(groups) for goal in goals]
    text = "\n\n".join([_machine(), *(_table(group) for group in groups), _goals(rows)])
    if write:
        harness.save(RESULT, groups, rows)
        before, _, rest = README.read_text().partition(_MARKS[0])
        after = rest.partition(_MARKS[1])[2]
        README.write_text(f"{before}{_MARKS[0]}\n\n{text}\n\n{_MARKS[1]}{after}")
    return text


def _machine() -> str:
    return "Measured on: " + ", ".join(harness.machine().values()) + "."


def _table(group: Group) -> str:
    figures = group.figures()
    lines = [
        f"### {group.title.capitalize()}",
        "",
        f"Medians of {group.rounds} interleaved rounds (lower to upper quartile), milliseconds.",
        "",
    ]
    lines += [f"| | {' | '.join(figures)} |", f"| --- |{' --- |' * len(figures)}"]
    ordered = sorted(group.samples, key=lambda case: group.median(case, figures[0]) or math.inf)
    for case in ordered:
        lines.append(f"| {case} | {' | '.join(_cell(group.values(case, figure)) for figure in figures)} |")
    lines += [f"| {gone.name} | not run here: {gone.reason} |{' |' * (len(figures) - 1)}" for gone in group.absent]
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) < 3:
        return _milliseconds(statistics.median(values))
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{_milliseconds(middle)} ({_milliseconds(low)} to {_milliseconds(high)})"


def _milliseconds(seconds: float) -> str:
    number = seconds * 1000
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 100 else f"{number:.0f}"


def _goals(rows: Sequence[dict[str, object]]) -> str:
    lines = ["### Goals", "", "| goal | at most | measured | |", "| --- | --- | --- | --- |"]
    for row in rows:
        found = row["measured"]
        lines.append(
            f"| {row['goal']} | {row['bound']} | {'' if found is None else f'{found:.2f}'} | {row['outcome']} |"
        )
    return "\n".join(lines)
