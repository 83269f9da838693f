"""The verbs that go into a running tenant: exec, attach."""

import argparse
import os
import sys

from isochamber.cli import common
from isochamber.errors import EXIT_BAD_INPUT, IsochamberError


def execute(arguments: argparse.Namespace) -> int:
    """Run a command in a running tenant, with the tenant's rights; returns its exit status."""
    from isochamber.serve import remote  # noqa: PLC0415

    env = {}
    for pair in arguments.env:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise IsochamberError(f"--env {pair}: must be NAME=VALUE", stage="exec", exit_code=EXIT_BAD_INPUT)
        env[name] = value
    request = {"tenant": arguments.tenant, "argv": arguments.command, "env": env, "cwd": arguments.workdir}
    if arguments.user is not None:
        uid, _, gid = arguments.user.partition(":")
        if not uid.isdecimal() or (gid and not gid.isdecimal()):
            raise IsochamberError("--user: must be UID or UID:GID, as numbers", stage="exec", exit_code=EXIT_BAD_INPUT)
        request |= {"uid": int(uid), "gid": int(gid or uid)}
    if arguments.tty and not (os.isatty(0) and os.isatty(1)):
        raise IsochamberError("-t needs a terminal", stage="exec", exit_code=EXIT_BAD_INPUT)
    if not arguments.interactive and not arguments.tty:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
    return remote.run({"verb": "exec", "terminal": arguments.tty, **request})


def attach(arguments: argparse.Namespace) -> int:
    """Show a running tenant's output as it comes and type into its terminal; Ctrl-P Ctrl-Q lets go."""
    return attach_to(arguments.tenant)


def attach_to(tenant: str) -> int:
    """Attach to ``tenant``; returns its exit code, 0 after letting go."""
    from isochamber.serve import attach as attached  # noqa: PLC0415

    sys.stdout.flush()
    return attached.attach(tenant)


def add(verbs: common.Verbs) -> None:
    """Add these verbs to the parser."""
    added = common.add_verb(verbs, "exec", execute)
    added.add_argument("-i", "--interactive", action="store_true", help="give it our standard input")
    added.add_argument("-t", "--tty", action="store_true", help="give it a terminal")
    added.add_argument("-e", "--env", action="append", default=[], metavar="NAME=VALUE")
    added.add_argument("-u", "--user", metavar="UID[:GID]", help="as numbers inside; default: the tenant's root")
    added.add_argument("-w", "--workdir", metavar="PATH")
    added.add_argument("tenant", help="name or tid")
    added.add_argument("command", nargs=argparse.REMAINDER, help="what to run")
    added = common.add_verb(verbs, "attach", attach)
    added.add_argument("tenant", help="name or tid")
