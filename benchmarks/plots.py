"""One bar a case with its quartiles as a whisker, as SVG written here: no library, and a diff that can be read."""

import html
import re
import statistics

from benchmarks.harness import Group

_WIDTH, _NAMES, _BAR, _GAP = 760, 300, 18, 8
_OURS, _OTHERS = "#1f6f8b", "#b8b8b8"


def unit(figure: str) -> str:
    """Return the unit that a figure's name says; nothing: it is seconds, shown as milliseconds."""
    return next((name for name in ("MB", "per second") if name in figure), "")


def number(value: float, figure: str) -> str:
    """Return a value as people read it."""
    shown = value if unit(figure) else value * 1000
    return f"{shown:.2f}" if shown < 10 else f"{shown:.1f}" if shown < 100 else f"{shown:.0f}"


def wanted(group: Group) -> bool:
    """Say whether there is something to compare."""
    return len(group.samples) > 1


def name_of(group: Group) -> str:
    """Return the file's name."""
    return re.sub(r"[^a-z0-9]+", "-", group.title.lower()).strip("-") + ".svg"


def bars(group: Group) -> str:
    """Return the plot of the group's first figure."""
    figure = group.figures()[0]
    values = {case: group.values(case, figure) for case in group.samples if group.values(case, figure)}
    ordered = sorted(values, key=lambda case: statistics.median(values[case]))
    longest = max(max(found) for found in values.values()) or 1
    scale = (_WIDTH - _NAMES - 90) / longest
    height = 34 + len(ordered) * (_BAR + _GAP)
    title = f"{group.title}: {figure}, {unit(figure) or 'milliseconds'}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="8" y="18" font-weight="bold">{html.escape(title)}</text>',
    ]
    for row, case in enumerate(ordered):
        lines += _bar(case, values[case], figure, scale, 30 + row * (_BAR + _GAP))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _bar(case: str, values: list[float], figure: str, scale: float, top: int) -> list[str]:
    middle = statistics.median(values)
    low, high = (min(values), max(values)) if len(values) < 3 else statistics.quantiles(values, n=4)[::2]
    ours = case.startswith(("isochamber", "supervisor", "doit", "base_fs"))
    center, right = top + _BAR / 2, _NAMES + max(middle, high) * scale
    color, line = _OURS if ours else _OTHERS, f'y1="{center}" y2="{center}" stroke="black"'
    return [
        f'<text x="{_NAMES - 6}" y="{center + 4:.0f}" text-anchor="end">{html.escape(case)}</text>',
        f'<rect x="{_NAMES}" y="{top}" width="{middle * scale:.1f}" height="{_BAR}" fill="{color}"/>',
        f'<line x1="{_NAMES + low * scale:.1f}" x2="{_NAMES + high * scale:.1f}" {line}/>',
        f'<text x="{right + 6:.0f}" y="{center + 4:.0f}">{number(middle, figure)}</text>',
    ]
