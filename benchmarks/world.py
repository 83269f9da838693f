"""What is measured: a state directory built by the project's own code, in a scratch directory of the run."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness

PROJECT = Path(__file__).parents[1]
PROGRAMS = PROJECT / "benchmarks" / "programs"
STAMP = "/usr/local/bin/stamp"

_TENANTS = """\
root: {root}
defaults: {{ipc: {ipc}, install_network: host}}
bases:
  default:
    files: {{{stamp}: {scratch}/stamp}}
tenants:
  bench: {{package: {scratch}/packages/bench}}
  warm: {{package: {scratch}/packages/bench, warm: 1}}
"""
LAYER = "#!/bin/sh\necho layer > /etc/bench\n"  # the same for all: one layer


@dataclass(frozen=True)
class World:
    """A scratch directory with tenants.yaml, one package, the state directory and the compiled programs."""

    scratch: Path
    environment: dict[str, str]

    @property
    def root(self) -> Path:
        """The state directory."""
        return self.scratch / "state"

    @property
    def rootfs(self) -> Path:
        """The Debian root that every peer gets too."""
        return next((self.root / "base_fs").iterdir()) / "rootfs"

    @property
    def floor(self) -> Path:
        """The compiled benchmarks/programs/floor.c."""
        return self.scratch / "floor"

    def python(self, module: str, *words: str) -> list[str]:
        """Return the command that runs a module of the project."""
        return [sys.executable, "-m", module, *words]

    def command(self, *words: str) -> list[str | Path]:
        """Return the isochamber command, as an operator calls it."""
        return [Path(sys.executable).parent / "isochamber", *words]

    def add_package(self, name: str, init: str) -> None:
        """Drop a package that runs ``init`` over the layer that the world's first tenant has; doit() configures it."""
        write_package(self.root / "new_tenants" / name, init, {}, LAYER)

    def doit(self, *words: str) -> None:
        """Run the task graph; raises ValueError when it fails."""
        harness.run(self.python("isochamber.tasks", *words), env=self.environment, timeout=3600)

    def directory(self, name: str) -> Path:
        """Make a directory of the scratch directory."""
        path = self.scratch / name
        path.mkdir(parents=True, exist_ok=True)
        return path


def write_package(directory: Path, init: str, progs: dict[str, str], script: str | None = None) -> None:
    """Write a package with these programs, all executable, and an install script if one is given."""
    (directory / "progs").mkdir(parents=True)
    dependencies = "/home/install_deps.sh" if script else ""
    (directory / "config.json").write_text(
        f'{{"tid": "", "cname": "bench", "dependencies": "{dependencies}", "init": "{init}"}}\n'
    )
    for name, text in {**progs, **({"install_deps.sh": script} if script else {})}.items():
        (directory / "progs" / name).write_text(text)
        (directory / "progs" / name).chmod(0o755)


@contextmanager
def make(master: World | None = None) -> Iterator[World]:
    """Build a world, removed at the end; the base is taken from ``master`` where there is one."""
    scratch = Path(tempfile.mkdtemp(prefix="isochamber-bench-", dir="/var/tmp"))
    run = Path(tempfile.mkdtemp(prefix="isochamber-bench-", dir="/run"))
    environment = {
        # What a developer's shell says to Python is not what an operator has: without bytecode every run compiles.
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "ISOCHAMBER_RUN": str(run), "ISOCHAMBER_CGROUP": run.name,
        "ISOCHAMBER_TENANTS": str(scratch / "tenants.yaml"), "ISOCHAMBER_ROOT": str(scratch / "state"),
    }  # fmt: skip
    world = World(scratch, environment)
    try:
        for name in ("stamp", "floor"):
            harness.run(["gcc", "-O2", "-static", "-o", scratch / name, PROGRAMS / f"{name}.c"])
        write_package(scratch / "packages" / "bench", STAMP, {}, LAYER)
        ipc = world.directory("ipc")
        text = _TENANTS.format(root=world.root, scratch=scratch, stamp=STAMP, ipc=ipc)
        (scratch / "tenants.yaml").write_text(text)
        if master is not None:
            world.directory("state")
            harness.run(["cp", "-al", master.root / "base_fs", world.root / "base_fs"])
        world.doit()
        yield world
    finally:
        unmount_below(run)
        unmount_below(scratch)
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)


def unmount_below(directory: Path) -> None:
    """Unmount everything below ``directory``, the last mounted first."""
    targets = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for target in reversed(targets):
        if target.startswith(f"{directory}/"):
            subprocess.run(["umount", "--lazy", target], check=False)
