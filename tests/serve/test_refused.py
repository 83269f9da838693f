"""What a learned list refuses under the supervisor: answered, and told to log, events, metrics and who runs it."""

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isochamber.build import filters
from isochamber.build.state import State
from isochamber.spec import policy
from isochamber.spec.learned import Learned
from tests.launch.tenants import Tenant
from tests.serve.world import World, eventually

Add = Callable[..., Tenant]

# Waits, and makes what is asked for: a directory for each line of the file that comes.
ON_REQUEST = [
    "/bin/sh", "-c", "trap 'exit 3' TERM; echo up; while :; do [ -e /home/go ] && { rm /home/go; mkdir /home/d; }; "
    "sleep 0.05; done",
]  # fmt: skip
INET6 = ["/usr/bin/perl", "-e", "socket(my $s, 10, 1, 0) or print qq($!\\n)"]


def _but(mode: str, state: State, *without: str) -> dict[str, object]:
    """Return an entry's filters whose list knows every call but ``without``, and every socket but AF_INET6."""
    library = filters.library()
    names = filters._names(library, library.system_arch(), policy.LAST_REVIEWED)
    calls: dict[str, tuple[str, ...]] = {name: () for name in names if name not in without}
    known = Learned({**calls, "socket": ("AF_UNIX", "AF_INET")})
    approved = frozenset(known.names() & {*policy.DANGEROUS} - {*policy.DENIED})
    wanted = filters.Wanted(filters.default(), filters.learned(known, approved, mode), mode)
    wanted.ensure(state)
    return wanted.entry()


@pytest.fixture
def strict(add: Add, serve_root: Path) -> Callable[..., Tenant]:
    """Add a tenant that may make no directory and no IPv6 socket."""

    def make(mode: str = "notify", **changes: Any) -> Tenant:
        return add(seccomp=_but(mode, State(serve_root), "mkdir", "mkdirat"), **changes)

    return make


def _sample(world: World, tenant: Tenant) -> int | None:
    found = re.search(
        rf'^isochamber_refused_syscalls_total{{tenant="{tenant.name}"}} (\d+)$', world.output("metrics"), re.MULTILINE
    )
    return None if found is None else int(found[1])


def _refused(world: World, tenant: Tenant) -> int:
    found = _sample(world, tenant)
    assert found is not None
    return found


def _events(world: World, tenant: Tenant) -> list[str]:
    events = world.stream("events", stream=False)
    return [event["text"] for event in events if event["event"] == "refused" and event["tid"] == tenant.tid]


def test_a_refused_call_of_a_service_is_in_its_log_in_events_and_counted(world: World, strict: Add) -> None:
    tenant = strict(argv=ON_REQUEST)
    world.begin()
    world.ask("start", tenant.name)
    world.said(tenant, "up")
    assert _refused(world, tenant) == 0, "the control"
    (tenant.home / "go").touch()
    eventually(lambda: "was refused" in world.cli("logs", tenant.name).stderr, "the report")
    line = f"{tenant.name}: seccomp: mkdir of /usr/bin/mkdir was refused: isochamber learn {tenant.name} allows it"
    said = world.cli("logs", tenant.name).stderr.splitlines()
    assert f"isochamber: {line}" in said
    assert any("Operation not permitted" in text for text in said), "EPERM, and not ENOSYS"
    assert _events(world, tenant) == [line]
    assert _refused(world, tenant) == 1
    (tenant.home / "go").touch()
    eventually(lambda: _refused(world, tenant) == 2, "it is counted")
    assert _events(world, tenant) == [line], "said once"
    world.ask("restart", tenant.name)
    assert _refused(world, tenant) == 2, "a counter goes on"


@pytest.mark.parametrize("mode", ["log", "errno"])
def test_where_the_kernel_tells_us_nothing_there_is_no_count_rather_than_a_wrong_one(
    world: World, strict: Add, mode: str
) -> None:
    tenant = strict(mode, argv=["/bin/sh", "-c", "mkdir /home/d; echo up; sleep 1000"])
    world.begin()
    world.ask("start", tenant.name)
    world.said(tenant, "up")
    assert (tenant.home / "d").is_dir() == (mode == "log")
    assert f'isochamber_restarts_total{{tenant="{tenant.name}"}}' in world.output("metrics")
    assert _sample(world, tenant) is None


def test_run_and_exec_tell_it_to_who_waits_with_the_argument(world: World, strict: Add) -> None:
    tenant = strict(argv=INET6)
    other = strict(argv=ON_REQUEST)
    world.begin()
    done = world.cli("run", tenant.name)
    line = "seccomp: socket(AF_INET6) of /usr/bin/perl was refused: isochamber learn"
    assert done.stdout == "Operation not permitted\n"
    assert done.stderr == f"isochamber: {tenant.name}: {line} {tenant.name} allows it\n"
    world.ask("start", other.name)
    world.said(other, "up")
    done = world.cli("exec", other.name, *INET6)
    assert done.stdout == "Operation not permitted\n"
    assert done.stderr == f"isochamber: {other.name}: {line} {other.name} allows it\n"
    assert (_refused(world, tenant), _refused(world, other)) == (1, 1)


def test_what_exec_leaves_behind_is_answered_after_it(world: World, strict: Add) -> None:
    tenant = strict(argv=ON_REQUEST)
    world.begin()
    world.ask("start", tenant.name)
    world.said(tenant, "up")
    script = (
        "(while [ ! -e /home/late ]; do sleep 0.05; done; mkdir /home/x 2> /home/why) < /dev/null > /dev/null 2>&1 &"
    )
    assert world.cli("exec", tenant.name, "/bin/sh", "-c", script).returncode == 0
    (tenant.home / "late").touch()
    eventually(lambda: _refused(world, tenant) == 1, "it is answered and counted")
    eventually(lambda: "not permitted" in (tenant.home / "why").read_text(), "EPERM")


def test_a_warm_sandbox_is_listened_to_once_it_is_handed_over(world: World, strict: Add) -> None:
    tenant = strict(argv=ON_REQUEST, service={"warm": 1})
    world.begin()
    world.ask("wait", tenant.name, condition="warm")
    done = world.cli("run", tenant.name, "--", *INET6)
    assert done.stdout == "Operation not permitted\n"
    assert "was refused" in done.stderr


def test_without_a_supervisor_it_is_still_answered_and_the_next_one_knows(world: World, strict: Add) -> None:
    tenant = strict(argv=ON_REQUEST)
    world.begin()
    world.ask("start", tenant.name)
    world.said(tenant, "up")
    world.kill()
    (tenant.home / "go").touch()
    eventually(lambda: not (tenant.home / "go").exists(), "it does what was asked")
    world.begin()
    eventually(lambda: _refused(world, tenant) == 1, "the nursery has counted")
    eventually(lambda: "was refused" in world.cli("logs", tenant.name).stderr, "the nursery has told the log")


def test_who_floods_is_held_back_and_nobody_else(world: World, strict: Add, add: Add) -> None:
    flood = ["/usr/bin/perl", "-e", "$| = 1; print qq(up\\n); while (1) { socket(my $s, 10, 1, 0) }"]
    tenant, other = strict(argv=flood), add()
    world.begin()
    world.ask("start", tenant.name)
    world.ask("start", other.name)
    world.said(other, "up")
    eventually(lambda: _refused(world, tenant) >= 500, "it goes on after it was held back")
    assert world.cli("exec", other.name, "/bin/echo", "here").stdout == "here\n"
    assert len(_events(world, tenant)) == 1
    world.ask("stop", tenant.name)
    assert world.row(tenant)["state"] == "exited"


def test_a_program_with_control_characters_in_its_name_is_told_escaped(world: World, strict: Add) -> None:
    name = "p\x1b[2J\x9b"
    script = f"cp /usr/bin/mkdir '/home/{name}' && '/home/{name}' /home/d"
    tenant = strict(argv=["/bin/sh", "-c", script])
    world.begin()
    done = world.cli("run", tenant.name)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("isochamber: ")]
    assert "\\x1b[2J" in line
    assert not re.search("[\x00-\x1f\x7f-\x9f]", line + "".join(_events(world, tenant)))


@pytest.mark.parametrize("by", ["start", "run"])
def test_an_end_by_the_filter_is_told_and_counted(world: World, strict: Add, by: str) -> None:
    tenant = strict("kill", argv=INET6)
    world.begin()
    line = f"{tenant.name}: seccomp: killed by its filter (SIGSYS), for a call that isochamber learn {tenant.name}"
    if by == "run":
        done = world.cli("run", tenant.name)
        assert (done.returncode, done.stderr) == (128 + signal.SIGSYS, f"isochamber: {line} would allow\n")
    else:
        world.ask("start", tenant.name)
        world.ask("wait", tenant.name)
        assert f"{line} would allow" in world.cli("logs", tenant.name).stderr
    assert _refused(world, tenant) == 1
    assert _events(world, tenant) == [f"{line} would allow"]
