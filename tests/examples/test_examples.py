"""The three examples, as their README says to run them."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from isochamber.spec import package
from tests.conftest import PROJECT
from tests.tasks.world import World

EXAMPLES = PROJECT / "examples"
PACKAGES = sorted(path for path in EXAMPLES.iterdir() if path.is_dir())
SCRIPTS = sorted(
    path
    for directory in (EXAMPLES, PROJECT / "tests/tenants")
    for path in directory.glob("*/progs/*")
    if path.read_text().startswith("#!/bin/sh")
)


@pytest.fixture
def world(root: Path, tmp_path: Path) -> World:
    """A world of the three, the courier's IPC directory in a place of the test's own."""
    directory = tmp_path / "world"
    directory.mkdir()
    made = World(directory, root)
    made.tenants.write_text(
        f"defaults: {{install_network: host}}\nbases: {{default: {{packages: []}}}}\n"
        f"tenants:\n"
        f"  hello: {{package: {EXAMPLES}/hello, ipc: none}}\n"
        f"  sensor: {{package: {EXAMPLES}/sensor, ipc: none}}\n"
        f"  courier: {{package: {EXAMPLES}/courier, ipc: {tmp_path}/ipc}}\n"
    )
    return made


@contextmanager
def desk(directory: Path, visits: int) -> Iterator["subprocess.Popen[str]"]:
    """The courier's counterpart on the host, once it says that it is open."""
    argv = [str(EXAMPLES / "courier/host/desk.py"), "--directory", str(directory), "--visits", str(visits)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("the desk is open")
        try:
            yield process
        finally:
            process.terminate()


@pytest.mark.parametrize("directory", PACKAGES, ids=lambda path: path.name)
def test_an_example_has_the_originals_format_and_only_its_keys(directory: Path) -> None:
    assert set(json.loads((directory / "config.json").read_text())) == {"tid", "cname", "dependencies", "init"}
    made = package.read(directory)
    assert made.cname == directory.name
    assert all(prog.executable for prog in made.progs)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_a_script_is_posix_sh(script: Path) -> None:
    assert subprocess.run(["/bin/sh", "-n", script], check=False).returncode == 0
    assert os.access(script, os.X_OK)


def test_hello_needs_nothing_of_the_host(world: World) -> None:
    done = world.doit("run:hello")
    assert done.returncode == 0, done.stderr
    tid = world.entry("hello")["tid"]
    assert done.stdout.splitlines()[-2:] == [
        "Hello from a tenant of this machine.",
        f"My process is 1, my hostname is {tid}, and I am root in here.",
    ]


def test_the_sensor_computes_with_what_apt_installed_and_keeps_its_readings(world: World) -> None:
    done = world.doit("run:sensor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "/home/readings.csv holds 3 readings."
    again = world.doit("run:sensor")
    assert again.stdout.splitlines()[-1] == "/home/readings.csv holds 6 readings."
    lines = (world.root / world.entry("sensor")["home"] / "readings.csv").read_text().splitlines()
    assert lines[0] == "time,celsius"
    for line in lines[1:]:
        match = re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ,(-?\d+\.\d\d)", line)
        assert match, line
        assert -20 <= float(match[1]) <= 80


def test_the_courier_hands_over_and_prints_a_receipt_each(world: World, tmp_path: Path) -> None:
    assert world.doit("configure:courier").returncode == 0
    tid = world.entry("courier")["tid"]
    with desk(tmp_path / "ipc", visits=2) as process:
        done = world.cli("run", "courier")
        assert done.returncode == 0, done.stderr
        out, _ = process.communicate(timeout=60)
    assert out.splitlines() == [f"1: 'a letter from {tid}'", f"2: 'a parcel from {tid}'"]
    assert re.fullmatch(r"receipt 1: \d+ characters\nreceipt 2: \d+ characters\n", done.stdout)


def test_the_courier_without_its_desk_fails_and_says_what_is_missing(world: World, tmp_path: Path) -> None:
    (tmp_path / "ipc").mkdir()
    done = world.doit("run:courier")
    assert done.returncode == 1
    assert "is examples/courier/host/desk.py running" in done.stderr


def test_the_desk_bounds_and_escapes_what_a_tenant_sends(tmp_path: Path) -> None:
    import socket

    with desk(tmp_path, visits=2) as process:
        for message in (b"\x1b[2J\n", b"x" * 100_000):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / "courier/desk.sock"))
                try:
                    client.sendall(message)
                    client.recv(100)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # it has read all that it takes
        out, _ = process.communicate(timeout=60)
    lines = out.splitlines()
    assert lines[0] == r"1: '\x1b[2J'"
    assert len(lines[1]) < 5000
    assert not (tmp_path / "courier/desk.sock").exists()
