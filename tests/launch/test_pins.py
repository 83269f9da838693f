"""The pinned namespaces: made once, on demand, with the right map, and gone with the tenant."""

import os
from pathlib import Path

import pytest

from isochamber import paths
from isochamber.build import recover
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import pins, syscalls
from tests.launch import tenants
from tests.launch.tenants import Tenant


def _pins(tenant: Tenant) -> dict[str, int]:
    return {kind: os.stat(paths.namespace_pin(tenant.tid, kind)).st_ino for kind in ("user", "net")}


def _namespaces(tenant: Tenant) -> dict[str, int]:
    listing = tenant.output("readlink /proc/self/ns/user /proc/self/ns/net").split()
    return {text.partition(":")[0]: int(text.partition("[")[2].rstrip("]")) for text in listing}


@pytest.mark.guest
def test_every_start_joins_the_same_two_namespaces(tenant: Tenant) -> None:
    first = _namespaces(tenant)
    assert first == _pins(tenant)
    assert _namespaces(tenant) == first


def test_the_map_is_the_tenants_range_and_nothing_else(tenant: Tenant) -> None:
    maps = tenant.output("cat /proc/self/uid_map /proc/self/gid_map").split()
    assert maps == ["0", str(tenant.uid_base), "65536"] * 2


@pytest.mark.guest
def test_pins_that_a_reboot_forgot_are_made_again(tenant: Tenant) -> None:
    _namespaces(tenant)
    pins.remove_pins(tenant.tid)
    for kind in ("user", "net"):  # the files stay behind where the directory is no tmpfs
        Path(paths.namespace_pin(tenant.tid, kind)).touch()
    assert _namespaces(tenant) == _pins(tenant)
    assert tenant.output("cat /proc/self/uid_map").split()[1] == str(tenant.uid_base)


@pytest.mark.parametrize("kind", ["user", "net"])
def test_one_pin_that_is_missing_is_made_alone(tenant: Tenant, kind: str) -> None:
    first = _namespaces(tenant)
    kept = "net" if kind == "user" else "user"
    syscalls.umount2(paths.namespace_pin(tenant.tid, kind), syscalls.MNT_DETACH)
    second = _namespaces(tenant)
    assert second == _pins(tenant)
    assert second[kept] == first[kept]


def test_another_range_gets_another_namespace(tenant: Tenant) -> None:
    _namespaces(tenant)
    base = tenant.uid_base + 7
    for name in ("upper", "workdir"):
        os.chown(tenant.directory / name, base, base)
    tenant.change(uid_base=base)
    assert tenant.output("cat /proc/self/uid_map").split() == ["0", str(base), "65536"]
    assert tenant.output("cat /proc/sys/net/ipv4/ping_group_range").split() == ["0", "65535"]


def test_a_pin_with_a_wrong_map_is_noticed_before_anything_runs(tenant: Tenant) -> None:
    # As if another tenant's namespace had been bound there: what the map file beside it says is not believed.
    user, net = pins.ensure(tenant.tid, tenant.uid_base + 65536 * 3, 65536)
    os.close(user)
    os.close(net)
    Path(paths.namespace_pin(tenant.tid, "map")).write_text(f"{tenant.uid_base} 65536\n")
    done = tenant.run("/bin/echo", "must not run")
    assert (done.returncode, done.stdout) == (125, "")
    assert "uid_map" in done.stderr
    assert paths.namespace_pin(tenant.tid, "user") in done.stderr


def test_a_pin_of_the_wrong_kind_is_not_joined(tenant: Tenant) -> None:
    _namespaces(tenant)
    pin = paths.namespace_pin(tenant.tid, "net")
    syscalls.umount2(pin, syscalls.MNT_DETACH)
    syscalls.mount("/proc/self/ns/uts", pin, None, syscalls.MS_BIND)
    assert _namespaces(tenant) == _pins(tenant)
    assert _pins(tenant)["net"] != os.stat("/proc/self/ns/uts").st_ino


def test_the_namespaces_belong_to_the_host_so_capabilities_inside_count_for_nothing(tenant: Tenant) -> None:
    tenant.change(capabilities=["NET_ADMIN", "NET_RAW", "SYS_ADMIN"])
    raw = "use Socket; socket(R, PF_INET, SOCK_RAW, 1) ? print 'raw' : print 0 + $!"
    assert tenant.perl(raw) == "1"
    assert tenant.sh("echo 1 > /proc/sys/net/ipv4/ip_forward").returncode != 0


def test_many_at_once_make_one_pair(tenant: Tenant) -> None:
    import subprocess
    import sys

    code = (
        "import os, sys; from isochamber.launch import pins; "
        "print(*[os.fstat(fd).st_ino for fd in pins.ensure(sys.argv[1], int(sys.argv[2]), 65536)])"
    )
    words = [sys.executable, "-c", code, tenant.tid, str(tenant.uid_base)]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    outputs = {process.communicate(timeout=tenants.DEADLINE)[0] for process in processes}
    assert outputs == {"{user} {net}\n".format(**_pins(tenant))}


@pytest.mark.guest
def test_removing_leaves_no_mount_no_file_and_may_be_done_twice(tenant: Tenant) -> None:
    _namespaces(tenant)
    directory = Path(paths.namespace_pin(tenant.tid, "user")).parent
    for _ in range(2):
        pins.remove(tenant.tid)
        assert not directory.exists()
        assert tenant.tid not in Path("/proc/self/mountinfo").read_text()


def test_what_a_cut_left_of_namespaces_that_were_being_made_is_unpinned_by_the_next_doit(tenant: Tenant) -> None:
    _namespaces(tenant)
    directory = Path(paths.namespace_pin(tenant.tid, "user")).parent
    assert not pins.remove_half_made(tenant.tid), "these are whole"
    os.truncate(directory / "map", 0)  # as before the first of them is made
    assert pins.problem(tenant.tid, tenant.uid_base, tenants.UID_COUNT) is not None
    recover.clean(State(tenant.root))
    assert pins.problem(tenant.tid, tenant.uid_base, tenants.UID_COUNT) is None
    assert str(directory) not in Path("/proc/self/mountinfo").read_text()
    _namespaces(tenant)


def test_a_start_that_cannot_pin_is_one_line(tenant: Tenant) -> None:
    directory = Path(paths.namespace_pin(tenant.tid, "user")).parent
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.write_text("a file in the way")
    try:
        with pytest.raises(IsochamberError) as caught:
            pins.ensure(tenant.tid, tenant.uid_base, 65536)
        assert str(directory) in caught.value.line()
        assert tenant.run().returncode == 125
    finally:
        directory.unlink()


def test_the_limit_on_namespaces_is_named_when_it_is_reached(tenant: Tenant) -> None:
    # In a user namespace of the test's own, whose limit is 0.
    if tenants.run(["unshare", "--user", "true"]).returncode:
        pytest.skip("user_namespaces(7): the kernel makes no user namespace for who is in a chroot")
    script = 'echo 0 > /proc/sys/user/max_net_namespaces; exec "$@"'
    done = tenants.run(["unshare", "--map-root-user", "--user", "/bin/sh", "-c", script, "sh", *tenant.words()])
    assert done.returncode == 125
    assert len(done.stderr.splitlines()) == 1
