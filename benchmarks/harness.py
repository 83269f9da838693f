"""Interleaved rounds of real processes: A B C A B C ..., so that a machine whose speed drifts drifts for all alike.

A *case* is one thing that can be timed; it returns seconds by figure. Ratios are taken
round by round and their median is told: a comparison of two medians from different
minutes would compare the minutes.
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Sample = Mapping[str, float]  # figure -> seconds, or what the figure's name says (MB, per second)


@dataclass(frozen=True)
class Case:
    """One thing that is timed; ``once`` does it and returns its figures."""

    name: str
    once: Callable[[], Sample]


@dataclass(frozen=True)
class Absent:
    """A peer that can't run on this machine, with the reason: it is named in the table and never guessed."""

    name: str
    reason: str


@dataclass
class Group:
    """The samples of one interleaved run, case by case and round by round."""

    title: str
    rounds: int = 0
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    absent: list[Absent] = field(default_factory=list)

    def figures(self) -> list[str]:
        """Return every figure that a case has, in order of appearance."""
        return list(dict.fromkeys(name for rows in self.samples.values() for row in rows for name in row))

    def values(self, case: str, figure: str) -> list[float]:
        """Return the samples of one figure."""
        return [row[figure] for row in self.samples.get(case, []) if figure in row]

    def median(self, case: str, figure: str) -> float | None:
        """Return the median, or None where the case has no such figure."""
        values = self.values(case, figure)
        return statistics.median(values) if values else None

    def ratio(self, case: str, other: str, figure: str, other_figure: str | None = None) -> float | None:
        """Return the median of case/other, round by round; None where one of them is absent."""
        pairs = list(zip(self.samples.get(case, []), self.samples.get(other, []), strict=False))
        second = other_figure or figure
        ratios = [a[figure] / b[second] for a, b in pairs if figure in a and b.get(second)]
        return statistics.median(ratios) if ratios else None


def measure(title: str, cases: Sequence[Case | Absent], *, rounds: int, warmup: int = 1) -> Group:
    """Run every case once a round, ``warmup`` rounds uncounted; a case that fails is absent from there on."""
    group = Group(title, rounds, {}, [case for case in cases if isinstance(case, Absent)])
    running = [case for case in cases if isinstance(case, Case)]
    for number in range(-warmup, rounds):
        for case in list(running):
            try:
                sample = case.once()
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                running.remove(case)
                group.samples.pop(case.name, None)
                group.absent.append(Absent(case.name, " ".join(str(error).split())[:160]))
                continue
            if number >= 0:
                group.samples.setdefault(case.name, []).append(sample)
        sys.stderr.write(f"\r{title}: round {max(number + 1, 0)}/{rounds} ")
        sys.stderr.flush()
    sys.stderr.write("\n")
    return group


def whole(argv: Sequence[str | Path], **options: object) -> Callable[[], Sample]:
    """Return a case's function: the wall time of a process from its spawn to its end, output thrown away."""

    def once() -> Sample:
        begun = time.monotonic()
        run(argv, **options)
        return {"whole process": time.monotonic() - begun}

    return once


def run(argv: Sequence[str | Path], **options: object) -> "subprocess.CompletedProcess[bytes]":
    """Run a command that must succeed; raises ValueError with its last line otherwise."""
    merged: dict[str, object] = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 600}
    merged.update(options)
    done = subprocess.run([str(word) for word in argv], check=False, **merged)  # type: ignore[call-overload]
    if done.returncode:
        said = (done.stderr or done.stdout or b"").decode(errors="replace").strip().splitlines()
        raise ValueError(f"{argv[0]} exited with {done.returncode}: {said[-1] if said else ''}")
    return done  # type: ignore[no-any-return]


def stamped(argv: Sequence[str | Path], **options: object) -> Callable[[], Sample]:
    """Return a case's function for a command that starts programs/stamp: its first instruction, and the whole."""

    def once() -> Sample:
        begun = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        done = run(argv, **options)
        ended = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        return {
            "to first instruction": (int(done.stdout.split()[0]) - begun) / 1e9,
            "whole process": (ended - begun) / 1e9,
        }

    return once


def machine() -> dict[str, str]:
    """Describe the machine, as far as figures depend on it."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory = next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    return {
        "processor": f"{os.cpu_count()} x {model}",
        "memory": f"{int(memory) // (1 << 20)} GiB",
        "kernel": platform.release(),
        "system": next(
            line.partition("=")[2].strip('"')
            for line in Path("/etc/os-release").read_text().splitlines()
            if line.startswith("PRETTY_NAME=")
        ),
        "python": platform.python_version(),
    }


@dataclass
class Section:
    """What one part of the benchmark measured, on which machine, and what stopped it, if anything did."""

    name: str
    groups: list[Group] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of benchmarks.network: a text and its figures
    machine: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    failure: str | None = None


def save(path: Path, sections: Mapping[str, Section]) -> None:
    """Write everything that was measured as JSON."""
    path.write_text(json.dumps([dataclasses.asdict(section) for section in sections.values()], indent=1) + "\n")


def load(path: Path) -> dict[str, Section]:
    """Return what :func:`save` wrote; no file, or one of an earlier version, is nothing."""
    try:
        return {raw["name"]: _section(raw) for raw in json.loads(path.read_text())}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _section(raw: dict[str, Any]) -> Section:
    groups = [Group(**{**group, "absent": [Absent(**gone) for gone in group["absent"]]}) for group in raw["groups"]]
    return Section(**{**raw, "groups": groups})
