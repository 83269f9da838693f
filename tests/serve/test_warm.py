"""Warm sandboxes: everything is done but the exec."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from isochamber.launch import records
from tests.launch.tenants import Tenant
from tests.serve.world import FOREVER, World, gone

Add = Callable[..., Tenant]
WARM = {"warm": 1}


def _waiting(tenant: Tenant) -> int:
    record = records.running(tenant.tid)
    assert record is not None
    assert record.waits
    return record.pid


def test_a_sandbox_waits_is_handed_over_and_another_waits_when_the_tenant_has_ended(world: World, add: Add) -> None:
    tenant = add(service=WARM)
    world.begin()
    for _ in range(3):
        world.ask("wait", tenant.name, condition="warm")
        pid = _waiting(tenant)
        assert world.row(tenant)["state"] in ("created", "exited")
        world.ask("start", tenant.name)
        world.said(tenant, "up")
        assert world.row(tenant)["pid"] == pid  # the one that waited is the one that runs
        record = records.running(tenant.tid)
        assert record is not None
        assert not record.waits
        world.ask("stop", tenant.name)
    texts = [line["text"] for line in world.stream("logs", tenant=tenant.name)]
    assert texts == ["up"] * 3


def test_a_waiting_sandbox_is_the_tenant_already_and_holds_nothing_but_its_channel(world: World, add: Add) -> None:
    tenant, other = add(service=WARM), add()
    world.begin()
    world.ask("start", other.name)
    world.ask("wait", tenant.name, condition="warm")
    pid = _waiting(tenant)
    from tests.serve.world import eventually

    status = Path(f"/proc/{pid}/status")
    eventually(lambda: f"Uid:\t{tenant.uid_base}\t" in status.read_text(), "it has become the tenant")
    eventually(lambda: len(os.listdir(f"/proc/{pid}/fd")) == 4, "0, 1, 2 and the channel")
    assert "CapBnd:\t0000000000000000" in status.read_text()
    eventually(lambda: "Seccomp:\t2\nSeccomp_filters:\t2\n" in status.read_text(), "its common filters are loaded")
    assert "SigIgn:\t0000000000000000" in status.read_text()
    (row,) = (row for row in next(iter(world.stream("stats", stream=False)))["rows"] if row["tid"] == tenant.tid)
    assert row["state"] == "warm"
    assert row["memory"] > 0


def test_a_run_is_handed_the_sandbox_with_its_own_descriptors_and_words(world: World, add: Add) -> None:
    tenant = add(service=WARM, argv=["/bin/sh", "-c", "read x; echo own $x; exit 2"])
    world.begin()
    world.ask("wait", tenant.name, condition="warm")
    done = world.cli("run", tenant.name, input="word\n", stdin=None)
    assert (done.returncode, done.stdout) == (2, "own word\n")
    world.ask("wait", tenant.name, condition="warm")
    pid = _waiting(tenant)
    done = world.cli("run", tenant.name, "/bin/sh", "-c", "echo other; ls /proc | grep -c '^[0-9]*$'; exit 3")
    assert (done.returncode, done.stdout.split()[0]) == (3, "other")
    assert not Path(f"/proc/{pid}").exists()


def test_a_tenant_that_is_reconfigured_is_never_started_from_the_former_sandbox(world: World, add: Add) -> None:
    tenant = add(service=WARM, argv=["/bin/echo", "former"])
    world.begin()
    world.ask("wait", tenant.name, condition="warm")
    former = _waiting(tenant)
    begun = time.time()
    tenant.entry["argv"] = ["/bin/echo", "new"]
    world.write()
    world.event("warm", tenant, begun)
    assert not Path(f"/proc/{former}").exists()
    assert _waiting(tenant) != former
    world.ask("start", tenant.name)
    world.ask("wait", tenant.name)
    assert [line["text"] for line in world.stream("logs", tenant=tenant.name)] == ["new"]


def test_a_sandbox_outlives_the_supervisor_and_is_handed_over_by_the_next_one(world: World, add: Add) -> None:
    tenant = add(service=WARM)
    world.begin()
    world.ask("wait", tenant.name, condition="warm")
    pid = _waiting(tenant)
    world.kill()
    world.begin()
    assert _waiting(tenant) == pid
    world.ask("start", tenant.name)
    assert world.row(tenant)["pid"] == pid


def test_the_launcher_alone_and_a_rebuild_get_past_a_sandbox_that_waits(world: World, add: Add) -> None:
    from isochamber.launch import stop

    tenant = add(service=WARM, argv=["/bin/echo", "alone"])
    world.begin()
    world.ask("wait", tenant.name, condition="warm")
    world.kill()
    assert stop.stop(tenant.tid)  # as ./doit does when the layers have changed
    assert gone(tenant)
    assert tenant.output("echo alone") == "alone"


def test_a_sandbox_that_can_not_be_made_is_not_tried_again_and_again(world: World, add: Add) -> None:
    tenant = add(service=WARM, ipc="/nowhere/at/all")
    fine = add(service=WARM, argv=FOREVER)
    world.begin()
    world.ask("wait", fine.name, condition="warm")
    with contextlib.closing(world.stream("events", since=0)) as events:
        first = next(event for event in events if event["event"] == "error")
    assert "/nowhere/at/all" in first["error"]
    errors = [event for event in world.stream("events", stream=False) if event["event"] == "error"]
    assert len(errors) == 1, json.dumps(errors)
    assert gone(tenant)


def test_a_sandbox_that_fails_in_its_own_steps_is_told_with_the_reason_and_not_tried_again(
    world: World, add: Add
) -> None:
    tenant = add(service=WARM)
    fine = add(service=WARM)
    (tenant.upper / "home").symlink_to("/etc")
    world.begin()
    with contextlib.closing(world.stream("events", since=0)) as events:
        first = next(event for event in events if event["event"] == "error")
    assert (first["tid"], "home" in first["error"]) == (tenant.tid, True), first
    world.ask("wait", fine.name, condition="warm")
    for _ in range(3):  # each of them asks for sandboxes anew
        world.ask("start", fine.name)
        world.ask("stop", fine.name, time=0)
        world.ask("wait", fine.name, condition="warm")
    mine = [event["event"] for event in world.stream("events", stream=False) if event.get("tid") == tenant.tid]
    assert mine == ["warm", "error"]
    assert gone(tenant)


def test_a_sandbox_that_is_killed_as_soon_as_it_is_there_is_made_again_later_each_time(world: World, add: Add) -> None:
    tenant = add(service=WARM)
    world.begin()
    waits = []
    for number in range(3):
        world.ask("wait", tenant.name, condition="warm")
        begun = time.time()
        os.kill(_waiting(tenant), signal.SIGKILL)
        if number:
            waits.append(world.event("warm-in", tenant, begun)["seconds"])
        world.event("warm", tenant, begun)
    assert waits == [0.2, 0.4]
