"""The verbs about networks: net ls, show, check, repair, account; and join and hold, which are called for us."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from isochamber.cli import common
from isochamber.errors import EXIT_OURS, IsochamberError, printable

if TYPE_CHECKING:
    from isochamber.net.network import Network

_ENTRY_MAX = 4 << 20  # bytes that join reads


def _network(arguments: argparse.Namespace) -> "Network":
    from isochamber.net.network import Network  # noqa: PLC0415 - pyroute2 takes 200 ms

    def say(line: str) -> None:
        sys.stderr.write(f"isochamber: {printable(line)}\n")

    return Network(common.state_of(arguments), say)


def ls(arguments: argparse.Namespace) -> int:
    """List the tenants that have a network of their own: addresses, ports, bytes counted, and if it is in force."""
    with _network(arguments) as network:
        rows = network.rows()
    if arguments.json:
        common.say(json.dumps(rows, indent=2))
        return 0
    columns = ("name", "ipv4", "ipv6", "ports", "egress", "rate", "bytes", "state")
    lines = [{key: key.upper() for key in columns}, *({key: printable(row[key]) for key in columns} for row in rows)]
    widths = {key: max(len(line[key]) for line in lines) for key in columns}
    for line in lines:
        common.say("  ".join(line[key].ljust(widths[key]) for key in columns).rstrip())
    return 0


def show(arguments: argparse.Namespace) -> int:
    """Print what is in force for one tenant, read back from the kernel, beside what is planned."""
    with _network(arguments) as network:
        shown = network.show(arguments.tenant)
    if arguments.json:
        common.say(json.dumps(shown, indent=2))
        return 0
    for key, value in shown.items():
        for text in value if isinstance(value, list) else [value]:
            common.say(f"{key:<12} {printable(text)}")
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Compare the kernel with the plan; prints a line for each difference, and exits with 125 if there is one."""
    with _network(arguments) as network:
        wrong = network.differences()
    if arguments.json:
        common.say(json.dumps([{"name": name, "what": what} for name, what in wrong.items()], indent=2))
    else:
        for name, what in wrong.items():
            sys.stderr.write(f"isochamber: {printable(name or 'the shared part')}: net: {printable(what)}\n")
        if not wrong:
            common.say("every network is as planned")
    return EXIT_OURS if wrong else 0


def repair(arguments: argparse.Namespace) -> int:
    """Make the kernel agree with the plan again; prints whose network needed it."""
    with _network(arguments) as network:
        repaired = network.repair()
        left = network.differences()
    for name in repaired:
        common.say(f"{printable(name)}: repaired")
    for name, what in left.items():
        raise IsochamberError(f"still so after the repair: {what}", stage="net", tenant=name or None)
    return 0


def account(arguments: argparse.Namespace) -> int:
    """Write down what allowances were used and resolve granted names anew; for a timer, every minute."""
    with _network(arguments) as network:
        for line in network.account():
            sys.stderr.write(f"isochamber: {printable(line)}\n")
    return 0


def join(arguments: argparse.Namespace) -> int:
    """Make one network for a start that found none; the entry comes on the standard input, from the launcher."""
    entry: dict[str, Any] = json.loads(sys.stdin.buffer.read(_ENTRY_MAX))
    with _network(arguments) as network:
        network.apply(entry["tid"], [entry])
    return 0


def hold(arguments: argparse.Namespace) -> int:
    """Make an install script's network, say so, and remove it when the standard input ends: its builder's death too.

    The entry is the first line; the answer is a line of JSON with the resolvers, or with what went wrong.
    """
    entry: dict[str, Any] = json.loads(sys.stdin.buffer.readline(_ENTRY_MAX))
    try:
        with _network(arguments) as network, network.held(entry) as resolvers:
            sys.stdout.write(json.dumps({"resolvers": resolvers}) + "\n")
            sys.stdout.flush()
            sys.stdin.buffer.read()
    except IsochamberError as error:
        wrong = {"what": error.what, "path": error.path, "errno": error.errno, "hint": error.hint}
        sys.stdout.write(json.dumps(wrong) + "\n")
        return EXIT_OURS
    return 0


def add(verbs: common.Verbs) -> None:
    """Add these verbs to the parser, below ``net``."""
    text = "tenants' networks: what is in force, compared with the plan, repaired"
    below = verbs.add_parser("net", help=text, description=text).add_subparsers(
        dest="net_verb", required=True, metavar="VERB"
    )
    for name, function in (("ls", ls), ("check", check)):
        common.add_verb(below, name, function).add_argument("--json", action="store_true")
    added = common.add_verb(below, "show", show)
    added.add_argument("tenant", help="name or tid")
    added.add_argument("--json", action="store_true")
    for name, function in (("repair", repair), ("account", account), ("join", join), ("hold", hold)):
        common.add_verb(below, name, function)
