"""Other bases than the default one, each built from nothing and run: minutes long."""

from pathlib import Path

import pytest

from isochamber.build import bootstrap
from isochamber.spec import load
from tests.tasks.world import World, write_package

pytestmark = pytest.mark.slow

INSTALL = "#!/bin/sh\nset -e\napt-get update\napt-get install -y hello\n"
MAIN = "#!/bin/sh\nhello\ndpkg --print-architecture\nuname -m\necho pid $$\n"
FOREIGN, MACHINE = ("arm64", "aarch64") if load.host_architecture() != "arm64" else ("amd64", "x86_64")


@pytest.fixture
def world(root: Path, tmp_path: Path) -> World:
    directory = tmp_path / "world"
    directory.mkdir()
    made = World(directory, root)
    config: dict[str, object] = {"dependencies": "/home/install_deps.sh"}
    write_package(directory / "hello", config, {"main": MAIN, "install_deps.sh": INSTALL})
    return made


def _run_on(world: World, base: str) -> list[str]:
    world.tenants.write_text(
        f"defaults: {{ipc: none, install_network: host}}\nbases:\n  default: {{packages: []}}\n  {base}\n"
        f"tenants:\n  hello: {{package: hello, base: {base.split(':', maxsplit=1)[0]}}}\n"
    )
    done = world.doit("run:hello", timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-4:]


@pytest.mark.timeout(1800)
def test_a_tenant_of_a_foreign_architecture_is_built_and_runs(world: World) -> None:
    handler = bootstrap.BINFMT / f"qemu-{MACHINE}"
    if not handler.exists():
        pytest.skip(f"binfmt_misc has no {handler.name}: apt-get install qemu-user-static binfmt-support")
    assert _run_on(world, f"foreign: {{arch: {FOREIGN}}}") == ["Hello, world!", FOREIGN, MACHINE, "pid 1"]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tool", ["mmdebstrap", "debootstrap"])
def test_both_tools_give_bases_that_run_the_same_tenant(world: World, tool: str) -> None:
    host = load.host_architecture()
    lines = _run_on(world, f"other: {{tool: {tool}, packages: [ca-certificates]}}")
    assert (lines[0], lines[1], lines[3]) == ("Hello, world!", host, "pid 1")
