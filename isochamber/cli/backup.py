"""The verbs that save a tenant to a file, and make one of it again: backup and restore."""

import argparse
from pathlib import Path

from isochamber.cli import common
from isochamber.errors import printable


def backup(arguments: argparse.Namespace) -> int:
    """Save a tenant's /home and what is kept beside it to one file; it stands still while it is copied."""
    from isochamber.build import backup as saving  # noqa: PLC0415

    target = Path(arguments.file).absolute()
    saved = saving.backup(common.state_of(arguments), arguments.tenant, target)
    for phrase in saved.left_out:
        common.say(f"left out: {printable(phrase)}")
    common.say(f"{printable(target)}: {saved.names} names, {saved.size} bytes, {target.stat().st_size} in the file")
    return 0


def restore(arguments: argparse.Namespace) -> int:
    """Make the /home in a backup that of a tenant here, under a tid and ids of this machine."""
    from isochamber.build import restore as restoring  # noqa: PLC0415

    state = common.state_of(arguments)
    name = restoring.restore(state, Path(arguments.file).absolute(), name=arguments.name, replace=arguments.replace)
    common.say(f"{printable(name)}: restored as {state.tid(name)}; ./doit configure:{printable(name)} makes the rest")
    return 0


def add(verbs: common.Verbs) -> None:
    """Add these verbs to the parser."""
    added = common.add_verb(verbs, "backup", backup)
    added.add_argument("tenant", help="name or tid")
    added.add_argument("file", help="where to (a tar in zstd)")
    added = common.add_verb(verbs, "restore", restore)
    added.add_argument("file", help="what isochamber backup wrote")
    added.add_argument("--name", help="the tenant's name (default: the one it was saved of)")
    added.add_argument("--replace", action="store_true", help="give up what its /home holds now")
