"""Core dumps: a crash leaves none, and starts nothing of the host's; and what ``show`` says of the fences."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from isochamber.build import limits
from isochamber.launch import cgroup, devicegroup
from isochamber.spec import learned
from isochamber.spec.load import load
from tests.build.products import eventually
from tests.launch.tenants import UNFILTERED, Tenant
from tests.tasks.world import World, write_package

PATTERN = Path("/proc/sys/kernel/core_pattern")
CRASH = "cd /tmp; (kill -SEGV $(sh -c 'echo $PPID')) 2>/dev/null; ls /tmp | grep -c core"
LARGE = 1 << 30


def _as_built(core: int | None = None) -> dict[str, int]:
    """Return the resource limits that every tenant is built with, or with another limit of cores."""
    found = {"NOFILE": 1024, "CORE": limits._ALWAYS["CORE"]}
    return found if core is None else {**found, "CORE": core}


def test_a_crash_leaves_no_core(tenant: Tenant) -> None:
    if PATTERN.read_text()[0] in "|@" or "/" in PATTERN.read_text():
        pytest.skip("cores of this machine do not go to the working directory (kernel.core_pattern)")
    tenant.change(rlimits=_as_built(LARGE))
    assert tenant.sh(CRASH).stdout.strip() == "1", "the control: with a limit it leaves one"
    tenant.change(rlimits=_as_built())
    assert tenant.sh(CRASH).stdout.strip() == "0"


@pytest.fixture
def piped(tmp_path: Path) -> Iterator[Path]:
    """Let cores be piped to a program that leaves a file, whose path is returned."""
    if "isochamber.data=" not in Path("/proc/cmdline").read_text():
        pytest.skip("kernel.core_pattern is the whole machine's: shown on the second kernel")
    handler, made = tmp_path / "handler", tmp_path / "made"
    handler.write_text(f"#!/bin/sh\ncat > /dev/null\necho started >> {made}\n")
    handler.chmod(0o755)
    former = PATTERN.read_text()
    PATTERN.write_text(f"|{handler}")
    yield made
    PATTERN.write_text(former)


@pytest.mark.guest
def test_a_crash_starts_no_program_that_cores_are_piped_to(tenant: Tenant, piped: Path) -> None:
    tenant.change(rlimits=_as_built())
    tenant.sh(CRASH)
    tenant.sh(f"ulimit -c 0; {CRASH}")
    tenant.change(seccomp=UNFILTERED)
    tenant.sh(f"ulimit -c 0; {CRASH}")
    assert eventually(piped.exists), "the control: with a limit of 0 it is started, and the kernel does not wait for it"
    assert piped.read_text() == "started\n", "a crash before that started it too"


def test_a_program_that_sets_the_limit_of_cores_goes_on_and_the_limit_stays(tenant: Tenant) -> None:
    tenant.change(rlimits=_as_built())
    look = "grep 'core file' /proc/self/limits | tr -s ' '"
    assert tenant.output(f"ulimit -c 0 && {look}").split()[4:6] == ["1", "1"]
    assert tenant.output(f"ulimit -c unlimited && {look}").split()[4:6] == ["1", "1"]
    assert tenant.output(f"ulimit -n 100 && {look} && ulimit -n").splitlines()[-1] == "100", "other limits are set"
    tenant.change(seccomp=UNFILTERED)
    assert tenant.output(f"ulimit -c 0 && {look}").split()[4:6] == ["0", "0"], "the control"


def test_show_says_what_fences_the_devices_and_that_nobody_listens_under_the_supervisor(
    tmp_path: Path, root: Path
) -> None:
    write_package(tmp_path / "packages/one", {"init": "/home/main"}, {"main": "#!/bin/sh\n"})
    world = World(tmp_path, root)
    world.tenants.write_text("defaults: {ipc: none}\ntenants:\n  one: {package: packages/one}\n")
    assert load(world.tenants, root=root).tenants
    done = world.doit("configure:one")
    assert done.returncode == 0, done.stdout + done.stderr
    said = world.cli("show", "one").stdout
    groups = cgroup.groups_of(world.entry("one")["tid"], [devicegroup.CONTROLLER], cgroup.trees())
    fence = devicegroup.expected(groups)
    assert (f"devices by  {fence}" if fence else "warning     devices: no control group") in said
    assert "nobody listens" not in said
    world.tenants.write_text(world.tenants.read_text().replace("packages/one}", "packages/one, seccomp: notify}"))
    known = learned.Learned({"read": ()}, frozenset(), frozenset({os.uname().machine}))
    (root / "tenants_persist" / world.entry("one")["tid"] / learned.FILE).write_text(learned.text(known, "one"))
    assert world.doit("configure:one").returncode == 0
    assert world.entry("one")["seccomp"]["mode"] == "notify"
    assert "nobody listens" not in world.cli("show", "one").stdout, "the supervisor does, as the launcher does"
