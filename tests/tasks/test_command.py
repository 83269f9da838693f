"""The command .venv/bin/isochamber: a short way for what starts a tenant, the whole command line for the rest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.tasks.world import World, make_world

COMMAND = PROJECT / ".venv/bin/isochamber"
TRAP = "raise SystemExit('imported from the working directory')\n"


@pytest.fixture
def world(root: Path, tmp_path: Path) -> World:
    made = make_world(tmp_path / "world", root)
    done = made.doit("configure:plain")
    assert done.returncode == 0, done.stderr
    return made


def _run(
    world: World, *words: str | Path, cwd: Path | None = None, changes: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    environment = {**world.environment, **(changes or {})}
    return subprocess.run(
        [str(word) for word in words], env={name: text for name, text in environment.items() if text},
        cwd=cwd or world.directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def _imported(world: World, *words: str) -> str:
    """Return what Python says it imported."""
    return _run(world, COMMAND, *words, changes={"PYTHONPROFILEIMPORTTIME": "1"}).stderr


def test_run_takes_the_short_way_and_says_the_same(world: World) -> None:
    short, long = _run(world, COMMAND, "run", "plain"), _run(world, COMMAND, "--root", str(world.root), "run", "plain")
    assert (short.returncode, short.stdout) == (long.returncode, long.stdout)
    assert short.stdout.splitlines()[-1] == "here"
    # -I keeps PYTHON* out, so the short way reports no import at all; the long one is the control.
    assert "argparse" in _imported(world, "--root", str(world.root), "run", "plain")
    assert "argparse" not in _imported(world, "run", "plain")


def test_a_root_that_tenants_yaml_names_is_found_on_the_long_way(world: World) -> None:
    text = world.tenants.read_text()
    world.tenants.write_text(f"root: {world.root}\n" + "".join(
        line for line in text.splitlines(keepends=True) if not line.startswith("root:")
    ))  # fmt: skip
    done = _run(world, COMMAND, "run", "plain", changes={"ISOCHAMBER_ROOT": ""})
    assert done.stdout.splitlines()[-1:] == ["here"], done.stderr


def test_the_exit_status_and_the_words_of_the_command_come_through(world: World) -> None:
    done = _run(world, COMMAND, "run", "plain", "/bin/sh", "-c", 'echo "$0 $1"; exit 7', "a b", "--no-such-option")
    assert (done.returncode, done.stdout) == (7, "a b --no-such-option\n")
    assert _run(world, COMMAND, "run", "nobody").returncode == 125


def test_it_works_through_a_link(world: World, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(COMMAND)
    assert _run(world, link, "run", "plain").stdout.splitlines()[-1:] == ["here"]
    assert _run(world, link, "--version").returncode == 0


@pytest.mark.parametrize("words", [("run", "plain"), ("ls",), ("check",)], ids=" ".join)
def test_nothing_is_imported_from_the_working_directory(world: World, tmp_path: Path, words: tuple[str, ...]) -> None:
    trap = tmp_path / "trap"
    (trap / "isochamber").mkdir(parents=True)
    for name in ("isochamber/__init__.py", "yaml.py", "json.py", "argparse.py", "doit.py"):
        (trap / name).write_text(TRAP)
    done = _run(world, COMMAND, *words, cwd=trap)
    assert done.returncode == 0, done.stderr
    wrapper = _run(world, PROJECT / "doit", "--no-install", "list", cwd=trap)
    assert wrapper.returncode == 0, wrapper.stderr
    control = _run(world, sys.executable, "-m", "isochamber", *words, cwd=trap)
    assert "imported from the working directory" in control.stderr


def test_the_script_is_posix_sh() -> None:
    assert subprocess.run(["/bin/sh", "-n", PROJECT / "data/bin/isochamber"], check=False).returncode == 0
    assert os.access(COMMAND, os.X_OK)
