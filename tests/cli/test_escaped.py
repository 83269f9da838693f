"""Whatever a tenant or a caller puts into a text, no message of ours steers the terminal that it is printed on."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tasks.world import World, write_package

# Clears the screen, sets the clipboard (OSC 52), goes back to the line's begin, rings, and turns the text round.
NASTY = "\x1b[2J\x1b]52;c;eA==\x07\r\u202e\u2066\x9b31m"
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]")


@pytest.fixture
def world(tmp_path: Path, root: Path) -> World:
    write_package(tmp_path / "packages/one", {"init": "/home/main"}, {"main": "#!/bin/sh\n"})
    made = World(tmp_path, root)
    made.tenants.write_text("defaults: {ipc: none, install_network: host}\ntenants:\n  one: {package: packages/one}\n")
    done = made.doit("configure:one")
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def _said(world: World, module: str, *words: str) -> str:
    """Return all that a command of ours prints, which must fail; byte by byte as a terminal would get it."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words], env=world.environment, cwd=world.directory, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    return done.stdout.decode("utf-8", "surrogateescape")


def _plain(said: str) -> None:
    assert STEERS.search(said) is None, repr(said)
    assert "x1b" in said, f"the control: the text is there, escaped: {said!r}"
    assert "Traceback" not in said


@pytest.mark.parametrize("verb", [
    ("show",), ("run",), ("shell",), ("delete", "--yes"), ("learn",), ("rollback",), ("restore",), ("backup",),
], ids=" ".join)  # fmt: skip
def test_a_name_given_to_a_verb_is_printed_escaped(world: World, verb: tuple[str, ...]) -> None:
    _plain(_said(world, "isochamber", *verb, NASTY, *(["/nowhere/x"] if verb == ("backup",) else [])))


def test_a_program_that_is_not_there_is_named_escaped(world: World) -> None:
    _plain(_said(world, "isochamber", "run", "one", "--", f"/home/{NASTY}"))


def test_a_key_and_a_file_of_a_package_are_named_escaped(world: World) -> None:
    config = world.package("one") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), NASTY: 1}))
    _plain(_said(world, "isochamber.tasks", "configure:one"))
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != NASTY}))
    os.mkfifo(world.prog("one", NASTY))
    _plain(_said(world, "isochamber.tasks", "configure:one"))


def test_what_a_failing_install_script_says_is_printed_escaped(world: World) -> None:
    config = world.package("one") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dependencies": "/home/install"}))
    script = world.prog("one", "install")
    script.write_text(f"#!/bin/sh\nprintf '%s\\n' '{NASTY}'\nexit 3\n")
    script.chmod(0o755)
    _plain(_said(world, "isochamber.tasks", "configure:one"))


def test_what_is_wrong_in_a_learned_list_is_printed_escaped(world: World) -> None:
    path = world.root / "tenants_persist" / world.entry("one")["tid"] / "seccomp.yaml"
    path.write_text(f"version: 1\narchitectures: []\napproved: []\ncalls:\n  {json.dumps(NASTY)}: []\n")
    _plain(_said(world, "isochamber.tasks", "configure:one"))
