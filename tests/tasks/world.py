"""A small world of tenants over one real base, and a count of the tasks that doit executed in it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Reads one file of /home and one directory, and nothing else of it.
SCRIPT = """\
#!/bin/sh
set -e
cat /home/settings.conf > /etc/settings.copy
ls /home/conf.d > /etc/conf.list
"""

PRODUCTS = ("base_fs:", "dirs:", "install_deps:", "home:", "configure:")


@dataclass(frozen=True)
class World:
    """A directory with tenants.yaml, packages and a state directory that holds a base."""

    directory: Path
    root: Path

    @property
    def tenants(self) -> Path:
        return self.directory / "tenants.yaml"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "ISOCHAMBER_TENANTS": str(self.tenants), "ISOCHAMBER_ROOT": str(self.root)}

    def package(self, name: str) -> Path:
        return self.directory / "packages" / name

    def prog(self, name: str, path: str) -> Path:
        return self.package(name) / "progs" / path

    def doit(self, *words: str, timeout: float = 600) -> "subprocess.CompletedProcess[str]":
        """Run our entry point as ./doit does."""
        return subprocess.run(
            [sys.executable, "-m", "isochamber.tasks", *words],
            env=self.environment, cwd=self.directory, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def cli(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run the isochamber command."""
        return subprocess.run(
            [sys.executable, "-m", "isochamber", *words],
            env=self.environment, cwd=self.directory, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip

    def executed(self, *targets: str) -> set[str]:
        """Run doit and return the products whose task was executed, as doit's own JSON report counts them."""
        report = self.directory / "report.json"
        done = self.doit("run", "--reporter", "json", "--output-file", str(report), *targets)
        assert done.returncode == 0, done.stdout + done.stderr + (report.read_text() if report.exists() else "")
        tasks = json.loads(report.read_text())["tasks"]
        return {task["name"] for task in tasks if task["result"] == "success" and task["name"].startswith(PRODUCTS)}

    def layers(self) -> set[str]:
        return {path.name for path in (self.root / "layers").iterdir() if not path.name.startswith(".")}

    def entry(self, name: str) -> dict[str, Any]:
        entries = json.loads((self.root / "containers.json").read_text())
        return next(entry for entry in entries if entry["name"] == name)


def write_package(directory: Path, config: dict[str, object], progs: dict[str, str]) -> None:
    """Write a package in the original's format; files whose text starts with ``#!`` are executable."""
    directory.mkdir(parents=True)
    config = {"tid": "", "cname": directory.name, "dependencies": "", "init": "/home/main", **config}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "progs").mkdir()
    for path, text in progs.items():
        file = directory / "progs" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755 if text.startswith("#!") else 0o644)


def make_world(directory: Path, root: Path) -> World:
    """Make tenants plain (no dependencies), sensor and twin (the same dependencies)."""
    main = "#!/bin/sh\necho here\n"
    write_package(directory / "packages/plain", {}, {"main": main, "data": "one\n"})
    for name in ("sensor", "twin"):
        write_package(
            directory / f"packages/{name}",
            {"dependencies": "/home/install_deps.sh"},
            {
                "main": main,
                "install_deps.sh": SCRIPT,
                "settings.conf": "rate=1\n",
                "conf.d/a": "a\n",
                "unread": "never opened by the script\n",
            },
        )
    world = World(directory, root)
    write_tenants(world)
    return world


def write_tenants(world: World, *, base: str = "", extra: str = "", without: tuple[str, ...] = ()) -> None:
    """Write tenants.yaml: every tenant with ``ipc: none``, plus what the test adds."""
    lines = [
        "defaults: {ipc: none, install_network: host}",
        "bases:",
        "  default:",
        "    packages: []",
        *([base] if base else []),
        "tenants:",
    ]
    for name in ("plain", "sensor", "twin"):
        if name not in without:
            lines.append(f"  {name}: {{package: packages/{name}}}")
    world.tenants.write_text("\n".join(lines) + "\n" + extra)


def empty_world(directory: Path, root: Path) -> World:
    """A world without tenants; a test drops packages into new_tenants/ of ``root``."""
    directory.mkdir()
    made = World(directory, root)
    made.tenants.write_text("defaults: {ipc: none, install_network: host}\nbases: {default: {packages: []}}\n")
    return made
