"""The project on a kernel that is not the developers': Debian's own, with cgroup v2 alone, AppArmor and Landlock."""

import re
import sys
from pathlib import Path

import pytest

from tests.vm import selection
from tests.vm.image import INSIDE
from tests.vm.machine import Done, Machine

ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "ISOCHAMBER_TEST_SCRATCH": "/srv", "ISOCHAMBER_TEST_MASTER": "/srv/master"}
PYTHON = f"{INSIDE}/.venv/bin/python"

# Of what pytest says inside: what was skipped, and the counts of the escape suite.
_SAID = re.compile(r"SKIPPED|(BLOCKED|CONTAINED|ESCAPED|NOT_TESTABLE) +\d|not testable here")

HELLO = f"""\
set -eu
mkdir -p /srv/hello/state
cp -al /srv/master/base_fs /srv/hello/state
cat > /srv/hello/tenants.yaml <<END
root: /srv/hello/state
bases: {{default: {{packages: []}}}}
tenants: {{hello: {{package: {INSIDE}/examples/hello, ipc: none}}}}
END
export ISOCHAMBER_TENANTS=/srv/hello/tenants.yaml
{PYTHON} -m isochamber.tasks run:hello
rm -rf /srv/hello
"""


def suite(machine: Machine, *words: str, timeout: float, log: Path | None = None) -> Done:
    """Run the project's tests inside; what they say is in ``log`` as it comes."""
    pytest_words = (
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "-o",
        "timeout=1800",
        "-o",
        "faulthandler_timeout=1700",
    )
    argv = (PYTHON, "-m", "pytest", *pytest_words, *words)
    return machine.run(*argv, cwd=INSIDE, env=ENVIRONMENT, timeout=timeout, log=log)


def passed(done: Done, capsys: pytest.CaptureFixture[str]) -> int:
    """Return how many tests passed inside, where none may fail; says so, and what was skipped for which reason."""
    assert done.returncode == 0, f"{done.stdout[-12000:]}\n{done.stderr[-2000:]}"
    lines = done.stdout.splitlines()
    with capsys.disabled():
        for line in (line for line in lines if _SAID.match(line) or line == lines[-1]):
            sys.stdout.write(f"\n  on the second kernel: {line}")
    found = re.search(r"(\d+) passed", done.stdout)
    assert found, done.stdout
    return int(found[1])


@pytest.mark.vm
def test_the_second_kernel_differs_where_a_board_does(machine: Machine) -> None:
    assert machine.check("uname", "-r").startswith("6.")
    assert "cloud-amd64" in machine.check("uname", "-r")
    mounts = machine.check("cat", "/proc/mounts")
    assert " cgroup2 " in mounts
    assert " cgroup " not in mounts
    controllers = machine.check("cat", "/sys/fs/cgroup/cgroup.controllers").split()
    assert {"cpu", "io", "memory", "pids"} <= set(controllers)
    modules = machine.check("cat", "/sys/kernel/security/lsm").split(",")
    assert {"apparmor", "landlock", "yama"} <= set(modules)
    assert machine.check("cat", "/sys/module/apparmor/parameters/enabled").strip() == "Y"


@pytest.mark.vm
def test_hello_is_built_and_run_there(machine: Machine) -> None:
    said = machine.check("sh", "-c", HELLO, timeout=300)
    assert "Hello from a tenant of this machine." in said


@pytest.mark.vm
@pytest.mark.timeout(1200)
def test_chosen_tests_of_the_suite_pass_there(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        passed(
            suite(
                machine, "-p", "no:hypothesispytest", "--durations=15", "-m", "guest", *selection.chosen(), timeout=900
            ),
            capsys,
        )
        >= 30
    )


@pytest.mark.vm_all
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("directory", selection.whole())
def test_a_whole_directory_of_tests_passes_there(
    machine: Machine, directory: str, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--durations=25", "-m", "not slow", directory)
    assert passed(suite(machine, *words, timeout=7000, log=scratch / "inside.log"), capsys) > 0
