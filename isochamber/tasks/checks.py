"""``./doit test``: lint, types, import contracts and tests, each a task of its own, pytest's summary last."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from doit.exceptions import TaskFailed

_BIN = Path(sys.executable).parent

_NOT_LONG = "not slow and not soak and not vm_all and not power and not crash and not chaos and not fuzz"
_SOAK = ("pytest", "-s", "-m", "soak", "-o", "faulthandler_timeout=0", "tests/serve")

# name, what for, command below .venv/bin
_CHECKS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("lint", "ruff: style and likely mistakes", ("ruff", "check", ".")),
    ("format", "ruff: layout", ("ruff", "format", "--check", ".")),
    ("types", "mypy --strict", ("mypy",)),
    ("contracts", "import-linter: who may import whom", ("lint-imports",)),
    ("unit", "pytest: everything but the slow tests", ("pytest", "-m", _NOT_LONG)),
)
_LONG: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("slow", "pytest: the tests that take minutes", ("pytest", "-m", "slow")),
    ("net", "pytest: networks of tenants", ("pytest", "tests/net")),
    (
        "soak",
        "pytest: 20,000 starts under the supervisor, killed 50 times",
        ("pytest", "-s", "-m", "soak", "-o", "faulthandler_timeout=0"),
    ),
    ("vm", "pytest: whole directories of tests on a second kernel", ("pytest", "-m", "vm or vm_all", "tests/vm")),
    ("crash", "pytest: a cut and an error at every single system call", ("pytest", "-s", "-m", "crash", "tests/crash")),
    (
        "chaos",
        "pytest: 10,000 operations of four processes, killed at random, against a model",
        ("pytest", "-s", "-m", "chaos", "-o", "faulthandler_timeout=0", "tests/crash"),
    ),
    (
        "fuzz",
        "pytest: 100,000 hostile inputs to what reads packages and files",
        ("pytest", "-m", "fuzz", "-o", "faulthandler_timeout=0", "tests/fuzz"),
    ),
    (
        "power",
        "pytest: hundreds of power cuts of a virtual machine, thousands of states of a recorded disk",
        ("pytest", "-m", "power", "tests/vm"),
    ),
)


def _run(project: Path, argv: tuple[str, ...]) -> TaskFailed | None:
    sys.stdout.flush()
    status = subprocess.run([_BIN / argv[0], *argv[1:]], cwd=project, check=False).returncode
    return TaskFailed(f"{argv[0]} exited with {status}") if status else None


def _task(project: Path, name: str, doc: str, argv: tuple[str, ...]) -> dict[str, Any]:
    return {
        "basename": name,
        "doc": doc,
        "actions": [(_run, [project, argv])],
        "verbosity": 2,
        "io": {"capture": False},
    }


def check_tasks(project: Path) -> Iterator[dict[str, Any]]:
    """Yield ``test`` (everything but what takes long, in order), its parts, and the long ones.

    The parts are tasks of their own and not subtasks: a group would take the long ones in.
    """
    former: list[str] = []
    for name, doc, argv in _CHECKS:
        task = _task(project, f"test:{name}", doc, argv)
        yield {**task, "task_dep": []}
        former.append(task["basename"])
    yield {"basename": "test", "doc": "lint, types, import contracts, tests", "actions": None, "task_dep": former}
    for name, doc, argv in _LONG:
        yield _task(project, f"test:{name}", doc, argv)
    yield _task(
        project, "benchmark", "against the tools one would use otherwise", ("python", "-m", "benchmarks", "--write")
    )
