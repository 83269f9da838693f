"""What a tenant may use at most is written into control groups, read back, and binds all of it from the start."""

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isochamber import paths
from isochamber.launch import cgroup, limits
from tests.build.products import eventually
from tests.launch import tenants
from tests.launch.tenants import Tenant
from tests.limits import groups

MIB = 1 << 20
ALL = {"memory": 64 * MIB, "swap": 0, "processes": 40, "cpu_weight": 50, "cpu_quota": 20000}


def _limit(tenant: Tenant, required: bool = True, **values: int) -> None:
    tenant.change(limits=values, limits_required=sorted(values) if required else [])


@pytest.mark.guest
def test_every_limit_stands_in_its_file_while_the_tenant_runs(tenant: Tenant) -> None:
    groups.require("memory", "pids", "cpu")
    _limit(tenant, False, **ALL)
    with tenant.started("echo ready; read go") as started:
        assert int(groups.read(tenant, "memory", "memory.limit_in_bytes", "memory.max")) == 64 * MIB
        assert groups.read(tenant, "pids", "pids.max", "pids.max") == "40"
        assert groups.read(tenant, "cpu", "cpu.shares", "cpu.weight") == ("512" if groups.is_v1("cpu") else "50")
        assert groups.read(tenant, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] == "20000"
        for controller in ("memory", "pids", "cpu"):
            assert started.record.pid in groups.members(tenant, controller)
    assert groups.everywhere(tenant) == []


@pytest.mark.guest
def test_disk_limits_stand_in_their_files_too(tenant: Tenant) -> None:
    groups.require("blkio")
    disk = limits.disk_of(str(tenant.root))
    if disk is None:
        pytest.skip("the state directory is on no disk of its own")
    _limit(tenant, io_read=10 * MIB, io_write=20 * MIB)
    with tenant.started("echo ready; read go"):
        if groups.is_v1("blkio"):
            assert groups.read(tenant, "blkio", "blkio.throttle.read_bps_device", "") == f"{disk} {10 * MIB}"
            assert groups.read(tenant, "blkio", "blkio.throttle.write_bps_device", "") == f"{disk} {20 * MIB}"
        else:
            assert f"rbps={10 * MIB} wbps={20 * MIB}" in groups.read(tenant, "blkio", "", "io.max")


FORK_BOMB = "my $n = 0; while ($n < 100) { my $p = fork; last if !defined $p; if (!$p) { sleep 1000 } $n++ } "


def test_a_fork_bomb_ends_at_the_limit_and_stop_takes_all_of_it(tenant: Tenant) -> None:
    groups.require("pids")
    assert int(tenant.perl(FORK_BOMB + "print $n")) == 100, "the control: without the limit"
    _limit(tenant, processes=20)
    bomb = FORK_BOMB + "print qq(ready\\n); $| = 1; print qq($n\\n); sleep 1000"
    with tenant.started(f"exec perl -e '$| = 1; {bomb}'") as started:
        assert int(started.line()) == 19
        assert len(groups.members(tenant, "pids")) == 20
        assert len(tenant.processes()) == 20
    assert tenant.processes() == []
    assert groups.everywhere(tenant) == []


EAT = "my $x = 'x' x (200 << 20); print length $x"


def test_a_memory_bomb_is_killed_and_nobody_else(tenant: Tenant) -> None:
    groups.require("memory")
    assert int(tenant.perl(EAT)) >= 200 * MIB, "the control: without the limit"
    _limit(tenant, False, memory=64 * MIB, swap=0)
    assert tenant.run("/usr/bin/perl", "-e", EAT).returncode == 128 + signal.SIGKILL
    assert tenant.output("echo runs again") == "runs again"


@pytest.mark.parametrize("where", ["/tmp", "/dev/shm"])
def test_what_fills_a_tmpfs_counts_as_memory(tenant: Tenant, where: str) -> None:
    groups.require("memory")
    tenant.change(tmpfs={"tmp": 256 * MIB, "shm": 256 * MIB})
    fill = f"dd if=/dev/zero of={where}/fill bs=1M count=150 2>/dev/null && echo filled"
    assert tenant.output(fill) == "filled", "the control: without the limit"
    _limit(tenant, False, memory=64 * MIB, swap=0)
    assert "filled" not in tenant.sh(fill).stdout


def test_a_quota_of_processor_time_throttles(tenant: Tenant) -> None:
    groups.require("cpu")
    # A third of a second of its own processor time, as the kernel accounts it.
    spin = "exec perl -e '$| = 1; print qq(ready\\n); 1 while (times)[0] < 0.3; print qq(spun\\n); sleep 1000'"
    _limit(tenant, cpu_weight=100)
    with tenant.started(spin) as started:
        assert started.line() == "spun"
        assert groups.stat(tenant, "cpu", "cpu.stat")["nr_throttled"] == 0, "the control: without the quota"
    _limit(tenant, cpu_quota=20000)
    with tenant.started(spin) as started:
        assert started.line() == "spun"
        assert groups.stat(tenant, "cpu", "cpu.stat")["nr_throttled"] > 0


def _runs(pid: int, program: bytes) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(program)
    except (FileNotFoundError, ProcessLookupError):
        return False  # it has just ended


@pytest.mark.guest
def test_what_a_tenant_starts_stays_in_its_groups_whatever_it_does(tenant: Tenant) -> None:
    groups.require("pids", "memory")
    _limit(tenant, False, **ALL)
    daemon = "setsid sh -c 'setsid sleep 1000 & exit' & wait; ls /sys/fs/cgroup | wc -l; "
    with tenant.started(f"echo ready; {daemon} cat /proc/self/cgroup | grep -v ':/$' | wc -l; read go") as started:
        assert started.line() == "0", "no control group file system is there to write to"
        assert started.line() == "0", "its own group is the root of what it sees"
        # Its shell does not wait for it to become what it is to be.
        assert eventually(lambda: any(_runs(pid, b"sleep") for pid in tenant.processes()))
        (lodger,) = [pid for pid in tenant.processes() if _runs(pid, b"sleep")]
        for controller in ("memory", "pids"):
            assert {started.record.pid, lodger} <= groups.members(tenant, controller)
    assert tenant.processes() == []


def test_a_group_that_is_removed_under_who_writes_to_it_is_gone_for_him(tenant: Tenant) -> None:
    found = cgroup.trees()
    tree = found.v2 or next(iter(found.v1.values()))
    group = Path(tree, f"{paths.cgroup_parent()}-{tenant.tid}")
    group.mkdir()
    with (group / "cgroup.procs").open("wb", buffering=0) as file:
        group.rmdir()
        with pytest.raises(FileNotFoundError):
            cgroup.write("/proc/self/fd", str(file.fileno()), "0")


def test_groups_that_were_left_behind_occupied_are_made_anew(tenant: Tenant) -> None:
    groups.require("pids")
    _limit(tenant, processes=30)
    left = groups.group(tenant, "pids")
    (left / "below").mkdir(parents=True)
    with subprocess.Popen(["sleep", "1000"]) as lodger:
        (left / "below" / "cgroup.procs").write_text(str(lodger.pid))
        assert tenant.output("echo runs") == "runs"
        assert lodger.wait(tenants.DEADLINE) == -signal.SIGKILL
    assert groups.everywhere(tenant) == []


def test_a_group_of_a_controller_that_is_no_longer_used_goes_too(tenant: Tenant) -> None:
    groups.require("pids")
    left = groups.group(tenant, "pids")
    left.mkdir(parents=True)
    tenant.change(limits={}, limits_required=[])
    assert tenant.run().returncode == 0
    assert groups.everywhere(tenant) == []


# Limits that the kernel did not take.


def _without(controller: str) -> list[str]:
    """Return words that run a command where ``controller`` is not mounted."""
    where = cgroup.trees().v1.get(controller)
    if where is None:
        pytest.skip(f"{controller} is not mounted as a v1 controller, and can't be taken away from a v2 tree")
    return ["unshare", "-m", "/bin/sh", "-c", f'umount -l {where} && exec "$@"', "sh"]


def test_a_limit_whose_controller_is_missing_is_an_error_that_names_it(tenant: Tenant) -> None:
    words = _without("pids")
    _limit(tenant, processes=30)
    assert tenant.output("echo runs") == "runs", "the control: where the controller is"
    done = tenants.run([*words, *tenant.words("/bin/echo", "must not run")])
    assert (done.returncode, done.stdout) == (125, "")
    (line,) = done.stderr.splitlines()
    for part in (tenant.name, "processes", "pids", "best_effort"):
        assert part in line
    assert groups.everywhere(tenant) == []


def test_a_default_limit_whose_controller_is_missing_stops_nobody(tenant: Tenant) -> None:
    _limit(tenant, False, processes=30)
    assert tenants.run([*_without("pids"), *tenant.words("/bin/echo", "runs")]).stdout == "runs\n"


def test_a_value_that_the_kernel_refuses_is_an_error_that_names_the_file(tenant: Tenant) -> None:
    groups.require("cpu")
    _limit(tenant, cpu_quota=10)  # microseconds: the least is 1000
    done = tenant.run("/bin/echo", "must not run")
    assert (done.returncode, done.stdout) == (125, "")
    (line,) = done.stderr.splitlines()
    assert re.search(r"cpu\.(cfs_quota_us|max)", line), line
    assert "cpu_quota" in line
    assert groups.everywhere(tenant) == []
    _limit(tenant, False, cpu_quota=10)
    assert tenant.output("echo runs") == "runs"


@pytest.mark.parametrize(
    "change",
    [{"limits": {"unheard_of": 1}}, {"limits": {"swap": 1}}, {"limits": {"memory": -1}}, {"limits": []},
     {"limits_required": [1]}],
)  # fmt: skip
def test_an_entry_with_a_wrong_limit_starts_nothing(tenant: Tenant, change: dict[str, Any]) -> None:
    tenant.change(**change)
    done = tenant.run("/bin/echo", "must not run")
    assert (done.returncode, done.stdout) == (125, "")
    assert len(done.stderr.splitlines()) == 1


# Deciding, without a kernel.

V1 = cgroup.Groups({"memory": "/m", "pids": "/p", "cpu": "/c", "blkio": "/b"}, "/u")
V2 = cgroup.Groups({}, "/u")
EVERY = {**ALL, "swap": MIB, "io_weight": 200, "io_read": 5, "io_write": 6}


def _texts(groups: cgroup.Groups, disk: str | None = "8:0", every: dict[str, int] | None = None) -> dict[str, str]:
    found = limits.settings(every or EVERY, groups, disk)
    return {f"{setting.limit} {setting.path}": setting.text or setting.why for setting in found}


def test_with_v1_controllers_the_files_are_theirs() -> None:
    assert _texts(V1) == {
        "memory /m/memory.limit_in_bytes": str(64 * MIB),
        "swap /m/memory.memsw.limit_in_bytes": str(65 * MIB),  # v1 counts both together
        "processes /p/pids.max": "40",
        "cpu_weight /c/cpu.shares": "512",
        "cpu_quota /c/cpu.cfs_quota_us": "20000",
        "io_weight /b/blkio.bfq.weight": "200",
        "io_read /b/blkio.throttle.read_bps_device": "8:0 5",
        "io_write /b/blkio.throttle.write_bps_device": "8:0 6",
    }


def test_with_a_v2_tree_alone_the_files_are_its() -> None:
    assert _texts(V2) == {
        "memory /u/memory.max": str(64 * MIB),
        "swap /u/memory.swap.max": str(MIB),
        "processes /u/pids.max": "40",
        "cpu_weight /u/cpu.weight": "50",
        "cpu_quota /u/cpu.max": "20000 100000",
        "io_weight /u/io.weight": "default 200",
        "io_read /u/io.max": "8:0 rbps=5",
        "io_write /u/io.max": "8:0 wbps=6",
    }


def test_sizes_are_rounded_as_the_kernel_rounds_them() -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    assert _texts(V2, every={"memory": 10 * page + 1}) == {"memory /u/memory.max": str(10 * page)}


def test_what_can_not_be_says_why() -> None:
    nowhere = _texts(cgroup.Groups({}, None))
    assert all("no control groups" in why for why in nowhere.values())
    assert "no disk" in _texts(V2, disk=None)["io_read None"]


def test_what_is_read_back_must_be_what_was_written(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def problem(text: str, content: str) -> str | None:
        (tmp_path / "file").write_text(content)
        return limits.problem_of(limits.Setting("x", "c", str(tmp_path / "file"), text))

    assert problem("8:0 rbps=5", "8:16 rbps=max wbps=max\n8:0 rbps=5 wbps=max\n") is None
    assert problem("20000 100000", "20000 100000\n") is None
    assert problem("default 200", "default 200\n") is None
    assert "'max' is read" in str(problem("40", "max\n"))
    assert problem("8:0 rbps=5", "8:16 rbps=5\n") is not None
    (tmp_path / "file").unlink()
    assert "has no file" in str(limits.problem_of(limits.Setting("x", "c", str(tmp_path / "file"), "1")))


def test_show_says_which_file_holds_a_limit_and_which_is_not_in_force(make_tenant: Callable[..., Tenant]) -> None:
    groups.require("pids")
    tenant = make_tenant(limits={"processes": 33, "cpu_quota": 10}, limits_required=[])
    root = str(tenant.root)
    told = dict(limits.in_force(tenant.tid, tenant.entry["limits"], root, running=False))
    assert list(told.values()) == [None, None], "before the start nothing is known of a refusal"
    with tenant.started("echo ready; read go"):
        told = dict(limits.in_force(tenant.tid, tenant.entry["limits"], root, running=True))
    (held,) = [text for text, problem in told.items() if problem is None]
    assert held == f"processes 33: {groups.group(tenant, 'pids')}/pids.max"
    (problem,) = [problem for problem in told.values() if problem is not None]
    assert "is read" in problem
