"""The verbs that look after what is on disk: fsck and rollback."""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from isochamber import paths
from isochamber.cli import common
from isochamber.errors import IsochamberError, printable

if TYPE_CHECKING:
    from isochamber.build.fsck import Finding
    from isochamber.build.state import State


def fsck(arguments: argparse.Namespace) -> int:
    """Check everything in the state directory, name what is broken; 1 when something is and stays so."""
    from isochamber.build import fsck as checking  # noqa: PLC0415

    state = common.state_of(arguments)
    found = [*checking.check(state, deep=arguments.deep), *_networks(state)]
    left = found
    if found and arguments.repair:
        checking.repair(state, found)
        _make_anew(arguments)
        networks = _networks(state, repair=True)
        left = [*checking.check(state, deep=arguments.deep), *networks]
    _tell(arguments, state, found, left)
    return 1 if left else 0


def _networks(state: "State", *, repair: bool = False) -> "list[Finding]":
    """Return what is not as planned of the networks, and with ``repair`` what is left of that when it was made so.

    Nothing, where none was made since the machine started.
    """
    from isochamber.build import fsck as checking  # noqa: PLC0415
    from isochamber.build import registry  # noqa: PLC0415

    entries = registry.read(state, salvage=True) if state.namespace is not None else {}
    with_one = [tid for tid, entry in entries.items() if entry.get("net") is not None]
    if shutil.which("nft") is None or not any(Path(paths.network_file(tid, "network")).exists() for tid in with_one):
        return []
    from isochamber.net.network import Network  # noqa: PLC0415 - pyroute2 takes 200 ms

    with Network(state) as network:
        if repair:
            network.repair()
        wrong = network.differences()
    repaired = "made as planned, as isochamber net repair does"
    return [checking.Finding("network", name or "the shared part", what, repaired) for name, what in wrong.items()]


def _make_anew(arguments: argparse.Namespace) -> None:
    """Build what was removed for the tenants of tenants.yaml; when that can't be read, ./doit says so too."""
    try:
        pipeline = common.pipeline(arguments)
        for name, tenant in pipeline.spec.tenants.items():
            if pipeline.configured(name) and pipeline.home_current(name):
                continue
            pipeline.make_base(tenant.base)
            pipeline.make_dirs(name)
            pipeline.make_layer(name)
            pipeline.make_home(name)
            pipeline.configure(name)
    except IsochamberError as error:
        sys.stderr.write(f"isochamber: {error.line()}\n")


def _tell(arguments: argparse.Namespace, state: "State", found: "list[Finding]", left: "list[Finding]") -> None:
    if arguments.json:
        import dataclasses  # noqa: PLC0415 - slow to import, and every verb imports this module

        rows = [{**dataclasses.asdict(finding), "repaired": finding not in left} for finding in found]
        rows += [{**dataclasses.asdict(finding), "repaired": False} for finding in left if finding not in found]
        common.say(json.dumps({"clean": not left, "findings": rows}, indent=2))
        return
    for finding in dict.fromkeys([*found, *left]):
        common.say(f"{'repaired: ' if finding not in left else ''}{printable(finding.line())}")
    common.say(
        f"{printable(state.root)}: {len(left)} broken" if left else f"{printable(state.root)}: nothing is broken"
    )


def rollback(arguments: argparse.Namespace) -> int:
    """Give a tenant its former layers and root file system again, in one step; /home stays."""
    from isochamber.build import entry  # noqa: PLC0415

    now = entry.rollback(common.state_of(arguments), arguments.tenant)
    common.say(
        f"{printable(now['name'])}: back on {printable(', '.join(lower.split('/')[1] for lower in now['lowers']))}"
    )
    return 0


def add(verbs: common.Verbs) -> None:
    """Add these verbs to the parser."""
    added = common.add_verb(verbs, "fsck", fsck)
    added.add_argument("--deep", action="store_true", help="read every file of every base and layer")
    added.add_argument("--repair", action="store_true", help="remove what is broken, and make only that anew")
    added.add_argument("--json", action="store_true")
    common.add_verb(verbs, "rollback", rollback).add_argument("tenant", help="name or tid")
