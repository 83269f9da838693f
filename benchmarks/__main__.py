"""``./doit benchmark``: every section, or those named; tables on stdout, in README.md and in result.json.

python -m benchmarks [--only starts,graph] [--rounds N] [--write]

A section or a peer that fails is named, and the others go on. What was measured is
written after each section; a part that is measured again replaces its former figures.
"""

import argparse
import os
import signal
import sys
import time
import traceback

from benchmarks import harness, report, sections, world
from benchmarks.harness import Section

_DOC = __doc__ or ""


def main() -> int:
    """Measure and report; returns 1 when a section failed."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=_DOC.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], help=f"of: {', '.join(sections.ALL)}; may be repeated")
    parser.add_argument("--rounds", type=int, default=15, help="of what takes milliseconds; the rest in proportion")
    parser.add_argument("--sizes", default="10,100,1000,5000", help="how many tenants the graphs have")
    parser.add_argument("--small", action="store_true", help="few tenants everywhere: to see that it works")
    parser.add_argument("--write", action="store_true", help="write result.json, the two READMEs and plots/ too")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("it makes containers: run it as root")
    wanted = [name for given in arguments.only for name in given.split(",")] or list(sections.ALL)
    for name in wanted:
        if name not in sections.ALL:
            parser.error(f"there is no section {name}, allowed: {', '.join(sections.ALL)}")
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))  # what was made is removed
    sizes = tuple(int(size) for size in arguments.sizes.split(","))
    settings = sections.Settings(arguments.rounds, sizes, small=arguments.small)
    known = harness.load(report.RESULT) if arguments.write else {}
    failed = []
    with world.make() as master:
        for name in wanted:
            known[name] = _run(name, settings, master)
            if known[name].failure is not None:
                failed.append(name)
            if arguments.write:
                harness.save(report.RESULT, known)
                report.write(known)
    sys.stdout.write(report.text({name: known[name] for name in wanted}) + "\n")
    return 1 if failed else 0


def _run(name: str, settings: sections.Settings, master: world.World) -> Section:
    """Measure one section in a world of its own; what goes wrong is its result."""
    sys.stderr.write(f"== {name}\n")
    begun = time.monotonic()
    section = Section(name, machine=harness.machine())
    try:
        with world.make(master) as made:
            sections.ALL[name](made, settings, section)
    except Exception as error:
        sys.stderr.write("".join(traceback.format_exception(error)))
        section.failure = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    section.seconds = time.monotonic() - begun
    return section


if __name__ == "__main__":
    sys.exit(main())
