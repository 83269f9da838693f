"""What the verbs share: where tenants.yaml and the state directory are, and how a verb is added to the parser."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isochamber.errors import EXIT_BAD_INPUT, IsochamberError

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


def flush() -> None:
    """Let what was said be seen now."""
    sys.stdout.flush()


def write_all(descriptor: int, data: bytes) -> None:
    """Write bytes as they are. Raises OSError."""
    sys.stdout.flush()
    while data:
        data = data[os.write(descriptor, data) :]


def moment(text: str | None) -> float | None:
    """Return seconds since the epoch for such a number, or for 30s, 10m, 2h, 3d ago; raises IsochamberError."""
    if text is None:
        return None
    factor = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:])
    try:
        return float(text) if factor is None else time.time() - float(text[:-1]) * factor
    except ValueError:
        raise IsochamberError(
            f"{text} is no time", stage="command line", hint="seconds since 1970, or 10m, 2h, 3d ago",
            exit_code=EXIT_BAD_INPUT,
        ) from None  # fmt: skip


def size(number: float | None) -> str:
    """Return bytes for people."""
    value = float(number or 0)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.3g}{unit}"
        value /= 1000
    return ""


def supervised() -> bool:
    """Say whether a supervisor runs."""
    from isochamber.serve import client  # noqa: PLC0415

    end = client.connect()
    if end is None:
        return False
    end.close()
    return True
