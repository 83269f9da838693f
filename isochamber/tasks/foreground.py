"""Tasks that take the terminal: they are declared in the graph and started after it.

A tenant needs the real terminal and the real exit status, and doit knows neither,
so a run task only says what is to be started. Our own entry point starts it when
the graph is done, in place of the doit process (no second Python stays in memory);
under the plain ``doit`` command the task starts it itself and succeeds with status 0.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from doit.exceptions import TaskFailed

from isochamber.errors import IsochamberError, printable

COMMAND = "isochamber_command"  # key of a task's meta: the argv to start

_started_by_us = False


def take_over() -> None:
    """Say that this process's entry point starts what run tasks declare."""
    global _started_by_us  # noqa: PLW0603 - one process, one entry point
    _started_by_us = True


def task(basename: str, alias: str, tenant: str, argv: list[str], needed: Sequence[str] = ()) -> dict[str, Any]:
    """Return the task that runs ``argv`` in the foreground once ``tenant`` is configured and ``needed`` is done."""
    return {
        "basename": basename,
        "name": alias,
        "doc": f"{basename} {tenant} in the foreground",
        "actions": [(_start, [argv])],
        "task_dep": [f"configure:{tenant}", *needed],
        "meta": {COMMAND: argv},
        "verbosity": 2,
        "io": {"capture": False},
    }


def _start(argv: list[str]) -> TaskFailed | None:
    if _started_by_us:
        return None
    if multiprocessing.parent_process() is not None:
        return TaskFailed("a tenant needs the terminal: leave out -n, or use ./doit or isochamber run")
    status = wait(argv)
    return TaskFailed(f"exit status {status}") if status else None


def wait(argv: list[str]) -> int:
    """Run ``argv`` with our descriptors and return its status, 128+N after a signal."""
    with subprocess.Popen(argv) as process:
        former = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher forwards it to the tenant
        try:
            status = process.wait()
        finally:
            signal.signal(signal.SIGINT, former)
    return status if status >= 0 else 128 - status


def start(commands: list[list[str]]) -> int:
    """Start each command in turn, the last in place of this process; returns only when one before it failed."""
    status = next(filter(None, map(wait, commands[:-1])), 0)
    if not status:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(commands[-1][0], commands[-1])  # noqa: S606 - an argv list, no shell
    return status


def confirm(question: str, *, stage: str, tenant: str) -> None:
    """Ask on the terminal; raises IsochamberError when there is none or the answer is not yes."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise IsochamberError(
            "not confirmed",
            stage=stage,
            tenant=tenant,
            hint=f"there is no terminal to ask on: isochamber {stage} --yes {tenant}",
        )
    sys.stdout.write(f"{printable(question)} [y/N] ")
    sys.stdout.flush()
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise IsochamberError("not confirmed", stage=stage, tenant=tenant, hint="nothing was removed")
