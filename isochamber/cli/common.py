"""What the verbs share: where tenants.yaml and the state directory are, and how a verb is added to the parser."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isochamber.build.pipeline import Pipeline
    from isochamber.build.state import State

Verb = Callable[[argparse.Namespace], int]
Verbs = Any  # what add_subparsers gives: argparse keeps its type to itself


def add_verb(verbs: Verbs, name: str, function: Verb) -> argparse.ArgumentParser:
    """Add a verb whose help is the first line of its function's docstring."""
    text = (function.__doc__ or "").strip().splitlines()[0]
    added: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    added.set_defaults(function=function)
    return added


def say(text: str) -> None:
    """Print one line on stdout."""
    sys.stdout.write(f"{text}\n")


def tenants_file(arguments: argparse.Namespace) -> Path:
    """Return where tenants.yaml is."""
    from isochamber.tasks import dodo  # noqa: PLC0415 - doit is slow to import

    return Path(arguments.file).absolute() if arguments.file else dodo.tenants_file()


def pipeline(arguments: argparse.Namespace, only: str | None = None) -> "Pipeline":
    """Validate everything (or what ``only`` names) and return its pipeline; raises SpecError."""
    from isochamber.build.pipeline import Pipeline  # noqa: PLC0415
    from isochamber.build.progress import Reporter  # noqa: PLC0415
    from isochamber.spec import load  # noqa: PLC0415

    root = Path(arguments.root).absolute() if arguments.root else None
    return Pipeline(load.load(tenants_file(arguments), root=root, only=only), Reporter())


def root_of(arguments: argparse.Namespace) -> Path:
    """Return the state directory without validating every tenant: what is configured runs, whatever else is broken."""
    given = arguments.root or os.environ.get("ISOCHAMBER_ROOT")
    if given:
        return Path(given).absolute()
    from isochamber.spec import load  # noqa: PLC0415

    return load.root_of(tenants_file(arguments))


def state_of(arguments: argparse.Namespace) -> "State":
    """Return the state directory, which may not be there yet."""
    from isochamber.build.state import State  # noqa: PLC0415

    return State(root_of(arguments))
