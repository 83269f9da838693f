"""The ``isochamber`` command. Each verb imports what it needs when it is called."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isochamber import __version__, paths
from isochamber.errors import EXIT_OURS, IsochamberError, printable

if TYPE_CHECKING:
    from isochamber.build.pipeline import Pipeline
    from isochamber.build.state import State

Verb = Callable[[argparse.Namespace], int]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _file(arguments: argparse.Namespace) -> Path:
    from isochamber.tasks.dodo import tenants_file  # noqa: PLC0415 - doit is slow to import

    return Path(arguments.file).absolute() if arguments.file else tenants_file()


def _pipeline(arguments: argparse.Namespace, only: str | None = None) -> "Pipeline":
    from isochamber.build.pipeline import Pipeline  # noqa: PLC0415
    from isochamber.build.progress import Reporter  # noqa: PLC0415
    from isochamber.spec import load  # noqa: PLC0415

    root = Path(arguments.root).absolute() if arguments.root else None
    return Pipeline(load.load(_file(arguments), root=root, only=only), Reporter())


def _root(arguments: argparse.Namespace) -> Path:
    """Return the state directory without validating every tenant: what is configured runs, whatever else is broken."""
    given = arguments.root or os.environ.get("ISOCHAMBER_ROOT")
    if given:
        return Path(given).absolute()
    from isochamber.spec import load  # noqa: PLC0415

    return load.root_of(_file(arguments))


def _state(arguments: argparse.Namespace) -> "State":
    from isochamber.build.state import State  # noqa: PLC0415

    return State(_root(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Run a configured tenant in the foreground; returns its exit status as podman-run(1) would."""
    from isochamber.launch import __main__ as launcher  # noqa: PLC0415

    words = ["run", "--root", str(_root(arguments))]
    if arguments.verb == "shell":
        words.append("--shell")
    if arguments.no_terminal:
        words.append("--no-terminal")
    return launcher.main([*words, "--", arguments.tenant, *arguments.command])


def ls(arguments: argparse.Namespace) -> int:
    """List the tenants of containers.json, and whether each runs."""
    rows = [_row(entry) for entry in _entries(_state(arguments)).values()]
    if arguments.json:
        _say(json.dumps(rows, indent=2))
        return 0
    columns = ("name", "tid", "status", "base", "uids")
    widths = {key: max([len(key), *(len(row[key]) for row in rows)]) for key in columns}
    for row in [{key: key.upper() for key in columns}, *rows]:
        _say("  ".join(row[key].ljust(widths[key]) for key in columns).rstrip())
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

    entry = registry.find(_state(arguments), arguments.tenant)
    if entry is None:
        raise IsochamberError(
            "is not configured", stage="show", tenant=arguments.tenant, hint=f"doit configure:{arguments.tenant}"
        )
    if arguments.json:
        _say(json.dumps(entry, indent=2))
        return 0
    for key, value in entry.items():
        if key == "inputs":
            for name, digest in value:
                _say(f"input       {printable(name)}: {printable(digest)}")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            _say(f"{key:<11} {printable(text)}")
    _say(f"{'status':<11} {_row(entry)['status']}")
    return 0


def delete(arguments: argparse.Namespace) -> int:
    """Stop tenants and remove all of each, /home too; asks first unless --yes."""
    from isochamber.build import gc  # noqa: PLC0415
    from isochamber.build.progress import Reporter  # noqa: PLC0415
    from isochamber.tasks import foreground  # noqa: PLC0415

    state = _state(arguments)
    for name in arguments.tenant:
        if not arguments.yes:
            question = f"Stop {name} and remove its file systems and its /home?"
            foreground.confirm(question, stage="delete", tenant=name)
        gc.delete(state, name, Reporter())
    return 0


def prune(arguments: argparse.Namespace) -> int:
    """Remove bases, layers, caches and orphaned tenants that nothing refers to."""
    from isochamber.tasks import graph  # noqa: PLC0415

    graph.prune(_pipeline(arguments))
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Validate tenants.yaml and every package; prints every problem, touches nothing."""
    spec = _pipeline(arguments).spec
    for warning in spec.warnings:
        sys.stderr.write(f"isochamber: {printable(warning)}\n")
    _say(f"{printable(spec.file)}: {len(spec.bases)} bases, {len(spec.tenants)} tenants, no problem")
    return 0


def init(arguments: argparse.Namespace) -> int:
    """Make a blank package, by default where dropped packages become tenants."""
    from isochamber.spec import package  # noqa: PLC0415

    where = Path(arguments.directory) if arguments.directory else _root(arguments) / paths.NEW_TENANTS / arguments.name
    package.create(where.absolute(), arguments.name)
    _say(f"{printable(where)}: edit config.json and progs/, then doit configure:{arguments.name}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="isochamber",
        description="make for tenant containers; building is ./doit, this command runs and looks after what was built",
        epilog="exit codes: 125 our own failure, 126 not executable, 127 not found, 2 bad input, else the tenant's",
    )
    parser.add_argument("--version", action="version", version=f"isochamber {__version__}")
    parser.add_argument("-f", "--file", help="tenants.yaml (default: the working directory's, else the project's)")
    parser.add_argument("--root", help="the state directory (default: $ISOCHAMBER_ROOT, else root: in tenants.yaml)")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, function: Verb) -> argparse.ArgumentParser:
        text = (function.__doc__ or "").strip().splitlines()[0]
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(function=function)
        return added

    for name in ("run", "shell"):
        added = verb(name, run)
        added.add_argument("tenant", help="name or tid")
        added.add_argument("command", nargs=argparse.REMAINDER, help="run this instead of the package's init")
        added.add_argument("--no-terminal", action="store_true", help="no terminal of its own, even on one")
    verb("ls", ls).add_argument("--json", action="store_true")
    added = verb("show", show)
    added.add_argument("tenant", help="name or tid")
    added.add_argument("--json", action="store_true")
    added = verb("delete", delete)
    added.add_argument("tenant", nargs="+", help="name or tid")
    added.add_argument("--yes", action="store_true", help="do not ask")
    verb("prune", prune)
    verb("check", check)
    added = verb("init", init)
    added.add_argument("name", help="the tenant's name")
    added.add_argument("directory", nargs="?", help="where (default: new_tenants/NAME of the state directory)")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Parse ``words`` (default: the command line), do it, print an error as its lines; returns the exit code."""
    arguments = _parser().parse_args(words)
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
