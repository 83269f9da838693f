"""Who owns what: 0-based on disk for what is shared and for /home, the tenant's range for what it may write."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.tenants import Tenant


@pytest.mark.guest
def test_a_file_of_the_tenants_root_is_host_roots_in_home_and_the_ranges_in_the_upper(tenant: Tenant) -> None:
    tenant.output("touch /home/mine /var/mine; install -o 33 -g 34 /dev/null /nothing 2>/dev/null || true")
    assert (tenant.home / "mine").stat().st_uid == 0
    assert (tenant.upper / "var/mine").stat().st_uid == tenant.uid_base


def test_other_ids_of_the_range_are_shifted_the_same_way(tenant: Tenant) -> None:
    tenant.change(uid=33, gid=34)
    for directory in (tenant.home, tenant.upper):
        directory.chmod(0o777)
    tenant.output("touch /home/mine /mine")
    on_disk = [(tenant.home / "mine").stat(), (tenant.upper / "mine").stat()]
    assert [(status.st_uid, status.st_gid) for status in on_disk] == [
        (33, 34), (tenant.uid_base + 33, tenant.uid_base + 34),
    ]  # fmt: skip


def test_what_the_operator_drops_into_home_appears_at_once_and_is_the_tenants(tenant: Tenant) -> None:
    with tenant.started("echo ready; read x; stat -c %u:%g:%a /home/drop; cat /home/drop") as started:
        (tenant.home / "drop").write_text("news\n")
        (tenant.home / "drop").chmod(0o600)
        started.say("now")
        assert [started.line(), started.line()] == ["0:0:600", "news"]


@pytest.mark.guest
def test_the_base_is_seen_as_the_tenants_own_and_is_never_changed(tenant: Tenant, base: str) -> None:
    rootfs = tenant.root / base
    before = _fingerprint(rootfs)
    seen = tenant.output(
        "stat -c %u:%g /bin/sh /etc/shadow; echo evil >> /etc/passwd; rm -r /usr/share/doc; chmod 777 /etc/shadow;"
        "mv /etc/hostname /etc/moved; tail -n1 /etc/passwd; ls /usr/share | grep -c ^doc$ || true; touch /bin/new"
    )
    assert seen.split() == ["0:0", "0:42", "evil", "0"]
    assert _fingerprint(rootfs) == before
    again = tenant.output("tail -n1 /etc/passwd; stat -c %a /etc/shadow; ls /etc/moved /bin/new")
    assert again.split() == ["evil", "777", "/bin/new", "/etc/moved"], "its root file system is its own to keep"


def test_a_set_uid_file_of_a_tenant_is_never_the_hosts_roots_within_reach_of_a_user(tenant: Tenant) -> None:
    tenant.output("cp /bin/true /home/suid; chmod 4755 /home/suid; cp /bin/true /suid; chmod 4755 /suid")
    assert (tenant.upper / "suid").stat().st_uid == tenant.uid_base
    assert tenant.output("grep -c ' /home .*nosuid,nodev' /proc/mounts") == "1"


@pytest.mark.guest
def test_two_tenants_on_one_base_see_nothing_of_each_other(make_tenant: Callable[..., Tenant]) -> None:
    first, second = make_tenant(), make_tenant()
    assert first.uid_base != second.uid_base
    with (
        first.started("echo first > /var/mark; echo mine > /home/mark; echo ready; read x") as one,
        second.started(
            "echo second > /var/mark; echo ready; read x; ls /home; cat /var/mark; echo /proc/[0-9]*"
        ) as two,
    ):
        assert one.record.pid != two.record.pid
        two.say("now")
        assert [two.line(), two.line()] == ["second", "/proc/1"]
        assert two.end() == 0
    assert (first.upper / "var/mark").read_text() == "first\n"
    assert not (second.home / "mark").exists()


@pytest.mark.guest
def test_a_layer_lies_above_the_base_and_is_read_only_too(tenant: Tenant, base: str) -> None:
    layer = tenant.root / f"layers/{tenant.tid}/rootfs"
    (layer / "etc").mkdir(parents=True)
    (layer / "etc/hostname").write_text("from the layer\n")
    os.mknod(layer / "etc/motd", 0o20000, os.makedev(0, 0))  # a whiteout
    tenant.change(lowers=[f"layers/{tenant.tid}/rootfs", base])
    seen = tenant.output(
        "cat /etc/hostname; stat -c %u /etc/hostname; ls /etc/motd 2>/dev/null || echo gone; rm /etc/hostname"
    )
    assert seen.splitlines() == ["from the layer", "0", "gone"]
    assert (layer / "etc/hostname").read_text() == "from the layer\n"
    assert not (layer / "etc/hostname").stat().st_uid


def _fingerprint(tree: Path) -> str:
    """Digest of names, types, modes, owners, sizes, times and link counts of a whole tree."""
    digest = hashlib.sha256()
    for directory, names, files in os.walk(tree):
        names.sort()
        for name in sorted([*names, *files]):
            status = os.lstat(f"{directory}/{name}")
            digest.update(
                f"{directory}/{name} {status.st_ino} {status.st_mode} {status.st_uid}:{status.st_gid} {status.st_size} "
                f"{status.st_nlink} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode("utf-8", "surrogateescape")
            )
    return digest.hexdigest()
