"""Packages, tenants and uppers for the tests of products: real ones, made by hand."""

import json
import os
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from isochamber.build import contents, identity, layer, ranges
from isochamber.build.progress import Reporter
from isochamber.build.state import State
from isochamber.spec import package
from isochamber.spec.model import Limits, Network, Tenant

UID_BASE = ranges.FIRST


class Lines(Reporter):
    """A reporter whose lines a test reads."""

    def __init__(self) -> None:
        super().__init__(live=False)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@dataclass
class Bench:
    """A state directory with a base, and one tenant's package that a test changes and builds again."""

    state: State
    directory: Path
    name: str = "sensor"
    base: str = ""
    reporter: Lines = field(default_factory=Lines)
    install_seconds: int = 120
    install_env: Mapping[str, str] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = self.base or next(path.name for path in (self.state.root / "base_fs").iterdir())

    @property
    def progs(self) -> Path:
        return self.directory / "progs"

    def write(self, **files: str) -> None:
        """Write files of progs/; ``__`` in a name stands for ``/``, ``_`` before the end for a dot."""
        for name, text in files.items():
            self.put(name.replace("__", "/").replace("_", "."), text)

    def put(self, path: str, text: str) -> None:
        file = self.progs / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755 if text.startswith("#!") else 0o644)

    def script(self, text: str) -> None:
        self.put("install_deps.sh", f"#!/bin/sh\nset -e\n{text}\n")

    def tenant(self) -> Tenant:
        config = {"tid": "", "cname": self.name, "dependencies": "/home/install_deps.sh", "init": "/bin/true"}
        self.directory.mkdir(exist_ok=True)
        (self.directory / "config.json").write_text(json.dumps({**config, **self.config}))
        limits = Limits(tmp=1 << 26, shm=1 << 26, open_files=1024, install_seconds=self.install_seconds)
        return Tenant(
            self.name, "default", package.read(self.directory), None, Network(), limits, self.install_env,
            install_network="host",
        )  # fmt: skip

    def build(self, former: str | None = None) -> str:
        """Build the layer of the package as it is now; returns the product's name."""
        tenant = self.tenant()
        own = contents.digests(self.state, tenant.package)
        who = identity.ensure(self.state, self.name)
        built = layer.build(self.state, tenant, self.base, own, who, self.reporter, former_product=former)
        assert built is not None
        return built

    def find(self) -> str | None:
        tenant = self.tenant()
        own = contents.digests(self.state, tenant.package)
        made_of = layer.recipe(tenant, self.base, own)
        assert made_of is not None
        return layer.find(self.state, tenant, made_of, own)

    def rootfs(self, product: str) -> Path:
        return self.state.layer(product) / "rootfs"

    def home(self, product: str) -> Path:
        return self.state.layer(product) / "home"

    def log(self) -> str:
        return self.state.log(f"layer-{self.name}").read_text(errors="replace")

    def layers(self) -> list[str]:
        return sorted(path.name for path in (self.state.root / "layers").iterdir())

    def staging(self) -> list[str]:
        return sorted(path.name for path in self.state.staging.iterdir())


def eventually(happens: Callable[[], bool], seconds: float = 60) -> bool:
    """Ask until ``happens`` is true, or the deadline has passed."""
    deadline = time.monotonic() + seconds
    while not happens():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def processes_of(uid_base: int) -> list[int]:
    """Return the processes that run with an id of this range."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                uid = directory.stat().st_uid
                state = (directory / "stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if uid_base <= uid < uid_base + ranges.UID_COUNT and state not in "ZX":
                found.append(int(directory.name))
    return found


def capability(*, rootid: int | None = None) -> bytes:
    """Return security.capability with CAP_NET_RAW, revision 2, or 3 with the uid of a namespace's root."""
    sets = (1 << 13, 0, 0, 0)
    if rootid is None:
        return struct.pack("<5I", 0x02000001, *sets)
    return struct.pack("<6I", 0x03000001, *sets, rootid)


def owners(path: Path) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_uid, status.st_gid
