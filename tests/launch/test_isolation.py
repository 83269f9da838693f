"""What a tenant is, seen from inside and from the host: its namespaces, ids, rights, mounts and descriptors."""

import os
import platform
import re
from pathlib import Path

import pytest

from tests.launch import tenants
from tests.launch.tenants import Tenant
from tests.launch.test_verify import _launch

KINDS = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
HIGHEST_CAPABILITY = int(Path("/proc/sys/kernel/cap_last_cap").read_text())

_NUMBERS = {
    "x86_64": {
        "mount": 165, "umount2": 166, "sethostname": 170, "setdomainname": 171, "reboot": 169, "mknodat": 259,
        "pivot_root": 155, "chroot": 161, "open_by_handle_at": 304, "swapon": 167, "syslog": 103, "unshare": 272,
    },
    "aarch64": {
        "mount": 40, "umount2": 39, "sethostname": 161, "setdomainname": 162, "reboot": 142, "mknodat": 33,
        "pivot_root": 41, "chroot": 51, "open_by_handle_at": 265, "swapon": 224, "syslog": 116, "unshare": 97,
    },
}  # fmt: skip
NR = _NUMBERS.get(platform.machine(), {}) | {"fsopen": 430, "open_tree": 428, "mount_setattr": 442}

# perl: what is called, and the errno that its failure gives (0: it worked). Arguments are good unless they say
# otherwise, so that nothing but a missing right can refuse them.
PROBE = {
    "mount a tmpfs": f'my ($s, $t, $f) = ("t", "/mnt", "tmpfs"); syscall({NR["mount"]}, $s, $t, $f, 0, 0)',
    "bind": f'my ($s, $t) = ("/etc", "/mnt"); syscall({NR["mount"]}, $s, $t, 0, 4096, 0)',
    "make mounts shared": f'my $t = "/"; syscall({NR["mount"]}, 0, $t, 0, {1 << 20}, 0)',
    "remount /proc/sys writable": f'my $t = "/proc/sys"; syscall({NR["mount"]}, 0, $t, 0, {4096 | 32}, 0)',
    "unmount a mask": f'my $t = "/proc/keys"; syscall({NR["umount2"]}, $t, 2)',
    "unmount /tmp": f'my $t = "/tmp"; syscall({NR["umount2"]}, $t, 2)',
    "fsopen": f'my $f = "tmpfs"; syscall({NR["fsopen"]}, $f, 0)',
    "clone a mount": f'my $t = "/home"; syscall({NR["open_tree"]}, -100, $t, 1)',
    "set mount attributes": f'my ($t, $a) = ("/tmp", pack("QQQQ", 1, 0, 0, 0)); '
    f"syscall({NR['mount_setattr']}, -100, $t, 0, $a, 32)",
    "sethostname": f'my $n = "evil"; syscall({NR["sethostname"]}, $n, 4)',
    "setdomainname": f'my $n = "evil"; syscall({NR["setdomainname"]}, $n, 4)',
    "make a device": f'my $p = "/mnt/sda"; syscall({NR["mknodat"]}, -100, $p, {0o60600}, {8 << 8})',
    "make a memory device": f'my $p = "/mnt/mem"; syscall({NR["mknodat"]}, -100, $p, {0o20600}, {(1 << 8) | 1})',
    "chroot": f'my $p = "/mnt"; syscall({NR["chroot"]}, $p)',
    "new mount namespace": f"syscall({NR['unshare']}, {0x20000})",
    "new network namespace": f"syscall({NR['unshare']}, {0x40000000})",
}

# Not done for real, even as a control: bad arguments, and the errno that root gets past the check of rights.
PROBE_OF_RIGHTS = {
    "reboot": (f"syscall({NR['reboot']}, 1, 2, 3, 0)", "EINVAL"),
    "swapon": (f'my $p = "/nothing"; syscall({NR["swapon"]}, $p, 0)', "ENOENT"),
    "open by handle": (
        f'opendir my $d, "/etc"; my $h = pack("IiII", 8, 1, 4294967295, 7); '
        f"syscall({NR['open_by_handle_at']}, fileno $d, $h, 0)",
        "ESTALE",
    ),
    "kernel log": (f"syscall({NR['syslog']}, 9, 0, -1)", None),
}


def _perl(call: str) -> str:
    return f'use Errno; $! = 0; my $r = {_last(call)}; print $r < 0 ? (grep {{ $!{{$_}} }} keys %!)[0] : "worked"'


def _last(call: str) -> str:
    return f"do {{ {call} }}"


@pytest.mark.parametrize("attempt", PROBE)
def test_a_tenant_is_refused_what_the_hosts_root_may_do(tenant: Tenant, base: str, attempt: str) -> None:
    tenant.change(seccomp=tenants.UNFILTERED)  # by its namespaces and rights alone
    # EACCES: Landlock is asked about a device node before the right to make one is.
    assert tenant.perl(_perl(PROBE[attempt])) in ("EPERM", "EACCES" if "device" in attempt else "EPERM")
    # The control: the same as the host's root, on a copy of the machine's mounts, works.
    rootfs = tenant.root / base
    setup = (
        f"mount -t tmpfs t {rootfs}/mnt; mount -t tmpfs t {rootfs}/tmp; mount -t proc p {rootfs}/proc;"
        f"mount --rbind /dev {rootfs}/dev;"
        f"mount --bind {rootfs}/proc/sys {rootfs}/proc/sys; mount --bind {rootfs}/proc/keys {rootfs}/proc/keys"
    )
    control = ["unshare", "-muipn", "--fork", "/bin/sh", "-ec", f'{setup}; exec chroot {rootfs} /usr/bin/perl -e "$0"']
    if attempt == "make mounts shared":
        control[-1] = 'exec perl -e "$0"'  # "/" is no mount in a chroot
    done = tenants.run([*control, _perl(PROBE[attempt])])
    assert (done.stdout, done.returncode) == ("worked", 0), done.stderr


@pytest.mark.parametrize("attempt", PROBE_OF_RIGHTS)
def test_a_tenant_has_no_right_to_touch_the_machine(tenant: Tenant, attempt: str) -> None:
    call, otherwise = PROBE_OF_RIGHTS[attempt]
    tenant.change(seccomp=tenants.UNFILTERED)
    assert tenant.perl(_perl(call)) == "EPERM"
    control = tenants.run(["perl", "-e", _perl(call)]).stdout
    assert control == otherwise if otherwise else control != "EPERM"


@pytest.mark.guest
def test_every_namespace_is_the_tenants_own(tenant: Tenant) -> None:
    listing = tenant.output("for n in " + " ".join(KINDS) + "; do readlink /proc/self/ns/$n; done").splitlines()
    host = [os.readlink(f"/proc/self/ns/{kind}") for kind in KINDS]
    assert len(listing) == len(KINDS)
    assert [mine == theirs for mine, theirs in zip(host, listing, strict=True)] == [False] * len(KINDS)


@pytest.mark.guest
def test_it_is_pid_1_alone_and_its_hostname_is_its_tid(tenant: Tenant) -> None:
    seen = tenant.output("echo $$ $PPID; hostname; echo /proc/[0-9]*")
    assert seen.splitlines() == ["1 0", tenant.tid, "/proc/1"]
    assert os.uname().nodename != tenant.tid


def test_it_leads_a_session_and_a_process_group_of_its_own(tenant: Tenant) -> None:
    assert tenant.perl('print join " ", $$, getpgrp(0), (split " ", `cat /proc/1/stat`)[5]') == "1 1 1"


@pytest.mark.guest
def test_every_capability_the_kernel_knows_is_gone_from_every_set(tenant: Tenant) -> None:
    status = dict(
        re.findall(r"^(Cap\w+|NoNewPrivs|Groups):[ \t]*(.*?)[ \t]*$", tenant.output("cat /proc/1/status"), re.M)
    )
    masks = [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]
    assert masks == [0] * 5
    host = int(re.findall(r"CapBnd:\s*(\w+)", Path("/proc/self/status").read_text())[0], 16)
    assert host >> HIGHEST_CAPABILITY == 1, "the control: the host's own mask has every bit up to cap_last_cap"
    assert status["NoNewPrivs"] == "1"
    assert status["Groups"] in ("", "0")


@pytest.mark.guest
def test_a_set_uid_program_of_the_tenant_gives_nothing_back(tenant: Tenant) -> None:
    tenant.output("cp /usr/bin/perl /var/tmp/p; chown 0:0 /var/tmp/p; chmod 6755 /var/tmp/p", timeout=60)
    tenant.change(uid=1000, gid=1000)
    assert tenant.output("/var/tmp/p -e 'print \"$< $>\"'; grep CapEff /proc/self/status").split() == [
        "1000", "1000CapEff:", "0" * 16,
    ]  # fmt: skip


def test_an_entry_may_name_another_user_of_the_range(tenant: Tenant) -> None:
    tenant.change(uid=1234, gid=2345)
    assert tenant.output("id -u; id -g; id -G; echo $$").split() == ["1234", "2345", "2345", "1"]
    with tenant.started("echo ready; read x") as started:
        assert os.stat(f"/proc/{started.record.pid}").st_uid == tenant.uid_base + 1234


@pytest.mark.guest
def test_capabilities_that_an_entry_keeps_count_over_its_own_files_only(tenant: Tenant) -> None:
    attempt = "chown 5:5 /home/f; stat -c %u /home/f; mount -t tmpfs t /mnt || echo no; hostname x || echo no"
    (tenant.home / "f").touch()
    assert tenant.sh(attempt).stdout.split() == ["0", "no", "no"]
    tenant.change(capabilities=["CHOWN", "SYS_ADMIN"])
    assert tenant.sh(attempt).stdout.split() == ["5", "no", "no"]
    assert (tenant.home / "f").stat().st_uid == 5


def test_an_unknown_capability_is_our_failure(tenant: Tenant) -> None:
    tenant.change(capabilities=["FLY"])
    done = tenant.run()
    assert done.returncode == 125
    assert "FLY" in done.stderr


@pytest.mark.guest
def test_nothing_but_the_three_descriptors_is_open(tenant: Tenant) -> None:
    script = 'opendir D, "/proc/1/fd"; print join " ", sort grep { /^[0-9]+$/ && $_ != fileno D } readdir D'
    with (tenant.root / "containers.json").open() as extra:  # and one more that leaks from the operator's shell
        assert tenant.perl(script, pass_fds=(extra.fileno(),)) == "0 1 2"


def test_the_environment_is_the_entrys_and_nothing_of_the_operators(tenant: Tenant) -> None:
    tenant.change(env={"A": "b", "container": "isochamber"})
    done = tenant.run("/usr/bin/env", env={**os.environ, "SECRET": "token", "PYTHONPATH": "/nowhere"})
    assert sorted(done.stdout.splitlines()) == ["A=b", "container=isochamber"]


def test_signals_and_umask_are_as_a_fresh_process_has_them(tenant: Tenant) -> None:
    # The launcher ignores SIGPIPE as Python does, and here SIGINT and SIGHUP as nohup and a background shell do.
    script = "cat /proc/self/status; umask"
    words = ["/bin/sh", "-c", 'trap "" INT HUP; umask 077; exec "$@"', "sh", *tenant.words("/bin/sh", "-c", script)]
    done = tenants.run(words)
    status = dict(re.findall(r"^(Sig\w+):\s*(.*)$", done.stdout, re.M))
    assert [int(status[name], 16) for name in ("SigBlk", "SigIgn")] == [0, 0]
    assert done.stdout.splitlines()[-1] == "0022"


@pytest.mark.guest
def test_the_root_is_the_overlay_and_of_the_hosts_root_nothing_is_left(tenant: Tenant) -> None:
    lines = tenant.output("cat /proc/self/mountinfo").splitlines()
    roots = [line for line in lines if line.split()[4] == "/"]
    assert len(roots) == 1
    assert " - overlay " in roots[0]
    targets = {line.split()[4] for line in lines}
    assert {"/proc", "/sys", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/tmp", "/home"} <= targets
    assert not any(str(tenant.root) in target for target in targets)
    assert not any("shared:" in line or "master:" in line for line in lines), "something propagates"
    for line in lines:
        if line.split()[4] not in ("/dev", "/dev/pts", "/proc/keys") and "/dev/null" not in line:
            assert "nosuid" in line.split()[5] or line.split()[3] == "/null", line


def test_no_mount_of_the_tenants_reaches_a_host_whose_mounts_are_shared(tenant: Tenant) -> None:
    # As systemd makes every mount of a machine; here in a mount namespace of the test's own.
    tenant.change(argv=["/bin/cat", "/proc/self/mountinfo"])
    look = "cut -d' ' -f5- /proc/self/mountinfo | grep -v nsfs"
    script = f'{look} > "$0/before"; "$@"; status=$?; {look} > "$0/after"; exit $status'
    directory = str(tenant.home)
    words = ["unshare", "-m", "--propagation", "shared", "/bin/sh", "-c", script, directory, *tenant.words()]
    done = tenants.run(words)
    assert done.returncode == 0, done.stderr
    assert "shared:" not in done.stdout
    assert "master:" not in done.stdout
    before, after = ((tenant.home / name).read_text() for name in ("before", "after"))
    assert "shared:" in before, "the control: this host's mounts are"
    assert after == before


@pytest.mark.guest
def test_dot_dot_ends_at_the_root(tenant: Tenant) -> None:
    host = Path("/").stat()
    inside = tenant.output(
        "cd /; stat -c %d:%i ../../../..; stat -c %d:%i /; cd -P /proc/self/cwd/..; stat -c %d:%i ."
    ).split()
    assert len(set(inside)) == 1
    assert inside[0] != f"{host.st_dev}:{host.st_ino}"


@pytest.mark.guest
def test_proc_shows_the_tenant_and_takes_no_settings(tenant: Tenant) -> None:
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    attempts = (
        "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sys/net/ipv4/ip_forward",
        "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity", "/sys/kernel/uevent_helper",
        "/sys/power/state", "/proc/1/oom_score_adj_not",
    )  # fmt: skip
    for path in attempts:
        done = tenant.sh(f"echo x > {path}")
        assert done.returncode != 0, path
        assert re.search("Read-only|denied|nonexistent|No such|Directory", done.stderr), done.stderr
    assert Path("/proc/sys/kernel/core_pattern").read_text() == before


def test_proc_sys_stays_read_only_for_a_tenant_with_every_capability_in_its_own_user_namespace(tenant: Tenant) -> None:
    from isochamber.launch import capabilities

    tenant.change(capabilities=list(capabilities._NAMES[: HIGHEST_CAPABILITY + 1]), seccomp=tenants.UNFILTERED)
    done = tenant.sh("echo evil > /proc/sys/kernel/hostname; hostname; umount /proc/sys; umount /proc/keys; echo end")
    assert done.stdout.split() == [tenant.tid, "end"]
    for attempt, call in PROBE.items():
        if attempt not in (
            "chroot",
            "new mount namespace",
            "new network namespace",
        ):  # these are its own
            assert tenant.perl(_perl(call)) in ("EPERM", "EACCES"), attempt


@pytest.mark.parametrize(
    "path", ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/kallsyms", "/proc/interrupts"]
)
def test_what_tells_of_the_host_is_hidden(tenant: Tenant, path: str) -> None:
    if not Path(path).exists():
        pytest.skip(f"this kernel has no {path}")
    assert tenant.output(f"test -c {path} && wc -c < {path}") == "0"


@pytest.mark.guest
def test_directories_that_tell_of_the_host_are_empty_and_read_only(tenant: Tenant) -> None:
    for path in ("/proc/acpi", "/proc/scsi", "/sys/firmware"):
        if Path(path).is_dir():
            assert tenant.output(f"ls -A {path}") == ""
            assert tenant.sh(f"touch {path}/x").returncode != 0


@pytest.mark.guest
def test_dev_is_fresh_and_holds_only_harmless_devices(tenant: Tenant) -> None:
    listing = tenant.output("cd /dev; for n in *; do stat -c '%n %F %t:%T %a' $n; done").splitlines()
    devices = {line for line in listing if "special" in line}
    assert devices == {
        "full character special file 1:7 666", "null character special file 1:3 666",
        "random character special file 1:8 666", "tty character special file 5:0 666",
        "urandom character special file 1:9 666", "zero character special file 1:5 666",
    }  # fmt: skip
    assert tenant.output(
        "echo x > /dev/null; head -c 4 /dev/zero | wc -c; ls /dev/pts; readlink /dev/fd /dev/ptmx"
    ) == ("4\nptmx\n/proc/self/fd\npts/ptmx")
    assert tenant.perl('open(my $m, "+<", "/dev/ptmx") or die $!; print "terminal"') == "terminal"


@pytest.mark.guest
def test_tmp_and_shm_are_fresh_bounded_and_nobodys_else(tenant: Tenant) -> None:
    tenant.change(tmpfs={"tmp": 1 << 20, "shm": 1 << 19})
    for path, size in (("/tmp", 1 << 20), ("/dev/shm", 1 << 19)):
        done = tenant.sh(f"head -c {2 * size} /dev/zero > {path}/big; stat -c %s {path}/big; stat -c %a:%u {path}")
        assert done.stdout.split() == [str(size), "1777:0"]
        assert "No space" in done.stderr
        assert tenant.output(f"ls -A {path}") == "", "it is fresh at every start"


@pytest.mark.guest
def test_the_network_is_a_loopback_that_is_up_and_low_ports_and_ping_need_no_capability(tenant: Tenant) -> None:
    seen = tenant.output("ls /sys/class/net; cat /sys/class/net/lo/operstate; cat /proc/net/dev | wc -l")
    assert seen.split() == ["lo", "unknown", "3"]
    listen = (
        "use Socket; my $here = sockaddr_in(80, INADDR_LOOPBACK);"
        "socket S, PF_INET, SOCK_STREAM, 0; bind(S, $here) or die $!; listen S, 1;"
        "socket C, PF_INET, SOCK_STREAM, 0; connect(C, $here) or die $!; print 'connected;';"
        "socket(P, PF_INET, SOCK_DGRAM, 1) or die $!; print 'ping'"
    )
    assert tenant.perl(listen) == "connected;ping"
    raw = "use Socket; socket(R, PF_INET, SOCK_RAW, 1) ? print 'raw' : print 0 + $!"
    assert tenant.perl(raw) == "1"


def test_the_hosts_abstract_sockets_and_loopback_are_out_of_reach(tenant: Tenant) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as abstract, socket.socket() as tcp:
        abstract.bind(f"\0isochamber-test-{os.getpid()}")
        abstract.listen()
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        attempt = (
            "use Socket; socket A, PF_UNIX, SOCK_STREAM, 0; "
            f'print connect(A, pack("Sa*", 1, "\\0isochamber-test-{os.getpid()}")) ? "reached" : "refused";'
            f"socket T, PF_INET, SOCK_STREAM, 0; my $there = sockaddr_in({tcp.getsockname()[1]}, INADDR_LOOPBACK);"
            'print connect(T, $there) ? "reached" : "refused"'
        )
        assert tenant.perl(attempt) == "refusedrefused"
        # The control: on the host's network, and without Landlock, which scopes abstract sockets too.
        tenant.change(network="host")
        control = _launch(tenant, "start.landlock.apply = lambda **more: None", argv=["/usr/bin/perl", "-e", attempt])
        assert control.stdout == "reachedreached", control.stderr


def test_system_v_shared_memory_of_the_host_is_not_there(tenant: Tenant) -> None:
    made = tenants.run(["ipcmk", "-M", "4096"])
    number = re.findall(r"\d+", made.stdout)[0]
    try:
        assert number in Path("/proc/sysvipc/shm").read_text()
        assert len(tenant.output("cat /proc/sysvipc/shm").splitlines()) == 1
    finally:
        tenants.run(["ipcrm", "-m", number])


def test_nobody_of_the_host_can_be_signalled(tenant: Tenant) -> None:
    assert tenant.perl(f'print kill(0, {os.getpid()}) ? "reached" : 0 + $!') == "3"
    # -1 reaches everything that is visible: nothing.
    assert tenant.perl("kill 9, -1; print 'still here'") == "still here"


@pytest.mark.guest
def test_resource_limits_are_set_and_cannot_be_raised(tenant: Tenant) -> None:
    tenant.change(rlimits={"NOFILE": 123, "CORE": 0})
    seen = tenant.sh("ulimit -n; ulimit -Hn; ulimit -c; ulimit -n 124; ulimit -Hn 200; ulimit -n")
    assert seen.stdout.split()[:3] == ["123", "123", "0"]
    assert "200" not in seen.stdout


def test_an_unknown_resource_limit_is_our_failure(tenant: Tenant) -> None:
    tenant.change(rlimits={"NOTHING": 1})
    done = tenant.run()
    assert done.returncode == 125
    assert "NOTHING" in done.stderr


def test_the_host_network_comes_with_its_resolver_read_only(tenant: Tenant) -> None:
    host = Path("/etc/resolv.conf")
    if not host.is_file():
        pytest.skip("this host has no /etc/resolv.conf")
    tenant.change(network="host")
    done = tenant.sh(
        "readlink /proc/self/ns/net; cat /etc/resolv.conf; echo evil >> /etc/resolv.conf; grep resolv /proc/mounts"
    )
    net, _, rest = done.stdout.partition("\n")
    assert net == os.readlink("/proc/self/ns/net")
    assert rest.startswith(host.read_text())
    assert " ro," in rest.splitlines()[-1]
    assert "cannot create" in done.stderr


def test_the_shell_has_the_hosts_network_and_the_rights_to_repair_the_tenants_files(tenant: Tenant) -> None:
    words = tenant.words(options=("--shell",))
    script = (
        "id -u; readlink /proc/self/ns/net; chown 7 /home; stat -c %u /home; echo problem >&2; mount -t tmpfs t /mnt\n"
    )
    done = tenants.run(words, stdin=None, input=script)
    assert done.stdout.split() == ["0", os.readlink("/proc/self/ns/net"), "7"]
    assert "problem" in done.stderr, "its messages are shown"
    assert done.returncode == 32
    assert tenant.home.stat().st_uid == 7


def test_the_shell_takes_a_command_and_manages_without_bash(tenant: Tenant) -> None:
    assert tenant.run("/bin/echo", "instead", options=("--shell",)).stdout == "instead\n"
    tenant.output("rm /bin/bash", timeout=60)
    done = tenants.run(tenant.words(options=("--shell",)), stdin=None, input="echo plain $0\n")
    assert done.stdout == "plain /bin/sh\n"
