"""A tenant's /home and a package to deploy to it, without a base: what deployment does can be seen from outside."""

import ctypes
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from isochamber.build import contents, identity
from isochamber.build import home as deployment
from isochamber.build.state import State
from isochamber.spec import package
from isochamber.spec.model import Limits, Network, Tenant
from tests.build.products import Lines

_LIBC = ctypes.CDLL(None, use_errno=True)
_RENAME_EXCHANGE = 2


def exchange(one: Path, other: Path) -> None:
    """Swap two names in one step (renameat2(2)), so that there is always something under each."""
    if _LIBC.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(one))


Tree = Mapping[str, str | None]  # path -> content, None for a directory


@dataclass
class House:
    """One state directory with one tenant in it."""

    directory: Path
    reporter: Lines = field(default_factory=Lines)

    def __post_init__(self) -> None:
        self.state = State(self.directory / "state")
        self.state.create()
        self.tid = identity.ensure(self.state, "probe").tid

    @property
    def home(self) -> Path:
        return self.state.tenant_persist(self.tid) / identity.HOME

    @property
    def progs(self) -> Path:
        return self.directory / "package/progs"

    def write(self, tree: Tree) -> None:
        """Make the package anew with ``tree`` as its progs/; a text that starts with #! is executable."""
        shutil.rmtree(self.directory / "package", ignore_errors=True)
        self.progs.mkdir(parents=True)
        config = {"tid": "", "cname": "probe", "dependencies": "", "init": "/home/main"}
        (self.directory / "package/config.json").write_text(json.dumps(config))
        for path, text in sorted(tree.items()):
            if text is None:
                (self.progs / path).mkdir(parents=True, exist_ok=True)
            else:
                (self.progs / path).parent.mkdir(parents=True, exist_ok=True)
                (self.progs / path).write_text(text)
                (self.progs / path).chmod(0o755 if text.startswith("#!") else 0o644)

    def tenant(self) -> Tenant:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(package, "_TICK", 0)  # nobody races the package here
            read = package.read(self.directory / "package")
        return Tenant("probe", "default", read, None, Network(), Limits(1 << 20, 1 << 20, 64, 60), {})

    def wanted(self, tenant: Tenant) -> deployment.Desired:
        return deployment.desired(self.state, contents.digests(self.state, tenant.package), None)

    def deploy(self, tree: Tree | None = None) -> list[str]:
        """Deploy the package (made of ``tree``, if given); returns what was said."""
        if tree is not None:
            self.write(tree)
        tenant = self.tenant()
        self.reporter.said.clear()
        deployment.deploy(self.state, tenant, self.tid, self.wanted(tenant), self.reporter)
        return list(self.reporter.said)

    def current(self) -> bool:
        return deployment.current(self.state, self.tid, self.wanted(self.tenant()))

    def seen(self) -> dict[str, str | None]:
        """Return what is in /home: content, None for a directory, "-> target" for a link."""
        found: dict[str, str | None] = {}
        for at, directories, files in os.walk(self.home):
            for name in (*directories, *files):
                path = Path(at, name)
                key = str(path.relative_to(self.home))
                if path.is_symlink():
                    found[key] = f"-> {os.readlink(path)}"
                elif path.is_dir():
                    found[key] = None
                else:
                    found[key] = path.read_text()
        return found
