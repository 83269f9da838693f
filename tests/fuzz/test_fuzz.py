"""Whatever a package, tenants.yaml or containers.json holds: a value or lines, never a traceback, a hang or an effect.

Some thousand inputs in every test run, the same ones each time; 100,000 fresh ones by
``./doit test:fuzz``. An input that was ever wrong becomes a seed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from isochamber.build import registry
from isochamber.errors import IsochamberError, SpecError
from isochamber.launch import entry
from isochamber.spec import load, package, validate
from tests.conftest import SCRATCH
from tests.fuzz import inputs
from tests.launch.tenants import Tenant

FEW, MANY = 800, 25_000  # inputs for each of the four targets
SLOW = 20  # seconds; an input takes milliseconds

CONFIG = b'{"tid": "", "cname": "hello", "dependencies": "", "init": "/home/main"}'


class Place:
    """A directory with a package, a tenants.yaml and a state directory that must stay as they are."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.package = directory / "package"
        self.progs = self.package / "progs"
        self.progs.mkdir(parents=True)
        (self.progs / "main").write_text("#!/bin/sh\n")
        (self.package / "config.json").write_bytes(CONFIG)
        self.tenants = directory / "tenants.yaml"
        self.root = directory / "state"
        self.root.mkdir()
        self.outside = directory / "outside"
        self.outside.mkdir()
        (self.outside / "secret").write_text("the host's\n")

    def look(self) -> list[tuple[object, ...]]:
        """Return all that is there."""
        found: list[tuple[object, ...]] = []
        for path, names, files in os.walk(os.fsencode(self.directory)):
            for name in (*names, *files):
                status = os.lstat(path + b"/" + name)
                found.append((path, name, status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns))
        return sorted(found, key=repr)

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Check that reading took no time and changed nothing, and that what was said is fit to be printed."""
        before, began = self.look(), time.monotonic()
        descriptors = len(os.listdir("/proc/self/fd"))
        try:
            yield
        except SpecError as error:
            assert error.problems
            for line in (*error.lines(), error.line()):
                assert line.isprintable() or all(ord(char) >= 0xA0 for char in line if not char.isprintable()), line
                line.encode()
        except IsochamberError as error:
            error.line().encode()
        assert time.monotonic() - began < SLOW
        assert self.look() == before
        assert len(os.listdir("/proc/self/fd")) == descriptors


def _read_package(place: Place) -> None:
    found = package.read(place.package, "hello")
    assert found.argv
    assert all(isinstance(word, str) for word in found.argv)
    for prog in found.progs:
        assert not prog.path.startswith("/")
        assert ".." not in prog.path.split("/")


def config_json(place: Place, content: bytes) -> None:
    """Read a package with this config.json."""
    (place.package / "config.json").write_bytes(content)
    with place.unchanged():
        _read_package(place)


def tenants_yaml(place: Place, content: bytes) -> None:
    """Load this tenants.yaml."""
    place.tenants.write_bytes(content)
    with place.unchanged():
        spec = load.load(place.tenants, root=place.root)
        assert all(package.is_name(name) for name in spec.tenants)


def progs(place: Place, tree: inputs.Tree) -> None:
    """Read a package with this progs/."""
    held = _plant(place, tree)
    try:
        with place.unchanged():
            _read_package(place)
    finally:
        for one in held:
            one.close()
        _clear(place.progs)


def _plant(place: Place, tree: inputs.Tree) -> list[socket.socket]:
    directories = [os.fsencode(place.progs)]
    held = []
    for name, kind, below in tree:
        path = directories[below % len(directories)] + b"/" + name.replace(b"/", b"_")
        with contextlib.suppress(OSError, ValueError):  # a name that no file can have, or that is taken
            if kind == "directory":
                os.mkdir(path)
                directories.append(path)
            elif kind in ("link", "dangling"):
                os.symlink(os.fsencode(place.outside) if kind == "link" else b"/nowhere", path)
            elif kind == "hard link":
                os.link(place.outside / "secret", path)
            elif kind == "fifo":
                os.mkfifo(path)
            elif kind == "socket":
                one = socket.socket(socket.AF_UNIX)
                held.append(one)
                one.bind(path)
            else:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                if kind == "hole":
                    os.ftruncate(descriptor, 5 << 30)
                os.fchmod(descriptor, {"program": 0o755, "set-uid": 0o6755}.get(kind, 0o644))
                os.close(descriptor)
    return held


def _clear(directory: Path) -> None:
    for path, names, files in os.walk(os.fsencode(directory), topdown=False):
        for name in files:
            os.unlink(path + b"/" + name)
        for name in names:
            full = path + b"/" + name
            (os.rmdir if stat.S_ISDIR(os.lstat(full).st_mode) else os.unlink)(full)


def containers_json(place: Place, content: bytes) -> None:
    """Read this containers.json as the launcher does, and as the registry does."""
    (place.root / "containers.json").write_bytes(content)
    with place.unchanged():
        found = entry.read(str(place.root), "hello")
        assert "\0" not in found.name
        assert not any(path.startswith("/") or ".." in path.split("/") for path in (*found.lowers, found.upper))
    with contextlib.suppress(ValueError):
        registry.decode(content)


def _config(chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        return inputs.mutation("config", chance)
    if chance.random() < 0.5:
        return inputs.as_json(inputs.changed(json.loads(CONFIG), chance))
    return inputs.as_json(inputs.mapping(list(validate.schema("config")), chance))


def _tenants(chance: random.Random) -> bytes:
    if chance.random() < 0.6:
        return inputs.mutation("tenants", chance)
    schema = validate.schema("tenants")
    grants = list(schema["defaults"]["schema"])
    value: dict[str, object] = {
        "tenants": {
            chance.choice(("hello", inputs.text(chance))): {"package": "package", **inputs.mapping(grants, chance)}
        }
    }
    if chance.random() < 0.3:
        value[chance.choice(list(schema))] = inputs.value(chance)
    if chance.random() < 0.3:
        value["defaults"] = inputs.mapping(grants, chance)
    return inputs.as_json(value)


@cache
def _valid_entry() -> str:
    """Return an entry as the launcher takes it now, whatever keys it has come to have."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as directory:
        entry = Tenant(Path(directory), "base_fs/x/rootfs", 1).entry
    return json.dumps({**entry, "tid": "0123456789abcdef" * 2, "name": "hello"})


def _entries(chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return inputs.mutation("containers", chance)
    return inputs.as_json([inputs.changed(json.loads(_valid_entry()), chance)])


Check = Callable[[Place, Any], None]
TARGETS: dict[str, tuple[Callable[[random.Random], Any], Check]] = {
    "config.json": (_config, config_json),
    "tenants.yaml": (_tenants, tenants_yaml),
    "progs": (inputs.tree, progs),
    "containers.json": (_entries, containers_json),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(package, "_TICK", -1.0)  # nobody else writes here: a file that was just made need not settle
    return Place(tmp_path)


def _fuzz(place: Place, target: str, count: int, *, the_same: bool) -> None:
    make, check = TARGETS[target]

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=the_same, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, (1 << 64) - 1))
    def tried(number: int) -> None:
        check(place, make(random.Random(number)))

    tried()


@pytest.mark.parametrize("target", TARGETS)
def test_some_thousand_hostile_inputs_end_in_a_value_or_in_lines(place: Place, target: str) -> None:
    _fuzz(place, target, FEW, the_same=True)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", TARGETS)
def test_a_hundred_thousand_hostile_inputs_end_in_a_value_or_in_lines(place: Place, target: str) -> None:
    _fuzz(place, target, MANY, the_same=False)


@pytest.mark.parametrize("kind", ["config", "tenants", "containers"])
def test_every_seed_ends_in_a_value_or_in_lines(place: Place, kind: str) -> None:
    check = {"config": config_json, "tenants": tenants_yaml, "containers": containers_json}[kind]
    contents = inputs.seeds(kind)
    assert contents
    for content in contents:
        check(place, content)


@pytest.mark.parametrize("target", TARGETS)
def test_some_inputs_are_read_and_some_are_refused(place: Place, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what is made here is neither all nonsense nor all harmless."""
    refused = []
    real = Place.unchanged

    @contextlib.contextmanager
    def counting(self: Place) -> Iterator[None]:
        with real(self):
            try:
                yield
            except IsochamberError:
                refused.append(1)
                raise

    monkeypatch.setattr(Place, "unchanged", counting)
    make, check = TARGETS[target]
    for number in range(200):
        check(place, make(random.Random(number)))
    assert 0 < len(refused) < 200
