"""The entry point of ``./doit``: doit's own command line over our graph, with our exit codes."""

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from doit.cmd_base import ModuleTaskLoader
from doit.doit_cmd import DoitMain

from isochamber.build import locks, recover, registry
from isochamber.build.state import State
from isochamber.errors import EXIT_BAD_INPUT, EXIT_OURS, IsochamberError
from isochamber.tasks import foreground, report
from isochamber.tasks.dodo import load_pipeline, namespace

# These name one tenant and must work while another tenant's package is broken.
_SINGLE = ("run:", "shell:", "delete:")

# Thousands of tasks are made and none is dropped: looking for rubbish among them every 700 objects, as Python does
# by itself, is a tenth of a run with nothing to do.
_OBJECTS = 50_000


# These build nothing, or wait for those who do.
_NOT_BUILDING = {"delete", "prune", "list", "help", "info", "clean", "forget", "dumpdb"}


def _builds(arguments: Sequence[str]) -> bool:
    """Say whether this command line may make a product and, in a later task, an entry that refers to it."""
    words = {word.partition(":")[0] for word in arguments if not word.startswith("-")}
    return not words or bool(words - _NOT_BUILDING)


def _only_tenant(arguments: Sequence[str]) -> str | None:
    """Return the tenant that is all the command line asks for, or None."""
    names = {argument.split(":", 1)[1] for argument in arguments if argument.startswith(_SINGLE)}
    return names.pop() if len(names) == 1 and len(arguments) == 1 else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run doit; returns 0, the tenant's status for run: and shell:, 2 for bad input, 125 when a task failed."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    foreground.take_over()
    gc.set_threshold(_OBJECTS)
    try:
        # The project's own checks do not depend on anybody's tenants.
        only_checks = bool(argv) and all(word in ("test", "benchmark") or word.startswith("test:") for word in argv)
        pipeline = None if only_checks else load_pipeline(only=_only_tenant(argv))
        if pipeline is not None and os.geteuid() == 0:
            recover.clean(pipeline.state)
            if _builds(argv):
                pipeline.hold()
        tasks = namespace(pipeline)
        status = _graph(tasks, argv) if pipeline is None else _graph_of(pipeline.state, tasks, argv)
    except IsochamberError as error:
        for line in error.lines():
            sys.stderr.write(f"isochamber: {line}\n")
        return error.exit_code
    return _exit_code(status)


def _graph_of(state: State, tasks: Mapping[str, Any], argv: list[str]) -> int:
    with registry.together(state):
        return _graph(tasks, argv)


def _graph(tasks: Mapping[str, Any], argv: list[str]) -> int:
    return int(DoitMain(ModuleTaskLoader(dict(tasks)), config_filenames=()).run(argv))


def _exit_code(status: int) -> int:
    sys.stdout.flush()
    if status == 0 and report.to_start:
        locks.let_builds_go()  # a tenant may run for months
        return foreground.start(report.to_start)
    # doit's own 1 and 2 say that a task failed, 3 that there is no such task or option.
    return {0: 0, 3: EXIT_BAD_INPUT}.get(status, report.exit_code or EXIT_OURS)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        os._exit(130)
    except BrokenPipeError:
        os._exit(EXIT_OURS)
