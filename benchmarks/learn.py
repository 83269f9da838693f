"""What noting every system call costs: the same work in a tenant untraced, learned, and under strace -f -c.

python -m benchmarks.learn [--rounds N] [--write]

The work times itself, inside the tenant, so that a start and what learn does before and
after are not in the figures. Table on stdout; with --write every sample goes to learn.json.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import harness, world
from benchmarks.harness import Case, Group, Sample
from benchmarks.world import World

_RESULT = Path(__file__).with_name("learn.json")
_FIGURE = "the work"

_INSTALL = """\
#!/bin/sh
set -e
apt-get update
apt-get install -y --no-install-recommends python3 strace
"""

_TIMED = "use Time::HiRes 'time'; my $t = time; system(@ARGV) == 0 or die; printf qq(took %.6f\\n), time - $t"

_THREADS = (
    "import hashlib, threading\n"
    "def work():\n"
    "    for i in range(200): hashlib.sha256(open('/etc/passwd', 'rb').read()).hexdigest()\n"
    "threads = [threading.Thread(target=work) for _ in range(8)]\n"
    "for t in threads: t.start()\n"
    "for t in threads: t.join()\n"
)

WORK = {
    "find /usr (many calls, one process)": ["/usr/bin/find", "/usr", "-newer", "/etc/passwd", "-fprint", "/dev/null"],
    "python3, 8 threads": ["/usr/bin/python3", "-c", _THREADS],
    "sh, 200 children": ["/bin/sh", "-c", "i=0; while [ $i -lt 200 ]; do /bin/true; i=$((i+1)); done"],
    "python3 -c pass": ["/usr/bin/python3", "-c", "pass"],
}
STRACE = ["/usr/bin/strace", "-f", "-c", "-o", "/dev/null"]


def _timed(made: World, verb: list[str], work: list[str]) -> Callable[[], Sample]:
    words = made.python("isochamber", *verb, "bench", "--", "/usr/bin/perl", "-e", _TIMED, *work)

    def once() -> Sample:
        done = harness.run(words, env=made.environment)
        took = next(line for line in done.stdout.decode().splitlines() if line.startswith("took "))
        return {_FIGURE: float(took.split()[1])}

    return once


def measure(made: World, rounds: int) -> list[Group]:
    """Return a group a kind of work."""
    package = made.scratch / "packages" / "learn"
    world.write_package(package, "/bin/true", {}, _INSTALL)
    tenants = made.scratch / "tenants.yaml"
    # The learned list is not applied: what is measured is the noting.
    tenants.write_text(tenants.read_text().replace("packages/bench}", "packages/learn, seccomp: {mode: none}}"))
    made.doit("configure:bench")
    return [
        harness.measure(
            name,
            [
                Case("untraced", _timed(made, ["run", "--no-terminal"], work)),
                Case("isochamber learn", _timed(made, ["learn", "--no-terminal"], work)),
                Case("strace -f -c", _timed(made, ["run", "--no-terminal"], [*STRACE, *work])),
            ],
            rounds=rounds,
        )
        for name, work in WORK.items()
    ]


def table(groups: list[Group]) -> str:
    """Return the table of docs/explanation/seccomp.md: medians in ms, and medians of the ratios of each round."""
    lines = [
        "| work in a tenant | untraced | `isochamber learn` | `strace -f -c` | learn / strace |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for group in groups:
        cells = []
        for case in group.samples:
            ratio = group.ratio(case, "untraced", _FIGURE)
            median = group.median(case, _FIGURE) or 0
            cells.append(f"{median * 1000:.0f} ms" + (f" ({ratio:.1f} x)" if ratio and case != "untraced" else ""))
        beside = group.ratio("isochamber learn", "strace -f -c", _FIGURE)
        cells.append("" if beside is None else f"{beside:.2f}")
        lines.append(f"| {group.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser(prog="benchmarks.learn", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="write learn.json too")
    arguments = parser.parse_args()
    with world.make() as made:
        groups = measure(made, arguments.rounds)
    sys.stdout.write(table(groups) + "\n")
    for absent in (absent for group in groups for absent in group.absent):
        sys.stdout.write(f"\n{absent.name}: {absent.reason}\n")
    if arguments.write:
        kept = {"machine": harness.machine(), "rounds": arguments.rounds,
                "samples": {group.title: group.samples for group in groups}}  # fmt: skip
        _RESULT.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
