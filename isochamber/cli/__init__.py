"""The ``isochamber`` command: a module a group of verbs, each verb importing what it needs when it is called."""

import argparse
import os
import sys
from collections.abc import Sequence

from isochamber import __version__
from isochamber.cli import backup, enter, fsck, host, learn, life, look, net, serve, tenants
from isochamber.errors import EXIT_OURS, IsochamberError


def parser() -> argparse.ArgumentParser:
    """Return the whole command line; each module of this package adds its verbs."""
    made = argparse.ArgumentParser(
        prog="isochamber",
        description="make for tenant containers; building is ./doit, this command runs and looks after what was built",
        epilog="exit codes: 125 our own failure, 126 not executable, 127 not found, 2 bad input, else the tenant's",
    )
    made.add_argument("--version", action="version", version=f"isochamber {__version__}")
    made.add_argument("-f", "--file", help="tenants.yaml (default: the working directory's, else the project's)")
    made.add_argument("--root", help="the state directory (default: $ISOCHAMBER_ROOT, else root: in tenants.yaml)")
    verbs = made.add_subparsers(dest="verb", required=True, metavar="VERB")

    for group in (tenants, host, fsck, backup, net, serve, life, look, enter, learn):
        group.add(verbs)
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Parse ``words`` (default: the command line), do it, print an error as its lines; returns the exit code."""
    arguments = parser().parse_args(words)
    try:
        return int(arguments.function(arguments))
    except IsochamberError as error:
        for line in error.lines():
            sys.stderr.write(f"isochamber: {line}\n")
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_OURS
    except KeyboardInterrupt:
        return 130
