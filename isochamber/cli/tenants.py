"""The verbs about one tenant: run, shell, ls, show, delete."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from isochamber.cli import common
from isochamber.errors import IsochamberError, printable

if TYPE_CHECKING:
    from isochamber.build.state import State


def run(arguments: argparse.Namespace) -> int:
    """Run a configured tenant in the foreground; returns its exit status as podman-run(1) would."""
    from isochamber.serve import run as launcher  # noqa: PLC0415

    words = ["run", "--root", str(common.root_of(arguments))]
    if arguments.verb == "shell":
        words.append("--shell")
    if arguments.no_terminal:
        words.append("--no-terminal")
    return launcher.main([*words, "--", arguments.tenant, *arguments.command])


def ls(arguments: argparse.Namespace) -> int:
    """List the tenants of containers.json, and whether each runs."""
    rows = [_row(entry) for entry in _entries(common.state_of(arguments)).values()]
    if arguments.json:
        common.say(json.dumps(rows, indent=2))
        return 0
    rows = [{key: printable(value) for key, value in row.items()} for row in rows]
    columns = ("name", "tid", "status", "base", "uids")
    widths = {key: max([len(key), *(len(row[key]) for row in rows)]) for key in columns}
    for row in [{key: key.upper() for key in columns}, *rows]:
        common.say("  ".join(row[key].ljust(widths[key]) for key in columns).rstrip())
    return 0


def _entries(state: "State") -> dict[str, dict[str, Any]]:
    from isochamber.build import registry  # noqa: PLC0415

    return dict(registry.read(state))


def _row(entry: dict[str, Any]) -> dict[str, str]:
    from isochamber.launch import records  # noqa: PLC0415

    running = records.running(entry["tid"])
    last = entry["uid_base"] + entry["uid_count"] - 1
    return {
        "name": entry["name"],
        "tid": entry["tid"],
        "status": f"running (pid {running.pid})" if running else "configured",
        "base": entry["lowers"][-1].split("/")[1].rsplit("-", 1)[0],
        "uids": f"{entry['uid_base']}-{last}",
    }


def show(arguments: argparse.Namespace) -> int:
    """Print what containers.json says of a tenant: what will run, and what it was made of."""
    from isochamber.build import registry  # noqa: PLC0415

    entry = registry.find(common.state_of(arguments), arguments.tenant)
    if entry is None:
        raise IsochamberError(
            "is not configured", stage="show", tenant=arguments.tenant, hint=f"doit configure:{arguments.tenant}"
        )
    if arguments.json:
        common.say(json.dumps(entry, indent=2))
        return 0
    for key, value in entry.items():
        if key == "inputs":
            for name, digest in value:
                common.say(f"input       {printable(name)}: {printable(digest)}")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            common.say(f"{key:<11} {printable(text)}")
    from isochamber.launch import landlock  # noqa: PLC0415

    common.say(f"{'landlock':<11} {landlock.described()}")
    _show_limits(entry, str(common.root_of(arguments)))
    _show_fences(entry)
    common.say(f"{'status':<11} {_row(entry)['status']}")
    return 0


def _show_limits(entry: dict[str, Any], root: str) -> None:
    """Say of each limit which file holds it, or that none does."""
    from isochamber.launch import disk, limits, records  # noqa: PLC0415

    running = records.running(entry["tid"]) is not None
    if entry["disk"] is not None:
        common.say(f"{'limit':<11} disk {entry['disk']}: {printable(disk.where(root, entry['tid']))}")
    for text, problem in limits.in_force(entry["tid"], entry["limits"], root, running=running):
        common.say(f"{'limit':<11} {printable(text)}")
        if problem is not None:
            common.say(f"{'warning':<11} {printable(text.split()[0])} is not in force: {printable(problem)}")


def _show_fences(entry: dict[str, Any]) -> None:
    """Say what fences the devices, and what of the host a tenant could still reach by crashing or is not told of."""
    from isochamber.launch import cgroup, devicegroup, records, rlimits  # noqa: PLC0415

    groups = cgroup.groups_of(entry["tid"], [devicegroup.CONTROLLER], cgroup.trees())
    runs = records.running(entry["tid"]) is not None
    fence = devicegroup.in_force(groups) if runs else devicegroup.expected(groups)
    if fence is None:
        common.say(f"{'warning':<11} devices: no control group fences them; only the granted ones lie in its /dev")
    else:
        common.say(f"{'devices by':<11} {printable(fence)}")
    asked = rlimits.core_socket()
    if asked is not None:
        common.say(f"{'warning':<11} core dumps: kernel.core_pattern sends them to the host's {printable(asked)}")


def delete(arguments: argparse.Namespace) -> int:
    """Stop tenants and remove all of each, /home too; asks first unless --yes."""
    from isochamber.build.progress import Reporter  # noqa: PLC0415
    from isochamber.net import lifecycle  # noqa: PLC0415
    from isochamber.tasks import foreground  # noqa: PLC0415

    state = common.state_of(arguments)
    for name in arguments.tenant:
        if not arguments.yes:
            question = f"Stop {name} and remove its file systems and its /home?"
            foreground.confirm(question, stage="delete", tenant=name)
        lifecycle.delete(state, name, Reporter())
    return 0


def add(verbs: common.Verbs) -> None:
    """Add these verbs to the parser."""
    for name in ("run", "shell"):
        added = common.add_verb(verbs, name, run)
        added.add_argument("tenant", help="name or tid")
        added.add_argument("command", nargs=argparse.REMAINDER, help="run this instead of the package's init")
        added.add_argument("--no-terminal", action="store_true", help="no terminal of its own, even on one")
    common.add_verb(verbs, "ls", ls).add_argument("--json", action="store_true")
    added = common.add_verb(verbs, "show", show)
    added.add_argument("tenant", help="name or tid")
    added.add_argument("--json", action="store_true")
    added = common.add_verb(verbs, "delete", delete)
    added.add_argument("tenant", nargs="+", help="name or tid")
    added.add_argument("--yes", action="store_true", help="do not ask")
