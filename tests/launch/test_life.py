"""A tenant's end, whoever brings it about: nothing of it stays, and one tenant never runs twice."""

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.launch import command, entry, pins, records, start, stop
from tests.conftest import SCRATCH
from tests.launch import tenants
from tests.launch.tenants import Started, Tenant, wait_for_end, wait_until_free

PRCTL = {"x86_64": 157, "aarch64": 167}[os.uname().machine]

# Forks away, leaves its session, and clears the death signal (prctl(2): PR_SET_PDEATHSIG) in every process.
STUBBORN = (
    f"perl -e 'use POSIX; syscall({PRCTL}, 1, 0);"
    " for (1..3) { fork or do { setsid(); $SIG{TERM} = $SIG{HUP} = q(IGNORE);"
    " close STDIN; close STDOUT; close STDERR; sleep 1 while 1 } } $| = 1; print qq(ready\\n); sleep 1 while 1'"
)


def _gone(tenant: Tenant) -> None:
    assert tenant.processes() == []
    assert not records.held(tenant.tid)
    assert not Path(paths.tenant_record(tenant.tid)).exists()
    assert tenant.group is None or not tenant.group.exists()
    assert not any(tenant.tid in target for target in tenants.host_mounts())


@pytest.mark.guest
def test_a_launcher_killed_with_kill_9_leaves_nothing_of_the_tenant(tenant: Tenant) -> None:
    before = tenants.host_mounts()
    with tenant.started(STUBBORN) as started:
        assert len(tenant.processes()) >= 4
        assert tenant.group is None or tenant.group.exists()
        started.launcher.kill()
        started.launcher.wait()
        wait_for_end(started.record.keeper)
        _gone(tenant)
    assert tenants.host_mounts() == before
    assert tenant.output("echo again") == "again"


def test_a_keeper_that_is_killed_takes_the_tenant_along_and_the_launcher_cleans_up(tenant: Tenant) -> None:
    with tenant.started(STUBBORN) as started:
        os.kill(started.record.keeper, signal.SIGKILL)
        assert started.end() == 125
        assert started.launcher.stderr is not None
        assert "its keeper was killed" in started.launcher.stderr.read()
        _gone(tenant)
    assert tenant.output("echo again") == "again"


def test_launcher_and_keeper_killed_together_leave_a_tenant_that_starts_again(tenant: Tenant) -> None:
    with tenant.started(STUBBORN) as started:
        os.kill(started.launcher.pid, signal.SIGSTOP)  # so that it can't clean up in the keeper's place
        os.kill(started.record.keeper, signal.SIGKILL)
        started.launcher.kill()
        wait_for_end(started.record.keeper)
        assert tenant.processes() == []
        assert records.running(tenant.tid) is None
    assert tenant.output("echo again") == "again"
    _gone(tenant)


@pytest.mark.guest
def test_a_frozen_tenant_dies_with_its_launcher_too(tenant: Tenant) -> None:
    if tenant.group is None:
        pytest.skip("cgroup2")
    with tenant.started(STUBBORN) as started:
        (tenant.group / "cgroup.freeze").write_text("1")
        started.launcher.kill()
        wait_for_end(started.record.keeper)
        _gone(tenant)


@pytest.mark.guest
def test_what_the_host_put_into_the_tenants_cgroup_ends_with_it(tenant: Tenant) -> None:
    group = tenant.group
    if group is None or not (group.parents[1] / "cgroup.procs").exists():
        pytest.skip("cgroup2")
    with tenant.started("echo ready; read x") as started:
        if not (group / "cgroup.kill").exists():
            pytest.skip("cgroup.kill (Linux 5.14)")
        guest = subprocess.Popen(["sleep", "1000"])
        (group / "cgroup.procs").write_text(str(guest.pid))
        started.say("end")
        assert started.end() == 1 or started.launcher.returncode == 0
        assert guest.wait(tenants.DEADLINE) == -signal.SIGKILL
        _gone(tenant)


def test_daemons_end_with_pid_1(tenant: Tenant) -> None:
    script = "perl -e 'use POSIX; for (1..3) { fork or do { setsid(); sleep 1 while 1 } }'; echo ready; read x"
    with tenant.started(script) as started:
        assert len(tenant.processes()) >= 4
        started.say("end")
        started.end()
        _gone(tenant)


def test_the_record_names_pid_1_and_its_keeper_as_the_host_sees_them(tenant: Tenant) -> None:
    with tenant.started("echo ready; read x") as started:
        record = started.record
        assert Path(f"/proc/{record.pid}/root/etc/hostname").exists()
        assert f"NSpid:\t{record.pid}\t2\t1" in Path(f"/proc/{record.pid}/status").read_text().replace("\t1\n", "\t1")
        assert Path(f"/proc/{record.keeper}/comm").read_text() == "isochamber-keep\n"
        assert record.cgroup is None or Path(record.cgroup) == tenant.group
        if tenant.group is not None:
            assert (tenant.group / "cgroup.procs").read_text().split() == [str(record.pid)]


def test_the_keeper_holds_nothing_of_the_operators(tenant: Tenant) -> None:
    with tenant.started("echo ready; read x") as started:
        fds = Path(f"/proc/{started.record.keeper}/fd")
        targets = {os.readlink(fd) for fd in fds.iterdir()}
        assert sum("pipe:" in target for target in targets) == 1  # the launcher's life
        assert {os.readlink(fds / str(number)) for number in range(3)} == {"/dev/null"}


@pytest.mark.guest
def test_a_second_start_of_a_tenant_is_refused_with_one_line_and_harms_nothing(tenant: Tenant) -> None:
    with tenant.started("echo ready; read x; echo still here") as started:
        second = tenant.run("/bin/echo", "must not run")
        assert (second.returncode, second.stdout) == (125, "")
        (line,) = second.stderr.splitlines()
        assert tenant.name in line
        assert "runs already" in line
        started.say("go on")
        assert started.line() == "still here"
        assert started.end() == 0
    assert tenant.output("echo again") == "again"


def test_of_many_starts_at_once_one_runs(tenant: Tenant) -> None:
    words = tenant.words("/bin/sh", "-c", "echo ready; read x")
    starts = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
              for _ in range(8)]  # fmt: skip
    try:
        first = [
            process for process in starts if process.stdout is not None and process.stdout.readline() == b"ready\n"
        ]
        assert len(first) == 1
        assert sorted(process.wait(tenants.DEADLINE) for process in starts if process not in first) == [125] * 7
    finally:
        for process in starts:
            process.kill()
            process.communicate()
        wait_until_free(tenant.tid)


def test_looking_at_a_tenant_never_refuses_its_start(tenant: Tenant) -> None:
    # Asking by taking the lock for a moment would.
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            records.running(tenant.tid)

    observer = threading.Thread(target=look)
    observer.start()
    try:
        for _ in range(20):
            assert tenant.run().returncode == 0
    finally:
        over.set()
        observer.join()


@pytest.mark.guest
def test_stop_ends_a_tenant_and_returns_when_nothing_is_left(tenant: Tenant) -> None:
    with tenant.started(STUBBORN) as started:
        assert stop.stop(tenant.tid) is True
        _gone(tenant)
        assert started.end() == 128 + signal.SIGKILL
    assert stop.stop(tenant.tid) is False


def test_stop_lets_a_tenant_end_in_its_own_way_first(tenant: Tenant) -> None:
    script = "trap 'echo bye; exit 5' TERM; echo ready; while read x; do :; done; sleep 1000 & wait"
    with tenant.started(script) as started:
        assert started.launcher.stdin is not None
        started.launcher.stdin.close()
        started.launcher.stdin = None
        assert stop.stop(tenant.tid, grace_seconds=tenants.DEADLINE) is True
        assert started.line() == "bye"
        assert started.end() == 5
        _gone(tenant)


def test_stop_kills_what_does_not_heed_the_term_signal(tenant: Tenant) -> None:
    with tenant.started("trap '' TERM; echo ready; read x") as started:
        begun = time.monotonic()
        assert stop.stop(tenant.tid, grace_seconds=0.2) is True
        assert time.monotonic() - begun >= 0.2
        assert started.end() == 128 + signal.SIGKILL


def test_stop_during_a_start_does_not_wait_for_the_tenants_own_end(tenant: Tenant) -> None:
    words = tenant.words("/bin/sleep", "1000")
    for _ in range(5):
        launcher = subprocess.Popen(words)
        while not stop.stop(tenant.tid):  # from before it has its lock on
            assert launcher.poll() is None
        assert launcher.wait(tenants.DEADLINE) == 128 + signal.SIGKILL
        _gone(tenant)


def test_a_stale_record_is_not_a_running_tenant(tenant: Tenant) -> None:
    lock = records.lock(tenant.tid, tenant.name)
    try:
        records.write(tenant.tid, records.Record(os.getpid(), os.getpid(), 1, None))
        assert records.held(tenant.tid)
        assert records.running(tenant.tid) is None
        own = records.Record(os.getpid(), os.getpid(), records.start_time(os.getpid()), '/with "quotes"')
        records.write(tenant.tid, own)
        found = records.running(tenant.tid)
        assert found is not None
        assert found.cgroup == '/with "quotes"'
        Path(paths.tenant_record(tenant.tid)).write_text("{")
        assert records.running(tenant.tid) is None
    finally:
        os.close(lock)
        records.forget(tenant.tid)
    assert not records.held(tenant.tid)


def test_a_lock_file_that_was_deleted_with_its_tenant_is_not_taken_for_the_new_one(tenant: Tenant) -> None:
    first = records.lock(tenant.tid, tenant.name)
    os.unlink(paths.tenant_lock(tenant.tid))
    second = records.lock(tenant.tid, tenant.name)
    assert os.fstat(first).st_ino != os.fstat(second).st_ino
    os.close(first)
    assert records.held(tenant.tid)
    os.close(second)


def test_a_lock_file_deleted_between_open_and_lock_is_not_believed(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = paths.tenant_lock(tenant.tid)
    take = records._take

    def delete_first(descriptor: int) -> bool:
        monkeypatch.setattr(records, "_take", take)
        os.unlink(path)  # as deleting the tenant does
        return take(descriptor)

    monkeypatch.setattr(records, "_take", delete_first)
    descriptor = records.lock(tenant.tid, tenant.name)
    assert os.path.samestat(os.fstat(descriptor), os.stat(path))
    os.close(descriptor)


def test_a_start_whose_tenant_is_deleted_before_it_has_the_lock_makes_nothing(tenant: Tenant) -> None:
    wanted = entry.read(str(tenant.root), tenant.name)  # while it was there still
    pins.remove(tenant.tid)
    tenant.directory.rename(tenant.directory.with_suffix(".deleted"))
    try:
        with pytest.raises(IsochamberError, match="was removed meanwhile"):
            start.Prepared(str(tenant.root), wanted, own_terminal=False)
        assert not Path(paths.namespace_pin(tenant.tid, "user")).parent.exists()
        assert not records.held(tenant.tid)
        _gone(tenant)
    finally:
        tenant.directory.with_suffix(".deleted").rename(tenant.directory)
    assert tenant.run("/bin/true").returncode == 0


def test_stop_waits_for_a_tenant_that_is_just_being_set_up(tenant: Tenant) -> None:
    lock = records.lock(tenant.tid, tenant.name)  # what a start does first
    outcome: list[bool] = []
    stopping = threading.Thread(target=lambda: outcome.append(stop.stop(tenant.tid)))
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            stopping.start()
            records.write(tenant.tid, records.Record(process.pid, process.pid, records.start_time(process.pid), None))
            assert process.wait(tenants.DEADLINE) == -signal.SIGKILL
        finally:
            process.kill()
            os.close(lock)
            stopping.join()
            records.forget(tenant.tid)
    assert outcome == [True]


@pytest.mark.guest
def test_a_cgroup_that_was_left_behind_frozen_killed_and_occupied_is_made_anew(tenant: Tenant) -> None:
    group = tenant.group
    if group is None:
        pytest.skip("cgroup2")
    tenant.run()
    group.mkdir()
    if not (group / "cgroup.kill").exists():
        pytest.skip("cgroup.kill (Linux 5.14)")
    (group / "cgroup.kill").write_text("1")
    (group / "below").mkdir()
    (group / "cgroup.freeze").write_text("1")
    with subprocess.Popen(["sleep", "1000"]) as lodger:
        (group / "below" / "cgroup.procs").write_text(str(lodger.pid))
        assert tenant.output("echo runs") == "runs"
        assert lodger.wait(tenants.DEADLINE) == -signal.SIGKILL
    _gone(tenant)


def test_without_a_cgroup2_tree_everything_but_the_group_is_the_same(tenant: Tenant) -> None:
    group = tenant.group
    if group is None:
        pytest.skip("cgroup2")
    tree = group.parents[1]
    words = ["unshare", "-m", "/bin/sh", "-c", f'umount -l {tree} && exec "$@"', "sh"]
    done = tenants.run([*words, *tenant.words("/bin/echo", "runs")])
    assert (done.stdout, done.returncode) == ("runs\n", 0), done.stderr
    launcher = subprocess.Popen([*words, *tenant.words("/bin/sh", "-c", STUBBORN)], stdout=subprocess.PIPE, text=True)
    with launcher:
        started = Started(tenant, launcher)
        assert started.record.cgroup is None
        launcher.kill()
        wait_for_end(started.record.keeper)
        _gone(tenant)


# The classic way out of a chroot for who may chroot: leave the root behind, then walk up (chroot(2), NOTES).
BREAK_OUT = (
    'mkdir "/x"; chroot "/x" or die $!; chdir ".." for 1 .. 50; chroot "."; opendir D, "/"; print sort readdir D'
)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that everybody may walk through, so that nothing but the root itself stops who walks up."""
    path = Path(tempfile.mkdtemp(prefix="isochamber-test-", dir=SCRATCH))
    path.chmod(0o755)
    yield path
    path.rmdir()


@pytest.mark.parametrize("chrooted", [False, True])
def test_a_tenant_that_may_chroot_does_not_get_out_of_its_root_even_where_the_launcher_is_in_a_chroot(
    tenant: Tenant, open_directory: Path, chrooted: bool
) -> None:
    tenant.change(capabilities=["SYS_CHROOT"], argv=["/usr/bin/perl", "-e", BREAK_OUT])
    script = f'mount --rbind / {open_directory} && exec chroot {open_directory} "$@"' if chrooted else 'exec "$@"'
    mark = Path("/") / f"isochamber-test-mark-{os.getpid()}"
    mark.touch()  # in the host's root
    try:
        done = tenants.run(["unshare", "-m", "/bin/sh", "-ec", script, "sh", *tenant.words()])
    finally:
        mark.unlink()
    assert done.returncode == 0, done.stderr
    assert mark.name not in done.stdout
    assert "etc" in done.stdout


def test_a_plan_dies_with_the_build_that_started_it(make_tenant: Callable[..., Tenant]) -> None:
    tenant = make_tenant(argv=["/bin/sh", "-c", "echo ready; sleep 1000"])
    plan = os.memfd_create("plan", 0)
    os.write(plan, json.dumps(tenant.entry).encode())
    os.lseek(plan, 0, os.SEEK_SET)
    words = command.argv("plan", "--root", str(tenant.root), "--fd", str(plan))
    # A parent that is not the test: it starts the launcher, and waits.
    build = subprocess.Popen(
        ["/bin/sh", "-c", '"$@" & wait', "sh", *words], stdout=subprocess.PIPE, text=True, pass_fds=(plan,)
    )
    os.close(plan)
    with build:
        started = Started(tenant, build)
        build.kill()
        wait_for_end(started.record.keeper)
        _gone(tenant)
