"""The start is one function of one-line steps, in the order of the architecture."""

import ast

import pytest

from tests.conftest import PROJECT

SOURCE = PROJECT / "isochamber" / "launch" / "start.py"
ARCHITECTURE = PROJECT / "docs" / "explanation" / "architecture.md"

HOST_SIDE = [
    "records.lock", "ipc.check", "cgroup.make_v2", "pins.ensure", "join.ensure", "self.make_rest", "capabilities.last",
    "verify.namespaces",
]  # fmt: skip

TENANT_SIDE = [
    "close this process to others",
    "join the network namespace",
    "clone the IPC directory",
    "make the mounts private",
    "map the lowers",
    "mount the overlay",
    "mount /proc and /sys",
    "make /dev",
    "mount /tmp",
    "mask /proc and /sys",
    "bind /home",
    "bind the IPC directory",
    "bind the extra directories",
    "make the terminal",
    "enter the control groups",
    "make the cgroup namespace",
    "enter the root",
    "write-protect the root",
    "set the hostname",
    "set the resource limits",
    "join the user namespace",
    "take the tenant's ids",
    "drop the capabilities",
    "set no_new_privs",
    "confine by Landlock",
    "verify",
    "reset the signals",
    "load the common system call filters",
    "wait to be handed over",
    "close the inherited descriptors",
    "set the working directory",
    "load the learned system call filter",
    "execute",
]


def _function(name: str) -> ast.FunctionDef:
    tree = ast.parse(SOURCE.read_text())
    return next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)


def _calls(function: ast.FunctionDef) -> list[str]:
    found = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    return [ast.unparse(node.func) for node in sorted(found, key=lambda node: (node.lineno, node.col_offset))]


def test_the_steps_of_the_tenants_side_are_in_the_architectures_order() -> None:
    halves = [*_function("_become").body, *_function("_become_tenant").body]
    lines = (ast.unparse(statement) for statement in halves)
    assert [ast.literal_eval(line[5:-1]) for line in lines if line.startswith("step(")] == TENANT_SIDE


def test_the_steps_of_the_hosts_side_are_in_order() -> None:
    assert [call for call in _calls(_function("__init__")) if call in HOST_SIDE] == HOST_SIDE
    rest = ["cgroup.make_v1", "limits.apply", "devicegroup.apply", "seccomp.Filters"]
    assert [call for call in _calls(_function("make_rest")) if call in rest] == rest


def test_each_step_is_what_its_name_says() -> None:
    """The calls that decide, in the order they are made: a renamed step can't hide a moved call."""
    decisive = [
        "close_to_others", "syscalls.setns", "ipc.clone", "mounts.make_private", "mounts.map_lowers",
        "mounts.mount_overlay", "mounts.mount_kernel_views", "devices.make", "mounts.mount_tmpfs", "masking.apply",
        "_bind_home", "mounts.attach", "_bind_extras", "_make_terminal", "channel.await_groups", "cgroup.enter",
        "syscalls.unshare", "mounts.enter", "mounts.write_protect", "syscalls.sethostname", "rlimits.apply",
        "syscalls.setns", "_take_ids", "capabilities.keep_only", "syscalls.prctl", "landlock.apply", "verify.inside",
        "_reset_signals", "seccomp.load", "handover.wait", "terminal.become_controlling",
        "syscalls.close_range_on_exec", "seccomp.load", "execute.program",
    ]  # fmt: skip
    assert _calls(_function("close_to_others")) == ["syscalls.prctl", "os.setsid", "os.umask"]
    made = [*_calls(_function("_become")), *_calls(_function("_become_tenant"))]
    assert [call for call in made if call in decisive] == decisive


def test_the_architecture_page_lists_the_same_steps() -> None:
    if not ARCHITECTURE.exists():
        pytest.skip("docs/explanation/architecture.md is not written yet")
    page = ARCHITECTURE.read_text()
    places = [page.find(step) for step in TENANT_SIDE]
    assert -1 not in places, [step for step in TENANT_SIDE if step not in page]
