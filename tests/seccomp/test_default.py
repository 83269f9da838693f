"""What no tenant needs is refused in every tenant; with the filter taken off each attempt reaches the kernel."""

import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from isochamber.build import filters
from isochamber.build.state import State
from isochamber.spec import arguments, policy
from tests.docs.pages import page
from tests.launch import tenants
from tests.seccomp import probes, tables
from tests.seccomp.probes import HIGH, SIGSYS, Probe

MakeProbe = Callable[..., Probe]

# A new user namespace last: it takes the rights over the others away.
ROWS = sorted(
    (row for row in policy.DENIED.values() if probes.number(row.call) >= 0),
    key=lambda row: (row.call == "unshare", row.name.endswith(":CLONE_NEWUSER"), row.name),
)
NAMES = [row.name for row in ROWS]
CALLS = [probes.call_of(row) for row in ROWS]


@pytest.mark.guest
def test_every_row_is_refused_in_a_tenant_with_the_errno_it_names(probe: MakeProbe) -> None:
    results = probe().results(*CALLS)
    assert dict(zip(NAMES, results, strict=True)) == {row.name: row.errno for row in ROWS}


def test_the_filter_alone_refuses_every_row_to_the_hosts_root_whom_the_kernel_would_serve(
    probe_program: Path, launch_root: Path
) -> None:
    """The control of each row: every right, no namespace of a tenant, one guard."""
    tenants.FILTERS.ensure(State(launch_root))
    loaded = [State(launch_root).filter(program.digest()) for program in tenants.FILTERS.programs]
    with_filter = dict(zip(NAMES, probes.as_hosts_root(probe_program, CALLS, loaded), strict=True))
    without = dict(zip(NAMES, probes.as_hosts_root(probe_program, CALLS), strict=True))
    assert with_filter == {row.name: row.errno for row in ROWS}
    served = {name for name in NAMES if without[name] not in (with_filter[name], "ENOSYS")}
    # What this kernel was built without, or has dropped: said by the kernel, and no proof of the filter.
    missing = set(NAMES) - served
    chroot = tenants.run(["unshare", "--user", "true"]).returncode != 0
    for name in missing:
        # user_namespaces(7): the kernel itself makes none for who is in a chroot.
        own = "EPERM" if chroot and name.endswith(":CLONE_NEWUSER") else "ENOSYS"
        assert without[name] == own, f"{name}: {without[name]}"
    assert len(served) > 0.8 * len(NAMES), sorted(missing)


def test_what_is_open_to_every_user_would_reach_the_kernel_from_a_tenant_without_the_filter(probe: MakeProbe) -> None:
    open_to_all = [row for row in ROWS if row.approvable and row.call not in ("unshare", "clone", "setns")]
    calls = [probes.call_of(row) for row in open_to_all]
    unfiltered = probe(seccomp=tenants.UNFILTERED).results(*calls)
    arrived = [row.name for row, result in zip(open_to_all, unfiltered, strict=True) if result != row.errno]
    for name in ("io_uring_setup", "userfaultfd", "add_key", "ioctl:TIOCSTI", "socket:AF_ALG", "socket:AF_VSOCK"):
        if unfiltered[[row.name for row in open_to_all].index(name)] != "ENOSYS":
            assert name in arrived
    assert probe().results(*calls) == [row.errno for row in open_to_all]


@pytest.mark.guest
def test_the_high_half_of_an_argument_changes_nothing(probe: MakeProbe) -> None:
    # CVE-2019-10063: the kernel looks at 32 bits of an ioctl's number, so a filter that compares 64 sees another one.
    rows = [row for row in ROWS if row.conditions]
    calls = [probes.call_of(row, extra=HIGH) for row in rows]
    assert probe().results(*calls) == [row.errno for row in rows]
    sticky = ("ioctl", 0, arguments.IOCTLS["TIOCSTI"] | HIGH, 1)
    assert probe(seccomp=tenants.UNFILTERED).results(sticky) != ["EPERM"], "the control: it arrives"


def test_other_uses_of_the_same_calls_are_not_refused(probe: MakeProbe) -> None:
    families, protocols = arguments.FAMILIES, arguments.PROTOCOLS
    calls = [
        ("socket", families["AF_UNIX"], 1, 0), ("socket", families["AF_INET"], 1, protocols["IPPROTO_TCP"]),
        ("socket", families["AF_INET6"] | HIGH, 2, 0), ("socket", families["AF_NETLINK"], 3, 0),
        ("socket", families["AF_INET"], 2, protocols["IPPROTO_ICMP"]),
        ("unshare", arguments.CLONE_FLAGS["CLONE_FILES"]), ("ioctl", 1, arguments.IOCTLS["FIONBIO"], 0),
        ("memfd_create", 1, 0), ("getuid",),
    ]  # fmt: skip
    expected = ["worked", "worked", "worked", "worked", "worked", "worked", "EFAULT", "EFAULT", "worked"]
    assert probe().results(*calls) == expected


@pytest.mark.guest
def test_netlink_is_for_asking_about_the_network_only(probe: MakeProbe) -> None:
    netlink = arguments.FAMILIES["AF_NETLINK"]
    others = {"NETLINK_SOCK_DIAG": 4, "NETLINK_AUDIT": 9, "NETLINK_NETFILTER": 12, "NETLINK_KOBJECT_UEVENT": 15}
    calls = [("socket", netlink, 3, protocol) for protocol in others.values()]
    assert probe().results(*calls) == ["EPROTONOSUPPORT"] * len(calls)
    assert probe(seccomp=tenants.UNFILTERED).results(calls[1], calls[3]) == ["worked", "worked"]


@pytest.mark.guest
def test_calls_that_nobody_has_looked_at_do_not_exist(probe: MakeProbe) -> None:
    unknown = [(number,) for number in range(policy.LAST_REVIEWED + 1, 1024)]
    assert set(probe().results(*unknown)) == {"ENOSYS"}
    # The control: this kernel may know some of them.
    cachestat = probe(seccomp=tenants.UNFILTERED).results((451, 1, 1, 1, 1))
    assert cachestat in (["ENOSYS"], ["EBADF"], ["EFAULT"])


@pytest.mark.guest
@pytest.mark.skipif(platform.machine() != "x86_64", reason="int 0x80 and x32 are of amd64")
@pytest.mark.parametrize("call", [("i", 20), (39 | 0x40000000,), (0x40000000 + 520, 1, 1, 1)], ids=str)
def test_what_comes_in_by_another_architectures_entry_is_killed(probe: MakeProbe, call: probes.Call) -> None:
    if call[0] == "i" and not probes.has_32_bit_entry():
        pytest.skip("this kernel has no 32-bit entry")
    done = probe().run(("getpid",), call, ("getpid",))
    assert (done.returncode, done.stdout) == (128 + SIGSYS, "1\n")
    without = probe(seccomp=tenants.UNFILTERED).run(("getpid",), call, ("getpid",))
    assert without.returncode == 0
    assert len(without.stdout.split()) == 3, "the control: it is answered, and the program goes on"


def test_fork_and_threads_still_work_though_clone3_is_not_there(probe: MakeProbe) -> None:
    made = probe()
    assert made.results(("clone3", 1, 88)) == ["ENOSYS"]
    assert made.tenant.output("echo $(echo child)") == "child"


def test_the_shell_of_the_operator_has_the_same_filter(probe: MakeProbe) -> None:
    made = probe()
    done = made.tenant.run(
        "/home/probe", options=("--shell",), stdin=None, input=probes.lines([("io_uring_setup", 1, 1), ("getpid",)])
    )
    assert probes.words(done.stdout) == ["EPERM", "worked"]


@pytest.mark.guest
def test_the_kernel_says_that_every_filter_is_there(probe: MakeProbe) -> None:
    tenant = probe().tenant
    status = tenant.output("grep ^Seccomp /proc/self/status").split()
    assert status[:2] == ["Seccomp:", "2"]
    if "Seccomp_filters:" in status:
        own = Path("/proc/self/status").read_text().partition("Seccomp_filters:")[2].split()[0]
        assert int(status[3]) - int(own) == 2


def test_a_filter_that_is_not_there_or_is_none_stops_the_start(probe: MakeProbe) -> None:
    tenant = probe().tenant
    for digest, content in (("a" * 40, None), ("b" * 40, b""), ("c" * 40, b"\0" * 12), ("d" * 40, b"\0" * 16)):
        if content is not None:
            State(tenant.root).filter(digest).write_bytes(content)
        tenant.change(seccomp={"mode": "none", "filters": [digest], "learned": None})
        done = tenant.run("/bin/echo", "must not run")
        assert (done.returncode, done.stdout) == (125, ""), digest
        (line,) = done.stderr.splitlines()
        assert tenant.name in line


def test_a_grant_takes_its_row_out_and_no_other(probe: MakeProbe) -> None:
    approved = frozenset({"io_uring_setup", "socket:AF_ALG", "unshare:CLONE_NEWUSER"})
    wanted = filters.Wanted(filters.default(approved))
    made = probe(seccomp=wanted.entry())
    wanted.ensure(State(made.tenant.root))
    results = dict(zip(NAMES, made.results(*CALLS), strict=True))
    assert {name for name, row in policy.DENIED.items() if name in results and results[name] != row.errno} == approved


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64", "riscv64", "armv7l"])
def test_the_filters_can_be_compiled_for_other_machines(architecture: str) -> None:
    for program in filters.default(frozenset(), architecture):
        content = filters.compiled(program)
        assert content
        assert len(content) % 8 == 0
        assert program.digest() != filters.default(frozenset(), "riscv32")[0].digest()


def test_the_page_about_system_calls_lists_what_is_refused() -> None:
    text = page("docs/explanation/seccomp.md").text
    assert "\n".join(tables.denied()) in text
