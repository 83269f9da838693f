"""The verbs about what was asked for and what is kept: check, init, prune."""

import argparse
import sys
from pathlib import Path

from isochamber import paths
from isochamber.cli import common
from isochamber.errors import printable


def check(arguments: argparse.Namespace) -> int:
    """Validate tenants.yaml and every package; prints every problem, touches nothing."""
    spec = common.pipeline(arguments).spec
    for warning in spec.warnings:
        sys.stderr.write(f"isochamber: {printable(warning)}\n")
    common.say(f"{printable(spec.file)}: {len(spec.bases)} bases, {len(spec.tenants)} tenants, no problem")
    return 0


def init(arguments: argparse.Namespace) -> int:
    """Make a blank package, by default where dropped packages become tenants."""
    from isochamber.spec import package  # noqa: PLC0415

    where = (
        Path(arguments.directory)
        if arguments.directory
        else common.root_of(arguments) / paths.NEW_TENANTS / arguments.name
    )
    package.create(where.absolute(), arguments.name)
    common.say(f"{printable(where)}: edit config.json and progs/, then doit configure:{arguments.name}")
    return 0


def prune(arguments: argparse.Namespace) -> int:
    """Remove bases, layers, caches and orphaned tenants that nothing refers to."""
    from isochamber.tasks import graph  # noqa: PLC0415

    graph.prune(common.pipeline(arguments), until_free=arguments.until_free)
    return 0


def _size(text: str) -> int:
    """Return the bytes of ``500M``; raises ArgumentTypeError, which argparse prints."""
    from isochamber.spec import validate  # noqa: PLC0415

    size = validate.parse_size(int(text) if text.isdecimal() else text)
    if size is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: a number of bytes, or with K, M or G")
    return size


def add(verbs: common.Verbs) -> None:
    """Add these verbs to the parser."""
    added = common.add_verb(verbs, "prune", prune)
    added.add_argument("--until-free", type=_size, metavar="SIZE", help="no more than it takes to have so much free")
    common.add_verb(verbs, "check", check)
    added = common.add_verb(verbs, "init", init)
    added.add_argument("name", help="the tenant's name")
    added.add_argument("directory", nargs="?", help="where (default: new_tenants/NAME of the state directory)")
