"""Capabilities, another user, devices and a read-only root: given where they count, and nothing beside them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isochamber.errors import SpecError
from isochamber.launch import capabilities, cgroup, devicegroup
from isochamber.spec import grants, load
from tests.launch import tenants
from tests.launch.tenants import Tenant
from tests.limits import groups

SETS = "grep -h '^Cap' /proc/self/status | cut -f2 | sort -u"


# Capabilities.


@pytest.mark.parametrize(
    ("name", "attempt"),
    [
        ("CHOWN", "touch /tmp/f && chown 7:7 /tmp/f"),
        ("SETUID", "perl -e '$> = $< = 7; exit($> != 7)'"),
        ("SETGID", "perl -e '$) = $( = 7; exit((split / /, $))[0] != 7)'"),
        ("KILL", "perl -e 'my $p = fork; if (!$p) { sleep 1000 } exit !kill 9, $p'"),
        ("SYS_CHROOT", "chroot / true"),
        ("FOWNER", "touch -d @1 /var/other"),
        ("DAC_OVERRIDE", "echo x > /var/other"),
        ("DAC_READ_SEARCH", "cat /var/other"),
    ],
)
def test_a_granted_capability_counts_over_the_tenants_own(tenant: Tenant, name: str, attempt: str) -> None:
    other = tenant.upper / "var"
    other.mkdir(0o755)
    os.chown(other, tenant.uid_base, tenant.uid_base)
    (other / "other").touch(0o600)
    os.chown(other / "other", tenant.uid_base + 9, tenant.uid_base + 9)
    if name != "KILL":  # over processes of one's own ids nobody needs it
        assert tenant.sh(attempt).returncode != 0, "the control: without it"
    tenant.change(capabilities=[name])
    done = tenant.sh(attempt)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("user", [0, 1000])
def test_all_five_sets_hold_exactly_what_was_granted(tenant: Tenant, user: int) -> None:
    tenant.change(capabilities=["CHOWN", "SETGID", "SETUID"], uid=user, gid=user)
    assert tenant.output(SETS) == f"{capabilities.mask(['CHOWN', 'SETGID', 'SETUID']):016x}"
    tenant.change(capabilities=[])
    assert tenant.output(SETS) == "0" * 16


def test_a_granted_capability_counts_for_nothing_of_the_hosts(tenant: Tenant) -> None:
    tenant.change(capabilities=list(grants.CAPABILITIES))
    for attempt in (
        "hostname other", "mount -t tmpfs t /mnt", "umount /proc", "mknod /tmp/null c 1 3",
        "chown 0:0 /sys", "echo x > /proc/sys/kernel/core_pattern", "chroot /proc/1/root/../..  ls /tmp/tenant_ipc",
    ):  # fmt: skip
        assert tenant.sh(attempt).returncode != 0, attempt


@pytest.mark.parametrize("name", sorted(set(capabilities._NAMES) - set(grants.CAPABILITIES)))
def test_a_capability_that_can_not_count_is_refused_with_its_place_and_what_to_use(tmp_path: Path, name: str) -> None:
    (line,) = _problems(tmp_path, f"    capabilities: [CHOWN, {name}]\n")
    assert line.startswith(f"{tmp_path}/tenants.yaml:4:27: x: capabilities: {name} ")
    assert name in line
    assert "can't" in line


@pytest.mark.parametrize("name", ["cap_chown", "CAP_CHOWN", "chown"])
def test_another_spelling_is_told_the_right_one(tmp_path: Path, name: str) -> None:
    (line,) = _problems(tmp_path, f"    capabilities: [{name}]\n")
    assert "written CHOWN" in line


def _problems(tmp_path: Path, grant: str, config: str = "") -> list[str]:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text(f'{{"cname": "x", "init": "/bin/true"{config}}}')
    (tmp_path / "tenants.yaml").write_text(f"tenants:\n  x:\n    package: x\n{grant}")
    try:
        load.load(tmp_path / "tenants.yaml", root=tmp_path / "state")
    except SpecError as error:
        return error.lines()
    return []


# Another user.


def test_a_program_that_is_not_root_owns_its_home_and_nothing_else(tenant: Tenant) -> None:
    tenant.change(uid=1000, gid=1001)
    assert tenant.output("id -u; id -g; id -G").split() == ["1000", "1001", "1001"]
    assert tenant.output("echo mine > /home/file && stat -c %u:%g /home/file") == "1000:1001"
    assert (tenant.home / "file").stat().st_uid == 1000
    assert tenant.sh("touch /etc/file").returncode != 0
    tenant.change(uid=0, gid=0)
    assert tenant.output("touch /etc/file && stat -c %u /home") == "0", "the control: as root"


@pytest.mark.parametrize(
    ("text", "wanted"), [("7", (7, 7)), ('"7"', (7, 7)), ('"7:8"', (7, 8)), ("0", (0, 0)), ("65534", (65534, 65534))]
)
def test_user_is_a_number_or_two(tmp_path: Path, text: str, wanted: tuple[int, int]) -> None:
    assert _problems(tmp_path, "", f', "user": {text}') == []
    spec = load.load(tmp_path / "tenants.yaml", root=tmp_path / "state")
    assert spec.tenants["x"].package.user == wanted


@pytest.mark.parametrize("text", ["-1", "65535", '"a"', '"1:"', '":1"', '"1:2:3"', '"01"', "true", "1.5", '"65535"'])
def test_another_user_is_a_line(tmp_path: Path, text: str) -> None:
    (line,) = _problems(tmp_path, "", f', "user": {text}')
    assert "config.json:1:" in line


# A read-only root.


@pytest.mark.guest
def test_a_read_only_root_leaves_home_and_tmp_to_write_to(tenant: Tenant) -> None:
    attempts = "for d in / /etc /usr/bin /var /home /tmp /dev/shm; do touch $d/f 2>/dev/null && echo $d; done; true"
    assert tenant.output(attempts).split() == ["/", "/etc", "/usr/bin", "/var", "/home", "/tmp", "/dev/shm"]
    tenant.change(read_only=True)
    assert tenant.output(attempts).split() == ["/home", "/tmp", "/dev/shm"]
    assert tenant.sh("mount -o remount,rw /").returncode != 0


# Devices.


def _device() -> Path:
    """Return a device that no tenant has, and that opens without harm."""
    for name in ("/dev/loop-control", "/dev/fuse"):
        if Path(name).is_char_device():
            return Path(name)
    pytest.skip("this machine has no device to try")


def test_a_granted_device_is_there_and_opens(tenant: Tenant) -> None:
    device = _device()
    assert tenant.sh(f"test -e {device}").returncode != 0, "the control: without the grant"
    tenant.change(devices=[{"path": str(device), "read_only": False}])
    assert tenant.sh(f"test -c {device} && exec 3<> {device}").returncode == 0
    tenant.change(uid=1000, gid=1000)
    assert tenant.sh(f"exec 3<> {device}").returncode == 0


def test_a_device_that_is_granted_to_read_is_not_written_whatever_the_tenant_may(tenant: Tenant) -> None:
    device = _device()
    tenant.change(devices=[{"path": str(device), "read_only": True}], capabilities=list(grants.CAPABILITIES))
    assert tenant.sh(f"exec 3< {device}").returncode == 0, "the control: reading"
    for attempt in (f"exec 3> {device}", f"chmod 666 {device}", f"chown 0 {device}"):
        assert tenant.sh(attempt).returncode != 0, attempt


def test_a_device_below_a_directory_and_behind_a_link_keeps_its_path(tenant: Tenant, tmp_path: Path) -> None:
    device = _device()
    link = Path("/dev/isochamber-test/by-id/it")
    link.parent.mkdir(parents=True)
    try:
        link.symlink_to(device)
        tenant.change(devices=[{"path": str(link), "read_only": False}])
        assert tenant.sh(f"test -c {link} && exec 3<> {link}").returncode == 0
    finally:
        link.unlink()
        link.parent.rmdir()
        link.parent.parent.rmdir()


@pytest.mark.parametrize("path", ["/dev/there-is-none", "/dev/shm"])
def test_a_grant_of_what_is_no_device_is_one_line(tenant: Tenant, path: str) -> None:
    tenant.change(devices=[{"path": path, "read_only": False}])
    done = tenant.run("/bin/echo", "must not run")
    assert (done.returncode, done.stdout) == (125, "")
    (line,) = done.stderr.splitlines()
    assert path in line
    assert groups.everywhere(tenant) == []


@pytest.mark.parametrize(
    "item", ["/etc/passwd", "/dev/", "/dev/../etc/passwd", "/dev/null", "/dev/pts/0", "/dev/fd/0", "/dev/a//b",
             "ttyUSB0", "{}", "{path: /dev/x, mode: rw}", "{path: /etc/x}", "7"],
)  # fmt: skip
def test_a_path_that_can_be_no_grant_is_refused_with_its_place(tmp_path: Path, item: str) -> None:
    lines = _problems(tmp_path, f"    devices: [{item}]\n")
    assert lines
    assert all(line.startswith(f"{tmp_path}/tenants.yaml:4:") for line in lines), lines


def test_grants_reach_the_spec(tmp_path: Path) -> None:
    grant = (
        "    capabilities: [SETUID, CHOWN]\n    devices: [/dev/ttyUSB0, {path: /dev/serial/by-id/x, read_only: true}]\n"
        "    filesystem: {read_only: true}\n"
    )
    assert _problems(tmp_path, grant) == []
    (tenant,) = load.load(tmp_path / "tenants.yaml", root=tmp_path / "state").tenants.values()
    assert tenant.capabilities == ("CHOWN", "SETUID")
    assert [(device.path, device.read_only) for device in tenant.devices] == [
        ("/dev/ttyUSB0", False), ("/dev/serial/by-id/x", True),
    ]  # fmt: skip
    assert tenant.read_only


OPEN = "echo ready; read go; (exec 3< /dev/smuggled) 2>/dev/null && echo opened || echo denied; read end"


def _smuggle(started: tenants.Started) -> str:
    """Put a node of a device that was not granted into a running tenant's /dev, as only the host can, and try it."""
    inside = Path(f"/proc/{started.record.pid}/root/dev/smuggled")
    os.mknod(inside, 0o666 | 0o020000, os.stat(_device()).st_rdev)
    inside.chmod(0o666)
    started.say("go")
    return started.line()


def test_a_node_that_got_into_a_tenant_does_not_open(tenant: Tenant) -> None:
    if "devices" not in cgroup.trees().v1:
        pytest.skip("there is no v1 devices controller: the next test's program does it")
    with tenant.started(OPEN) as started:
        assert _smuggle(started) == "denied"
    with tenant.started(OPEN) as started:
        (groups.group(tenant, "devices") / "devices.allow").write_text("a")
        assert _smuggle(started) == "opened", "the control: without the rules"


def _hidden(tenant: Tenant, monkeypatch: pytest.MonkeyPatch, *mounts: str) -> None:
    """Start the tenant where cgroup file systems are not mounted."""
    take_away = " && ".join(f"umount -l {mount}" for mount in mounts)
    words = tenant.words

    def without(*rest: str, **more: Any) -> list[str]:
        return ["unshare", "-m", "/bin/sh", "-c", f'{take_away or "true"} && exec "$@"', "sh", *words(*rest, **more)]

    monkeypatch.setattr(tenant, "words", without)


@pytest.mark.guest
def test_on_cgroup_v2_a_program_denies_the_same(
    make_tenant: Callable[..., Tenant], monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = cgroup.trees()
    if trees.v2 is None:
        pytest.skip("there is no cgroup v2 tree")
    v1 = [trees.v1["devices"]] if "devices" in trees.v1 else []
    device = _device()
    tenant = make_tenant(devices=[{"path": str(device), "read_only": True}])
    _hidden(tenant, monkeypatch, *v1)
    with tenant.started(
        f"exec 3< {device} && exec 3<&- && {OPEN.replace('3< /dev/smuggled', '3> /dev/smuggled')}"
    ) as it:
        if devicegroup.in_force(cgroup.groups_of(tenant.tid, [], trees)) is None:
            pytest.skip("this kernel has no device programs for control groups (CONFIG_CGROUP_BPF)")
        assert _smuggle(it) == "denied", "it may be read, and not written, by whatever node"
    tenant.change(devices=[])
    with tenant.started(OPEN) as it:
        assert _smuggle(it) == "denied"
        assert tenant.processes()
    if not v1:
        return  # the v2 tree can't be taken away from a machine that has nothing else
    _hidden(tenant, monkeypatch, trees.v2)
    with tenant.started(OPEN) as it:
        assert _smuggle(it) == "opened", "the control: without either"


def test_the_usual_nodes_and_terminals_work_under_the_rules(tenant: Tenant) -> None:
    script = (
        "for n in null zero full random urandom; do exec 3< /dev/$n; done; echo x > /dev/null; "
        "perl -e 'open(my $m, q(+<), q(/dev/ptmx)) or die; print qq(terminal\\n)'; rm -f /etc/hostname && touch /etc/x"
    )
    assert tenant.output(script) == "terminal"
