"""The test's end of :mod:`tests.crash.server`, and worlds prepared up to each step."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.conftest import PROJECT
from tests.crash import protocol
from tests.crash.world import World

# A case, whose last word is its step, and those steps that come before it.
CASES = {
    "base": [],
    "layer": ["base"],
    "home": ["base", "layer"],
    "configure": ["base", "layer", "home"],
    "save": ["configure"],
    "changed": ["configure"],
    "rollback": ["configure", "changed"],
    "restore": ["configure", "save"],
    "prune": ["configure", "changed", "delete"],
    "delete": ["configure"],
}
# The same of a tenant with a disk of its own.
DISK_CASES = {
    "given": ["configure"],
    "grown": ["configure", "given"],
    "first given": ["base"],
    "disk save": ["configure", "given"],
    "disk changed": ["configure", "given"],
    "disk rollback": ["configure", "given", "changed"],
    "disk restore": ["configure", "given", "save"],
    "disk delete": ["configure", "given"],
}
if Path("/dev/loop-control").exists():
    CASES |= DISK_CASES


def step_of(case: str) -> str:
    """Return the step that a case is about."""
    return case.rpartition(" ")[2]


FAMILIES = (
    "write", "pwrite64", "fsync", "syncfs", "rename", "renameat", "renameat2", "link", "mkdir", "mkdirat", "unlink",
    "unlinkat", "rmdir",
)  # fmt: skip


class Server:
    """A process that does steps."""

    def __init__(self, run: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.server", str(run)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROJECT,
        )  # fmt: skip

    def ask(self, step: str, world: World, **more: Any) -> dict[str, Any]:
        """Do ``step`` in ``world``; returns status and stderr."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"step": step, "directory": str(world.directory), **more}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the server has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def do(self, step: str, world: World, **more: Any) -> None:
        """Do ``step``, which must succeed."""
        answer = self.ask(step, world, **more)
        assert answer["status"] == 0, f"{step}: {answer}"

    def trace(self, step: str, world: World, *, children: bool, variant: str | None = None) -> str:
        """Do ``step`` and return its trace; it must succeed."""
        with tempfile.NamedTemporaryFile("r", errors="replace") as file:
            options = ["-y", "-s", "300", "-o", file.name, "-e", f"trace={protocol.TRACED}"]
            answer = self.ask(step, world, variant=variant, strace=[*(["-f"] if children else []), *options])
            assert answer["status"] == 0, f"{step}: {answer}"
            return file.read()

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


def prepare(server: Server, directory: Path) -> dict[str, World]:
    """Return, for every case, a world in which everything before it has been done."""
    made: dict[tuple[str, ...], World] = {}
    first = World(directory / "first")
    first.directory.mkdir()
    first.make()
    made[()] = first
    for before in CASES.values():
        for count in range(1, len(before) + 1):
            done = tuple(before[:count])
            if done not in made:
                made[done] = made[done[:-1]].copy(directory / "-".join(done))
                server.do(done[-1], made[done])
                made[done].detach()
    return {case: made[tuple(before)] for case, before in CASES.items()}


def expected(server: Server, case: str, world: World, directory: Path) -> dict[str, str]:
    """Return what ``case`` leads to when nothing goes wrong."""
    copy = world.copy(directory / f"expected {case}")
    server.do(step_of(case), copy)
    found = copy.snapshot()
    copy.remove()
    return found
