"""Whatever a tenant or a caller puts into a text, no message of ours steers the terminal that it is printed on."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from isochamber.build import network
from isochamber.spec import network as spec_network
from isochamber.spec.model import Subnets
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


def _all_of(world: World, *words: str) -> str:
    """Return what a command prints, whether it fails or not, as a terminal would get it."""
    done = subprocess.run(
        words, env=world.environment, cwd=world.directory, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, check=False,
    )  # fmt: skip
    return done.stdout.decode("utf-8", "surrogateescape")


def _edit(world: World, **changes: object) -> None:
    """Change the entry of "one" by hand, one entry a line as the registry has it."""
    path = world.root / "containers.json"
    entries = [{**entry, **changes} if entry["name"] == "one" else entry for entry in json.loads(path.read_text())]
    path.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")


@pytest.mark.parametrize("words", [("ls",), ("show", NASTY), ("fsck",)], ids=" ".join)
def test_a_name_in_containers_json_is_printed_escaped(world: World, words: tuple[str, ...]) -> None:
    _edit(world, name=NASTY)
    _plain(_all_of(world, sys.executable, "-m", "isochamber", *words))


@pytest.mark.parametrize("verb", ["ls", "check"])
def test_a_name_that_has_a_network_is_printed_escaped(world: World, verb: str) -> None:
    entry = world.entry("one")
    wanted, problems = spec_network.parse({"egress": "all"})
    assert not problems
    net = network.make("0" * 8, entry["tid"], entry["uid_base"], wanted, Subnets("10.77.0.0/16", "fd77:7777:7777::/64"))
    _edit(world, name=NASTY, network="bridge", net=net)
    _plain(_all_of(world, "unshare", "-n", sys.executable, "-m", "isochamber", "net", verb))


@pytest.mark.parametrize(
    "words", [("isochamber", "prune"), ("isochamber.tasks", "prune"), ("isochamber", "fsck")], ids=" ".join
)
def test_a_stray_directory_is_named_escaped(world: World, words: tuple[str, ...]) -> None:
    for kind in ("layers", "base_fs", "tenants_fs", "tenants_persist"):
        (world.root / kind / NASTY).mkdir()
    try:
        _plain(_all_of(world, sys.executable, "-m", *words))
    finally:
        for kind in ("layers", "base_fs", "tenants_fs", "tenants_persist"):
            shutil.rmtree(world.root / kind / NASTY, ignore_errors=True)
