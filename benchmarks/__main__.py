"""``./doit benchmark``: every group, or those named; tables on stdout, in README.md and in result.json.

python -m benchmarks [--rounds N] [--write] [starts] [graph] [builds]
"""

import argparse
import os
import sys

from benchmarks import builds, graph, report, starts, world
from benchmarks.harness import Group
from benchmarks.report import Goal, ratio

_WHOLE, _FIRST = "whole process", "to first instruction"
_CLI, _NOOP, _WARM = "isochamber run", "doit, no-op", "base_fs, cache warm"

GOALS = (
    Goal("isochamber run, cold, against runc, whole process", 1.0, ratio(_CLI, "runc", _WHOLE)),
    Goal("isochamber run, cold, against python3 -I -S -c pass", 2.2, ratio(_CLI, "python3 -I -S -c pass", _WHOLE)),
    Goal("no-op doit against bare doit on the same graph", 3.0, ratio(_NOOP, "bare doit, no-op", _WHOLE)),
    Goal("base_fs against debootstrap", 0.55, ratio("base_fs", "debootstrap", _WHOLE)),
    Goal(
        "base_fs with the package cache warm against debootstrap",
        0.4,
        ratio("base_fs, cache warm", "debootstrap", _WHOLE),
    ),
)


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", help="default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", default="10,100,1000", help="tenants of the graphs, 5000 takes long")
    parser.add_argument("--write", action="store_true", help="write README.md and result.json too")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("it makes containers: run it as root")
    wanted = arguments.groups or ["starts", "graph", "builds"]
    groups: list[Group] = []
    with world.make() as made:
        if "starts" in wanted:
            groups += starts.measure(made, arguments.rounds)
        if "graph" in wanted:
            sizes = tuple(int(size) for size in arguments.sizes.split(","))
            groups += graph.measure(made, max(arguments.rounds // 3, 1), sizes)
        if "builds" in wanted:
            groups += builds.measure(made, max(arguments.rounds // 5, 1))
    sys.stdout.write(report.tell(groups, GOALS, write=arguments.write) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
