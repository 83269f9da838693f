"""What was measured, as tables, plots and JSON; goals against figures, missed ones too."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import plots
from benchmarks.goals import GOALS, HEADLINES, Row
from benchmarks.harness import Group, Section

HERE = Path(__file__).parent
README, RESULT, PLOTS = HERE / "README.md", HERE / "result.json", HERE / "plots"
TOP = HERE.parent / "README.md"
MARKS = ("<!-- benchmark: begin -->", "<!-- benchmark: end -->")


def text(sections: Mapping[str, Section], *, pictures: bool = False) -> str:
    """Return every table as Markdown; with ``pictures`` the plots' links too."""
    groups = groups_of(sections)
    parts = [_machine(sections), "### Goals", _goals([goal.row(groups) for goal in GOALS])]
    for section in sections.values():
        parts += [_failure(section)] if section.failure is not None else []
        for group in section.groups:
            parts.append(_table(group))
            if pictures and plots.wanted(group):
                parts.append(f"![{group.title}](plots/{plots.name_of(group)})")
        parts += [_rows(section.rows)] if section.rows else []
    return "\n\n".join(parts)


def groups_of(sections: Mapping[str, Section]) -> list[Group]:
    """Return the groups of all sections."""
    return [group for section in sections.values() for group in section.groups]


def write(sections: Mapping[str, Section]) -> None:
    """Put the tables between the marks of both READMEs, and the plots beside."""
    PLOTS.mkdir(exist_ok=True)
    for section in sections.values():
        for group in filter(plots.wanted, section.groups):
            (PLOTS / plots.name_of(group)).write_text(plots.bars(group))
    between(README, text(sections, pictures=True))
    groups = groups_of(sections)
    rows = [goal.row(groups) for goal in GOALS if goal.text in HEADLINES]
    between(TOP, "\n\n".join([_machine(sections), _goals(rows)]))


def between(file: Path, content: str) -> None:
    """Replace what stands between the marks of ``file``; raises ValueError when it has none."""
    before, begin, rest = file.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise ValueError(f"{file} has no marks")
    file.write_text(f"{before}{MARKS[0]}\n\n{content}\n\n{MARKS[1]}{after}")


def _machine(sections: Mapping[str, Section]) -> str:
    machines = list(dict.fromkeys(", ".join(section.machine.values()) for section in sections.values()))
    seconds = sum(section.seconds for section in sections.values())
    return f"Measured on {'; and on '.join(machines)}; {seconds / 60:.0f} minutes in all."


def _failure(section: Section) -> str:
    return f"**{section.name} was not measured to its end: {_plain(section.failure or '')}**"


def _table(group: Group) -> str:
    figures = group.figures()
    spread = " (lower to upper quartile)" if group.rounds > 2 else ""
    units = "" if any(plots.unit(figure) for figure in figures) else ", milliseconds"
    lines = [
        f"### {group.title[:1].upper()}{group.title[1:]}",
        "",
        f"Medians of {group.rounds} interleaved rounds{spread}{units}." if group.rounds > 1 else "Measured once.",
        "",
    ]
    lines += [f"| | {' | '.join(figures)} |", f"| --- |{' --- |' * len(figures)}"]
    ordered = sorted(group.samples, key=lambda case: group.median(case, figures[0]) or math.inf)
    for case in ordered:
        lines.append(f"| {case} | {' | '.join(_cell(group.values(case, figure), figure) for figure in figures)} |")
    absent = f"{' |' * (len(figures) - 1)}" if figures else ""
    lines += [f"| {gone.name} | not run here: {_plain(gone.reason)} |{absent}" for gone in group.absent]
    return "\n".join(lines)


def _plain(said: str) -> str:
    """Make a program's words a table's cell."""
    return said.replace("|", "/").replace("<", "(").replace(">", ")")


def _cell(values: Sequence[float], figure: str) -> str:
    if not values:
        return ""
    if len(values) < 3:
        return plots.number(statistics.median(values), figure)
    low, middle, high = (plots.number(value, figure) for value in statistics.quantiles(values, n=4))
    return f"{middle} ({low} to {high})"


def _goals(rows: Iterable[Row]) -> str:
    lines = ["| goal | bound | measured | |", "| --- | --- | --- | --- |"]
    for row in rows:
        measured = "" if row.measured is None else f"{row.measured:.3g}"
        lines.append(
            f"| {row.text} | {'at least' if row.least else 'at most'} {row.bound:g} | {measured} | {row.outcome} |"
        )
    return "\n".join(lines)


def _rows(rows: Sequence[Mapping[str, object]]) -> str:
    lines = ["### Networks", "", "| what | figure |", "| --- | --- |"]
    for row in rows:
        figures = ", ".join(
            f"{value:.3g} {unit}" for unit, value in row.items() if isinstance(value, (int, float)) and unit != "row"
        )
        lines.append(f"| {row['row']} | {figures} |")
    return "\n".join(lines)
