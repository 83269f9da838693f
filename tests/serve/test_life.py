"""Tenants kept by the supervisor: from start to stop, and back again when they fall."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from isochamber.errors import IsochamberError
from isochamber.launch import records
from isochamber.serve import unit
from tests.launch.tenants import Tenant
from tests.serve.world import STUBBORN, World, gone, nursery_of

Add = Callable[..., Tenant]


def catching(signal: str, action: str) -> list[str]:
    return ["/bin/sh", "-c", f"trap '{action}' {signal}; echo up; while :; do sleep 1000 & wait; done"]


def test_start_runs_tenants_in_the_background_and_stop_leaves_nothing(world: World, add: Add) -> None:
    first, second = add(), add()
    world.begin()
    assert world.output("start", first.name, second.name).split() == [first.name, second.name]
    nursery = nursery_of(first)
    assert nursery == nursery_of(second)
    assert Path(f"/proc/{nursery}/comm").read_text() == "isochamber-nurs\n"
    record = records.running(first.tid)
    assert record is not None
    assert world.row(first)["pid"] == record.pid
    world.said(first, "up")
    assert world.output("stop", first.name) == f"{first.name}\n"
    assert gone(first)
    row = world.row(first)
    assert (row["state"], row["exit_code"]) == ("exited", 3)
    assert world.row(second)["state"] == "running"
    assert world.ask("start", second.name)["tenants"] == [second.name]  # one that runs is fine
    world.ask("stop", all=True)
    assert gone(second)


def test_ps_shows_names_and_states_as_a_table_a_template_and_json(world: World, add: Add) -> None:
    running, never = add(), add()
    world.begin()
    world.ask("start", running.name)
    head, line = world.output("ps").splitlines()
    assert head.split() == ["TENANT", "ID", "NAME", "BASE", "COMMAND", "STATUS", "HEALTH", "PID"]
    assert line.startswith(running.tid[:12])
    assert f"  {running.name}  " in line
    assert " Up " in line
    assert len(world.output("ps", "-a").splitlines()) == 3
    assert (
        world.output("ps", "-a", "--format", "{{.Name}}={state}") == f"{running.name}=running\n{never.name}=created\n"
    )
    rows = json.loads(world.output("ps", "-a", "--json"))
    assert [(row["name"], row["state"]) for row in rows] == [(running.name, "running"), (never.name, "created")]
    assert world.output("ps", "-q") == f"{running.tid}\n"
    wrong = world.cli("ps", "--format", "{{.Nonsense}}")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)


def test_stop_gives_the_tenant_its_signal_and_its_grace_and_then_kills_it(world: World, add: Add) -> None:
    polite = add(
        service={"stop": {"signal": "USR1", "grace": 60}},
        argv=["/bin/sh", "-c", "trap 'exit 9' USR1; echo up; while :; do sleep 1000 & wait; done"],
    )
    stubborn = add(argv=STUBBORN)
    world.begin()
    world.ask("start", polite.name, stubborn.name)
    for tenant in (polite, stubborn):
        world.said(tenant, "up")
    world.ask("stop", polite.name)
    assert world.row(polite)["exit_code"] == 9
    begun = time.monotonic()
    world.ask("stop", stubborn.name, time=1)
    assert time.monotonic() - begun >= 1
    assert world.row(stubborn)["exit_code"] == 128 + signal.SIGKILL
    assert gone(stubborn)


def test_stop_does_not_sit_out_the_grace_of_a_pid_1_that_would_never_notice(world: World, add: Add) -> None:
    deaf = add(argv=["/bin/sleep", "1000"], service={"stop": {"signal": "TERM", "grace": 3600}})
    world.begin()
    world.ask("start", deaf.name)
    world.ask("stop", deaf.name)
    assert gone(deaf)


def test_kill_sends_any_signal_and_a_killed_tenant_stays_down(world: World, add: Add) -> None:
    tenant = add(
        service={"restart": "always"},
        argv=["/bin/sh", "-c", "trap 'echo hup' HUP; echo up; while :; do sleep 1000 & wait; done"],
    )
    world.begin()
    world.ask("wait", tenant.name, condition="running")  # restart: always starts with the supervisor
    world.said(tenant, "up")
    world.output("kill", "-s", "HUP", tenant.name)
    world.said(tenant, "hup")
    world.output("kill", tenant.name)
    assert world.row(tenant)["state"] == "exited"
    with pytest.raises(IsochamberError, match="no signal"):
        world.ask("kill", tenant.name, signal="NONSENSE")


def test_pause_stops_every_process_and_resume_lets_them_go_on(world: World, add: Add) -> None:
    tenant = add()
    world.begin()
    world.ask("start", tenant.name)
    world.output("pause", tenant.name)
    assert world.row(tenant)["state"] == "paused"
    if tenant.group is not None:
        assert (tenant.group / "cgroup.freeze").read_text() == "1\n"
    world.output("resume", tenant.name)
    assert world.row(tenant)["state"] == "running"
    world.ask("pause", tenant.name)
    world.ask("stop", tenant.name)  # a paused one can be stopped, and in its own way
    assert world.row(tenant)["exit_code"] == 3


def test_wait_gives_each_tenants_exit_code(world: World, add: Add) -> None:
    first, second = add(argv=["/bin/sh", "-c", "exit 4"]), add(argv=["/bin/sh", "-c", "kill -9 $$; sleep 1"])
    world.begin()
    world.ask("start", first.name)
    assert world.output("wait", first.name) == "4\n"
    world.ask("start", second.name)
    assert world.ask("stop", second.name) is not None


def test_what_can_not_be_started_is_one_line_and_podmans_code(world: World, add: Add) -> None:
    tenant = add(argv=["/nowhere"])
    missing = add(ipc="/nowhere/at/all")
    world.begin()
    done = world.cli("start", tenant.name)
    assert (done.returncode, done.stdout) == (127, "")
    (line,) = done.stderr.splitlines()
    assert "/nowhere" in line
    done = world.cli("start", missing.name)
    assert done.returncode == 125
    assert "/nowhere/at/all" in done.stderr
    assert world.cli("start", "nobody").returncode == 125
    assert gone(tenant)
    assert gone(missing)


def test_a_tenant_that_fails_is_restarted_as_often_as_its_policy_says(world: World, add: Add) -> None:
    tenant = add(argv=["/bin/sh", "-c", "echo again; exit 5"], service={"restart": "on-failure", "retries": 2})
    once = add(argv=["/bin/sh", "-c", "echo well; exit 0"], service={"restart": "on-failure"})
    world.begin()
    for _ in range(3):
        world.event("died", tenant, 0)
    while (
        sum(
            event["event"] == "died" and event.get("tid") == tenant.tid
            for event in world.stream("events", stream=False)
        )
        < 3
    ):
        world.event("restart-in", tenant, 0)
    world.ask("wait", tenant.name)
    row = world.row(tenant)
    assert (row["state"], row["exit_code"], row["restarts"]) == ("exited", 5, 2)
    assert world.row(once)["restarts"] == 0
    assert [line["text"] for line in world.stream("logs", tenant=tenant.name)] == ["again"] * 3


def test_a_tenant_that_is_to_run_always_comes_back_and_stop_ends_that(world: World, add: Add) -> None:
    tenant = add(service={"restart": "always"})
    world.begin()
    world.ask("wait", tenant.name, condition="running")
    pid = world.row(tenant)["pid"]
    begun = time.time()
    os.kill(pid, signal.SIGKILL)
    world.event("died", tenant, begun)
    world.event("start", tenant, begun)
    row = world.row(tenant)
    assert row["restarts"] == 1
    assert row["pid"] != pid
    world.ask("stop", tenant.name)
    assert gone(tenant)


def test_the_delays_double_up_to_a_minute_and_differ_by_chance() -> None:
    assert [unit.delay(number, 0.5) for number in (1, 2, 3, 4)] == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert unit.delay(100, 0.5) == 60
    assert (unit.delay(1, 0), unit.delay(1, 1)) == pytest.approx((0.075, 0.125))


@pytest.mark.parametrize(
    ("policy", "most", "code", "seconds", "failures", "wanted"),
    [
        ("no", 0, 1, 1, 0, (False, 0)),
        ("always", 0, 0, 1, 0, (True, 1)),
        ("always", 0, 1, 1, 3, (True, 4)),
        ("on-failure", 0, 0, 1, 3, (False, 0)),
        ("on-failure", 0, 1, 1, 99, (True, 100)),
        ("on-failure", 2, 1, 1, 1, (True, 2)),
        ("on-failure", 2, 1, 1, 2, (False, 3)),
        ("on-failure", 2, 1, 60, 2, (True, 1)),  # it ran well meanwhile
    ],
)
def test_the_policy_decides_what_happens_at_an_end(
    policy: str, most: int, code: int, seconds: float, failures: int, wanted: tuple[bool, int]
) -> None:
    assert unit.after_end(policy, most, code, seconds, failures) == wanted


NOTIFY = (
    "use Socket; socket(S, AF_UNIX, SOCK_DGRAM, 0) or die $!;"
    " sub inform { send(S, $_[0], 0, pack_sockaddr_un($ENV{NOTIFY_SOCKET})) or die $! }"
    " $| = 1; print qq(waiting\\n); select(undef, undef, undef, .01) until -e q(/home/go);"
    " inform(qq(STATUS=at work\\nREADY=1)); print qq(told\\n); sleep 1000;"
)


def test_a_tenant_says_itself_when_it_is_ready_and_who_comes_after_it_waits_for_that(world: World, add: Add) -> None:
    first = add(argv=["/usr/bin/perl", "-e", NOTIFY], service={"ready": "notify"})
    second = add(service={"after": [first.name], "restart": "always"})
    world.begin()
    world.ask("wait", first.name, condition="running")  # started because the second needs it
    world.said(first, "waiting")
    assert world.row(second)["state"] == "created"
    assert not world.row(first)["ready"]
    (first.home / "go").touch()
    world.ask("wait", second.name, condition="running")
    row = world.row(first)
    assert row["ready"]
    assert row["status_text"] == "at work"


def test_an_unhealthy_tenant_is_killed_and_started_again(world: World, add: Add) -> None:
    health = {"argv": ["/bin/test", "-e", "/home/well"], "interval": 1, "timeout": 30, "retries": 2, "start_period": 0}
    tenant = add(service={"restart": "on-failure", "health": health})
    (tenant.home / "well").touch()
    world.begin()
    world.ask("wait", tenant.name, condition="healthy")
    begun = time.time()
    (tenant.home / "well").unlink()
    world.event("health-unhealthy", tenant, begun)
    world.event("start", tenant, begun)
    (tenant.home / "well").touch()
    world.ask("wait", tenant.name, condition="healthy")
    assert world.row(tenant)["restarts"] >= 1


def test_deleting_a_tenant_ends_it_for_good(world: World, add: Add) -> None:
    tenant = add(service={"restart": "always", "warm": 1})
    world.begin()
    world.ask("wait", tenant.name, condition="running")
    world.ask("forget", tenant=tenant.name)
    assert gone(tenant)


def test_one_run_time_directory_has_one_supervisor(world: World, add: Add) -> None:
    add()
    world.begin()
    second = world.cli("serve")
    assert second.returncode == 125
    assert "another supervisor runs" in second.stderr


def test_without_a_supervisor_a_verb_says_so_and_run_works_all_the_same(world: World, add: Add) -> None:
    tenant = add(argv=["/bin/echo", "alone"])
    done = world.cli("ps")
    assert done.returncode == 125
    assert "isochamber serve" in done.stderr
    assert world.output("run", tenant.name) == "alone\n"


def test_serve_can_take_its_tenants_along_when_it_ends(world: World, add: Add) -> None:
    tenant = add()
    world.begin("--stop-tenants")
    world.ask("start", tenant.name)
    world.said(tenant, "up")
    assert world.end() == 0
    assert gone(tenant)
