"""What dodo.py offers to doit: the creators of every task, and doit's own settings."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from isochamber import paths
from isochamber.build.pipeline import Pipeline
from isochamber.build.progress import Reporter as Progress
from isochamber.spec import load
from isochamber.tasks import checks, graph, report

PROJECT = Path(__file__).parents[2]


def tenants_file() -> Path:
    """Return tenants.yaml: ``$ISOCHAMBER_TENANTS``, else the working directory's, else the project's own."""
    given = os.environ.get("ISOCHAMBER_TENANTS")
    if given:
        return Path(given).absolute()
    here = Path.cwd() / "tenants.yaml"
    return here if here.is_file() else PROJECT / "tenants.yaml"


def load_pipeline(only: str | None = None) -> Pipeline:
    """Read and validate everything (for ``only`` one tenant's package); raises SpecError. Touches nothing."""
    return Pipeline(load.load(tenants_file(), only=only), Progress())


def _database() -> str:
    """Return where doit keeps its database: it is only a cache, so a directory that a reboot forgets."""
    run = Path(paths.run_directory())
    try:
        run.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return ":memory:"
    return str(run / "doit.sqlite3") if os.access(run, os.W_OK) else ":memory:"


def namespace(pipeline: Pipeline | None) -> Mapping[str, Any]:
    """Return the names doit reads from a dodo file, over ``pipeline`` (None: the checks only).

    No creator is called task_run: doit takes that name for its command ``run``
    and refuses it, so one creator yields everything with its basename.
    """

    def task_isochamber() -> Iterator[graph.Task]:
        if pipeline is not None:
            yield from graph.tasks(pipeline)
        yield from checks.check_tasks(PROJECT)

    return {
        "task_isochamber": task_isochamber,
        "DOIT_CONFIG": {
            "default_tasks": ["configure", "net"],
            "reporter": report.Reporter,
            "backend": "sqlite3",
            "dep_file": _database(),
            "action_string_formatting": "new",
        },
    }
