"""The supervisor and its nursery are killed: what runs on, what does not, and what the next one finds."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isochamber.launch import records
from isochamber.serve import link, wire
from tests.conftest import PROJECT
from tests.launch.tenants import Tenant, wait_for_end
from tests.serve.world import World, children_of, descriptors_of, eventually, gone, nursery_of

Add = Callable[..., Tenant]
COUNTING = ["/usr/bin/perl", "-e", "$| = 1; for (1 .. 100000) { print qq($_\\n); select(undef, undef, undef, .002) }"]


def test_tenants_run_on_when_the_supervisor_is_killed_and_the_next_one_takes_them_over(world: World, add: Add) -> None:
    tenant, paused, ended = add(), add(), add(argv=["/bin/sh", "-c", "exit 4"])
    world.begin()
    world.ask("start", tenant.name, paused.name, ended.name)
    world.ask("wait", ended.name)
    before = world.row(tenant)
    world.kill()
    assert records.running(tenant.tid) is not None
    world.begin()
    after = world.row(tenant)
    assert (after["state"], after["pid"]) == ("running", before["pid"])
    assert after["started_at"] == before["started_at"]
    assert (world.row(ended)["state"], world.row(ended)["exit_code"]) == ("exited", 4)
    assert world.output("exec", tenant.name, "/bin/echo", "in") == "in\n"
    world.ask("stop", tenant.name)
    assert world.row(tenant)["exit_code"] == 3
    assert gone(tenant)


def test_nothing_that_a_tenant_says_is_lost_while_there_is_no_supervisor(world: World, add: Add) -> None:
    tenant = add(argv=COUNTING, service={"logs": {"size": 10_000_000, "count": 2, "journald": False}})
    world.begin()
    world.ask("start", tenant.name)
    for _ in range(3):
        with contextlib.closing(world.stream("logs", tenant=tenant.name, follow=True, tail=0)) as lines:
            next(lines)
        world.kill()
        log = Path(world.root, "tenants_persist", tenant.tid, "log", "log")
        size = log.stat().st_size
        eventually(lambda: log.stat().st_size > size + 2000, "its log grows with nobody there")  # noqa: B023
        world.begin()
    world.ask("stop", tenant.name, time=0)
    numbers = [int(line["text"]) for line in world.stream("logs", tenant=tenant.name)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_an_end_that_nobody_saw_is_known_to_the_next_supervisor_and_its_policy_applies(world: World, add: Add) -> None:
    always, once = add(service={"restart": "always"}), add()
    world.begin()
    world.ask("wait", always.name, condition="running")
    world.ask("start", once.name)
    pids = [world.row(tenant)["pid"] for tenant in (always, once)]
    world.kill()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)
    eventually(lambda: gone(once), "it is cleaned up with no supervisor there")
    world.begin()
    world.ask("wait", always.name, condition="running")
    assert world.row(always)["pid"] not in pids
    assert world.row(always)["restarts"] == 1
    assert (world.row(once)["state"], world.row(once)["exit_code"]) == ("exited", 137)


def test_what_the_operator_has_stopped_stays_stopped_under_the_next_supervisor(world: World, add: Add) -> None:
    tenant = add(service={"restart": "always"})
    world.begin()
    world.ask("wait", tenant.name, condition="running")
    world.ask("stop", tenant.name)
    world.kill()
    world.begin()
    assert world.row(tenant)["state"] == "exited"
    assert gone(tenant)


def test_a_foreground_run_does_not_notice_that_the_supervisor_was_replaced(world: World, add: Add) -> None:
    tenant = add(argv=["/bin/sh", "-c", "echo up; read x; echo $x; exit 6"])
    world.begin()
    words = world.command("run", tenant.name)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        assert run.stdout.readline() == "up\n"
        world.kill()
        world.begin()
        assert world.row(tenant)["state"] == "running"
        out, _ = run.communicate("word\n", timeout=60)
    assert (run.returncode, out) == (6, "word\n")


def test_a_nursery_that_is_killed_takes_every_tenant_along_and_they_come_back_by_their_policy(
    world: World, add: Add
) -> None:
    always, once = add(service={"restart": "always"}), add()
    world.begin()
    world.ask("wait", always.name, condition="running")
    world.ask("start", once.name)
    nursery = nursery_of(once)
    pids = [world.row(tenant)["pid"] for tenant in (always, once)]
    begun = time.time()
    os.kill(nursery, signal.SIGKILL)
    for pid in pids:
        wait_for_end(pid)
    world.event("start", always, begun)
    assert nursery_of(always) != nursery
    assert world.row(once)["state"] == "exited"
    assert gone(once)
    world.ask("start", once.name)
    assert world.row(once)["state"] == "running"


def test_both_killed_leave_no_tenant_and_the_next_supervisor_starts_what_is_to_run(world: World, add: Add) -> None:
    always, once = add(service={"restart": "always"}), add()
    world.begin()
    world.ask("wait", always.name, condition="running")
    world.ask("start", once.name)
    nursery = nursery_of(once)
    world.kill()
    os.kill(nursery, signal.SIGKILL)
    wait_for_end(nursery)
    eventually(lambda: gone(once) and gone(always), "the kernel has ended them")
    world.begin()
    world.ask("wait", always.name, condition="running")
    assert world.row(once)["state"] == "created"


def test_the_nursery_holds_nothing_of_a_tenant_that_has_ended(world: World, add: Add) -> None:
    keeper, tenant = add(), add(argv=["/bin/true"])
    world.begin()
    world.ask("start", keeper.name)
    nursery = nursery_of(keeper)
    world.ask("start", tenant.name)
    world.ask("wait", tenant.name)
    eventually(lambda: len(children_of(nursery)) == 2, "the tenant that stays, and a spare process that waits")
    before = descriptors_of(nursery)
    assert world.process is not None
    ours = descriptors_of(world.process.pid)
    for number in range(20):
        world.ask("start", tenant.name)
        world.ask("wait", tenant.name)
        if not number % 7:
            assert world.cli("run", tenant.name).returncode == 0
            world.output("exec", keeper.name, "/bin/true")
    eventually(lambda: descriptors_of(nursery) == before, "nothing is left, and a spare process waits again")
    assert sum(descriptors_of(world.process.pid).values()) <= sum(ours.values()) + 2  # a hang-up may be on its way
    assert Path(f"/proc/{nursery}/task").is_dir()
    assert len(os.listdir(f"/proc/{nursery}/task")) == 1  # it forks: no threads


@pytest.fixture
def ipc_directory() -> Iterator[Path]:
    path = Path("/run", f"isochamber-test-ipc-{os.getpid()}")
    path.mkdir()
    yield path
    shutil.rmtree(path)


def test_an_ipc_directory_that_the_host_daemon_made_anew_is_bound_into_who_runs(
    world: World, add: Add, ipc_directory: Path
) -> None:
    (ipc_directory / "old").touch()
    tenant = add(ipc=str(ipc_directory))
    other = add(ipc=None)
    world.begin()
    world.ask("start", tenant.name, other.name)
    world.said(tenant, "up")
    assert world.output("exec", tenant.name, "/bin/ls", "/tmp/tenant_ipc") == "old\n"
    begun = time.time()
    stage = ipc_directory.with_name(f"{ipc_directory.name}-new")
    stage.mkdir()
    (stage / "new").touch()
    shutil.rmtree(ipc_directory)
    assert world.output("exec", tenant.name, "/bin/ls", "/tmp/tenant_ipc") == ""  # the control: what was there is gone
    stage.rename(ipc_directory)
    world.event("ipc", tenant, begun)
    assert world.output("exec", tenant.name, "/bin/ls", "/tmp/tenant_ipc") == "new\n"
    refused = world.cli("exec", tenant.name, "/bin/touch", "/tmp/tenant_ipc/mine")
    assert refused.returncode != 0
    assert "Read-only" in refused.stderr
    mounts = world.output("exec", tenant.name, "/bin/grep", "-c", "tenant_ipc", "/proc/self/mountinfo")
    assert mounts == "1\n"


def test_a_nursery_is_replaced_while_tenants_run_and_each_keeps_its_own_until_they_end(world: World, add: Add) -> None:
    logs = {"size": 10_000_000, "count": 2, "journald": False}
    running, other = add(argv=COUNTING, service={"logs": logs}), add()
    world.begin()
    world.ask("start", running.name)
    former, pid = nursery_of(running), world.row(running)["pid"]
    world.ask("renew")
    world.ask("start", other.name)
    new = nursery_of(other)
    assert (nursery_of(running), world.row(running)["pid"]) == (former, pid)
    assert new != former
    assert world.output("exec", running.name, "/bin/echo", "in") == "in\n"  # by who holds it
    world.kill()  # the next supervisor finds both
    world.begin()
    assert (world.row(running)["state"], world.row(running)["pid"]) == ("running", pid)
    assert world.row(other)["state"] == "running"
    world.ask("stop", running.name, time=0)
    assert gone(running)
    eventually(lambda: not Path(f"/proc/{former}").exists(), "the former nursery ends with its last tenant")
    world.ask("start", running.name)
    assert nursery_of(running) == new
    lines = ([line["text"] for line in world.stream("logs", tenant=running.name)] for _ in iter(int, 1))
    eventually(lambda: next(lines).count("1") == 2, "both runs are in its log")
    assert world.row(other)["state"] == "running"


def test_a_former_nursery_that_is_killed_takes_only_its_own_tenants_along(world: World, add: Add) -> None:
    always, other = add(service={"restart": "always"}), add()
    world.begin()
    world.ask("wait", always.name, condition="running")
    former = nursery_of(always)
    world.ask("renew")
    world.ask("start", other.name)
    pid = world.row(other)["pid"]
    begun = time.time()
    os.kill(former, signal.SIGKILL)
    world.event("start", always, begun)
    assert nursery_of(always) == nursery_of(other)
    assert world.row(other)["pid"] == pid


def test_a_nursery_of_another_protocol_is_replaced_before_it_is_told_to_start_anybody(
    world: World, add: Add, tmp_path: Path
) -> None:
    other = tmp_path / "isochamber"
    shutil.copytree(PROJECT / "isochamber", other, ignore=shutil.ignore_patterns("__pycache__"))
    protocol = (other / "serve" / "wire.py").read_text()
    changed = protocol.replace(f"VERSION = {wire.VERSION} ", "VERSION = 1 ")
    assert changed != protocol
    (other / "serve" / "wire.py").write_text(changed)
    subprocess.run([sys.executable, "-I", "-S", str(other / "serve" / "__main__.py"), "nursery"], check=True)
    former = link.connect()
    assert former is not None
    with former:
        pid = _pid_of_a_nursery(former)
    tenant = add()
    world.begin()
    world.ask("start", tenant.name)
    assert nursery_of(tenant) != pid
    wait_for_end(pid)  # nobody is in it


def _pid_of_a_nursery(end: socket.socket) -> int:
    wire.send(end, {"do": "list", "id": 1})
    answer, _ = wire.receive(end)
    assert answer is not None
    return int(answer["pid"])
