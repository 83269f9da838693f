"""The launcher fails closed: with any one step sabotaged it notices before the exec, and the tenant never runs.

Each row is a positive control of one check in verify.py: the launcher itself, with one
call taken out of its own process, must refuse what it then finds.
"""

import sys

import pytest

from isochamber import paths
from tests.conftest import PROJECT
from tests.launch import tenants
from tests.launch.tenants import Tenant

# What is put out of action, and what must be said about it.
SABOTAGE = {
    "no network namespace": (
        "real = syscalls.setns\n"
        "syscalls.setns = lambda fd, kind: None if kind == syscalls.CLONE_NEWNET else real(fd, kind)",
        "the net namespace is still the host's",
    ),
    "no user namespace": (
        "real = syscalls.setns\n"
        "syscalls.setns = lambda fd, kind: None if kind == syscalls.CLONE_NEWUSER else real(fd, kind)",
        "the user namespace is still the host's",
    ),
    "no cgroup namespace": (
        "real = syscalls.unshare\n"
        "syscalls.unshare = lambda flags: None if flags == syscalls.CLONE_NEWCGROUP else real(flags)",
        "the cgroup namespace is still the host's",
    ),
    # Without a mount namespace of its own the tenant's side would take the launcher's root away: said, not done.
    "no mount namespace": (
        "real = verify.namespaces\nverify.namespaces = lambda: {**real(), 'mnt': 1}",
        "the mnt namespace is still the host's",
    ),
    "no uts namespace": (
        "real = verify.namespaces\nverify.namespaces = lambda: {**real(), 'uts': 1}",
        "the uts namespace is still the host's",
    ),
    "no pid namespace": (
        "real = verify.namespaces\nverify.namespaces = lambda: {**real(), 'pid': 1}",
        "the pid namespace is still the host's",
    ),
    "no ipc namespace": ("start.TENANT_NAMESPACES &= ~syscalls.CLONE_NEWIPC", "the ipc namespace is still the host's"),
    "no capabilities dropped": ("capabilities.keep_only = lambda kept, highest: None", "CapInh|CapPrm"),
    "bounding set kept": ("syscalls.PR_CAPBSET_DROP = syscalls.PR_CAPBSET_READ", "CapBnd"),
    "one capability forgotten": (
        "real = capabilities.keep_only\ncapabilities.keep_only = lambda kept, highest: real(kept, highest - 1)",
        "CapBnd",
    ),
    "privileges not given up": (
        # Without no_new_privs Landlock fails before the look that this is about.
        "real = syscalls.prctl\nsyscalls.prctl = lambda option, *rest: None if option == 38 else real(option, *rest)\n"
        "start.landlock.apply = lambda **more: None",
        "no_new_privs is not set",
    ),
    "open to others": (
        # As fs.suid_dumpable would leave it on a machine that has it at 1.
        "real = syscalls.prctl\n"
        "syscalls.prctl = lambda option, *rest: real(option, *((1,) if option == syscalls.PR_SET_DUMPABLE else rest))",
        "others may look into it",
    ),
    "ids not taken": ("start._take_ids = lambda entry: None", "its ids are"),
    "root not entered": ("mounts.enter = lambda root: None", "the root|is mounted and should not be|/ is a"),
    "old root not detached": (
        "real = syscalls.umount2\n"
        "syscalls.umount2 = lambda target, flags=0: None if target == '.' else real(target, flags)",
        "mounted|/ is a",
    ),
    "no fresh /tmp": (
        "real = mounts.mount_tmpfs\n"
        "mounts.mount_tmpfs = lambda root, path, *rest: None if path == 'tmp' else real(root, path, *rest)",
        "/tmp is not mounted",
    ),
    "no fresh /dev": ("devices.make = lambda *rest: None", "/dev is not mounted|dev/null"),
    "no /home": ("start._bind_home = lambda *rest: None", "/home is not mounted"),
    "no filter loaded": ("syscalls.seccomp_filter = lambda program, flags=0: 0", "Seccomp is 0"),
    "one filter forgotten": (
        "real = syscalls.seccomp_filter\n"
        "taken = []\n"
        "def once(program, flags=0):\n    taken or real(program)\n    taken.append(1)\n    return 0\n"
        "syscalls.seccomp_filter = once",
        "Seccomp_filters",
    ),
    "something more is mounted": (
        "real = masking.apply\n"
        "masking.apply = lambda root: (real(root), mounts.mount_tmpfs(root, 'mnt', 0, '755', 4096))",
        "/mnt is mounted and should not be",
    ),
    "the host's own directory is shown": (
        "real = start._bind_home\n"
        "def bind(root, entry, user):\n"
        "    real(root, entry, user)\n"
        "    mounts.attach(root, 'srv', mounts.clone_plain('/etc', 1))\n"
        "start._bind_home = bind",
        "/srv is mounted and should not be",
    ),
}

PROGRAM = """\
import sys
sys.path.insert(0, {project!r})
from isochamber.launch import (
    capabilities, devices, keeper, main, masking, mounts, pins, running, start, syscalls, verify,
)
{sabotage}
sys.exit(main.main(sys.argv[1:]))
"""


def _launch(tenant: Tenant, sabotage: str, argv: list[str] | None = None) -> tenants.Done:
    tenant.change(argv=argv or ["/bin/echo", "it ran"])
    return tenants.run(words_of(tenant, sabotage))


def words_of(tenant: Tenant, sabotage: str) -> list[str]:
    """Return words that run the entry by a launcher that was tampered with."""
    code = PROGRAM.format(project=str(PROJECT), sabotage=sabotage)
    # In a private copy of the host's mounts: some of the sabotage lets mounts through to where the launcher stands.
    return ["unshare", "-m", sys.executable, "-I", "-S", "-c", code, "run", "--root", str(tenant.root), tenant.name]


@pytest.mark.guest
def test_the_same_program_without_sabotage_starts_the_tenant(tenant: Tenant) -> None:
    done = _launch(tenant, "")
    assert (done.stdout, done.returncode) == ("it ran\n", 0), done.stderr


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_step_that_did_not_happen_is_noticed_before_the_tenant_runs(tenant: Tenant, name: str) -> None:
    sabotage, reason = SABOTAGE[name]
    done = _launch(tenant, sabotage)
    assert "it ran" not in done.stdout
    assert done.returncode == 125, done.stderr
    (line,) = done.stderr.splitlines()
    assert tenant.name in line
    assert any(part in line for part in reason.split("|")), line


FAILING = (
    "syscalls.setns", "syscalls.unshare", "mounts.make_private", "mounts.map_lowers", "mounts.mount_overlay",
    "mounts.mount_kernel_views", "devices.make", "mounts.mount_tmpfs", "masking.apply", "start._bind_home",
    "start._bind_extras", "mounts.enter", "syscalls.sethostname", "start.rlimits.apply", "start._take_ids",
    "start.landlock.apply", "capabilities.keep_only", "verify.inside", "syscalls.close_range_on_exec",
    "syscalls.seccomp_filter", "start.pins.ensure", "start.cgroup.make_v1", "start.cgroup.make_v2",
    "start.channel.send_started", "keeper.record",
)  # fmt: skip


@pytest.mark.parametrize("step", FAILING)
def test_a_step_that_fails_stops_the_start_with_its_path_and_errno_and_leaves_nothing(
    tenant: Tenant, step: str
) -> None:
    sabotage = f"def fail(*rest, **more):\n    raise OSError(5, 'Input/output error', '/the/path')\n{step} = fail"
    done = _launch(tenant, sabotage)
    assert "it ran" not in done.stdout
    assert done.returncode == 125, done.stderr
    (line,) = done.stderr.splitlines()
    assert tenant.name in line
    assert "/the/path" in line or paths.namespace_pin(tenant.tid, "user") in line
    assert "EIO" in line
    assert tenant.processes() == []
    assert tenant.group is None or not tenant.group.exists() or not (tenant.group / "cgroup.procs").read_text()
    assert _launch(tenant, "").stdout == "it ran\n"


def test_a_bug_of_ours_is_shown_and_the_tenant_does_not_run(tenant: Tenant) -> None:
    done = _launch(tenant, "mounts.enter = lambda root: 1 // 0")
    assert "it ran" not in done.stdout
    assert done.returncode == 125
    assert "ZeroDivisionError" in done.stderr


def test_clean_up_that_fails_is_said_and_does_not_change_the_tenants_status(tenant: Tenant) -> None:
    if tenant.group is None:
        pytest.skip("cgroup2")
    sabotage = (
        "from isochamber.launch import cgroup\n"
        "def fail(group):\n    raise OSError(16, 'Device or resource busy', group)\n"
        "real = keeper._clean\n"
        "def clean(prepared, messages):\n    cgroup.remove = fail\n    real(prepared, messages)\n"
        "keeper._clean = clean"
    )
    done = _launch(tenant, sabotage)
    assert (done.returncode, done.stdout) == (0, "it ran\n")
    (line,) = done.stderr.splitlines()
    for part in (tenant.name, "clean up", str(tenant.group), "EBUSY"):
        assert part in line
    assert tenant.run("/bin/true").returncode == 0
    assert not tenant.group.exists()


def test_what_every_processor_tells_is_hidden_of_each(tenant: Tenant) -> None:
    """By another directory than thermal_throttle, which a machine without a thermometer has not."""
    there = "sys/devices/system/cpu/cpu{}/topology"
    count = f"cat /{there.format('*')}/* 2>/dev/null | wc -l"
    assert int(_launch(tenant, "", ["/bin/sh", "-c", count]).stdout) > 0, "the control"
    done = _launch(tenant, f"masking._HIDDEN_OF_PROCESSORS = {there!r}", ["/bin/sh", "-c", count])
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr


LATE_IMPORT = """\
import os
from isochamber.launch import interpreter
{more}
real = syscalls.sethostname
def imports_something(name):
    real(name)
    try:
        import hostile_module
    except ImportError:
        pass
syscalls.sethostname = imports_something
"""


def test_no_module_of_the_tenants_is_ever_imported(tenant: Tenant) -> None:
    """The paths that the launcher imports from name files of the tenant's once its root is entered."""
    place = tenant.upper / next(path for path in sys.path if path.endswith(f"python3.{sys.version_info[1]}")).strip("/")
    place.mkdir(parents=True)
    (place / "hostile_module.py").write_text(
        "import os\nos.write(1, b'imported by %d\\n' % os.getuid())\nos._exit(0)\n"
    )
    without = _launch(tenant, LATE_IMPORT.format(more="interpreter.close_importers = lambda: None"))
    assert without.stdout == "imported by 0\n", "the control: as the host's root"
    assert _launch(tenant, LATE_IMPORT.format(more="")).stdout == "it ran\n"


def test_a_bug_of_ours_is_a_line_that_reads_nothing_of_the_tenants(tenant: Tenant) -> None:
    place = tenant.upper / str(PROJECT).strip("/") / "isochamber/launch"
    place.mkdir(parents=True)
    (place / "start.py").write_text("a line of the tenant's\n" * 400)
    done = _launch(tenant, "syscalls.sethostname = lambda name: 1 // 0")
    assert (done.returncode, done.stdout) == (125, "")
    (line,) = done.stderr.splitlines()
    assert "ZeroDivisionError" in line
    assert "start.py:" in line
    assert "of the tenant's" not in line
