"""The process that is forked ahead: what it has while it waits, and that its child is a tenant like any other."""

import os
from collections.abc import Callable
from pathlib import Path

from isochamber.launch import cgroup, records
from tests.launch.tenants import Tenant
from tests.serve.world import STUBBORN, World, children_of, descriptors_of, eventually, gone, nursery_of

Add = Callable[..., Tenant]


def _spare(nursery: int, *others: int) -> int:
    """Return the pid of the spare process, waited for."""
    found: set[int] = set()

    def one() -> bool:
        found.clear()
        found.update(children_of(nursery) - set(others))
        return len(found) == 1

    eventually(one, "a spare process waits, and it alone")
    return found.pop()


def test_the_process_that_waits_has_nothing_but_its_channel_and_clones_the_next_tenant(world: World, add: Add) -> None:
    first, second = add(), add()
    world.begin()
    world.ask("start", first.name)
    nursery, pid = nursery_of(first), world.row(first)["pid"]
    spare = _spare(nursery, pid)
    eventually(lambda: descriptors_of(spare).get("socket") == 1, "it has closed what was the nursery's")
    assert set(descriptors_of(spare)) == {"/dev/null", "socket", f"{os.environ['ISOCHAMBER_RUN']}/serve/nursery.log"}
    assert Path(f"/proc/{spare}/oom_score_adj").read_text() == "0\n"
    own = os.readlink(f"/proc/{nursery}/ns/ipc")
    eventually(lambda: os.readlink(f"/proc/{spare}/ns/ipc") != own, "it has made namespaces of its own")
    ipc = os.readlink(f"/proc/{spare}/ns/ipc")
    world.ask("start", second.name)
    tenant = world.row(second)["pid"]
    assert os.readlink(f"/proc/{tenant}/ns/ipc") == ipc  # what was made ahead has become the tenant's
    assert _spare(nursery, pid, tenant) != spare  # which has ended, and another one waits


def test_a_tenant_from_the_spare_process_is_in_all_of_its_groups_and_namespaces(world: World, add: Add) -> None:
    tenant = add(limits={"processes": 50, "memory": 1 << 28})
    world.begin()
    world.ask("start", tenant.name)
    pid, nursery = world.row(tenant)["pid"], nursery_of(tenant)
    record = records.running(tenant.tid)
    assert record is not None
    found = cgroup.trees()
    groups = cgroup.groups_of(tenant.tid, ["pids", "memory", "devices"], found)
    inside = [path for path in {*groups.v1.values(), groups.v2} if path is not None]
    assert inside
    for group in inside:
        assert str(pid) in Path(group, "cgroup.procs").read_text().split()
    for kind in ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts"):
        assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/{nursery}/ns/{kind}")


def test_what_the_host_has_mounted_since_the_process_was_forked_is_there_for_the_tenant(
    world: World, add: Add, tmp_path: Path
) -> None:
    world.begin()
    first = add(argv=["/bin/sh", "-c", "exit 0"])
    world.ask("start", first.name)
    world.ask("wait", first.name)
    ipc = tmp_path / "ipc"
    ipc.mkdir()
    (ipc / "made-later").touch()
    tenant = add(ipc=str(ipc), argv=["/bin/sh", "-c", "ls /tmp/tenant_ipc; exec sleep 1000"])
    world.ask("start", tenant.name)
    world.said(tenant, "made-later")


def test_a_start_that_is_refused_costs_the_spare_process_and_the_next_start_has_another(world: World, add: Add) -> None:
    missing, good = add(ipc="/nowhere/at/all"), add()
    world.begin()
    for _ in range(3):
        assert world.cli("start", missing.name).returncode == 125
    world.ask("start", good.name)
    assert gone(missing)
    _spare(nursery_of(good), world.row(good)["pid"])


def test_restart_gives_every_named_tenant_a_new_process(world: World, add: Add) -> None:
    first, second = add(), add(argv=STUBBORN)
    world.begin()
    world.ask("start", first.name, second.name)
    pids = [world.row(tenant)["pid"] for tenant in (first, second)]
    assert world.output("restart", "--time", "0", first.name, second.name).split() == [first.name, second.name]
    after = [world.row(tenant)["pid"] for tenant in (first, second)]
    assert not set(pids) & set(after)
    assert all(world.row(tenant)["state"] == "running" for tenant in (first, second))


def test_many_that_ignore_the_signal_are_stopped_at_once_and_nothing_is_left(world: World, add: Add) -> None:
    tenants = [add(argv=STUBBORN) for _ in range(12)]
    world.begin()
    world.ask("start", *(tenant.name for tenant in tenants))
    world.ask("stop", all=True, time=0)
    assert all(gone(tenant) for tenant in tenants)
    assert {world.row(tenant)["exit_code"] for tenant in tenants} == {137}
