"""The project on a kernel that is not the developers': Debian's own, with cgroup v2 alone, AppArmor and Landlock."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.seccomp import programs
from tests.vm import image, selection
from tests.vm.image import INSIDE
from tests.vm.machine import Done, Machine, Parts

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


@pytest.fixture(scope="session")
def whole(
    parts: Parts, bases: Path, make_root: Callable[[], Path], scratch: Path, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[Done]]]:
    """What the asked directories say inside, each in a machine of its own, two machines at a time."""
    asked = {item.callspec.params.get("directory") for item in request.session.items if hasattr(item, "callspec")}
    if "tests/seccomp" in asked:  # what its programs are made of comes from an archive, and there is no network inside
        made = programs.make(scratch / "five", make_root())
        subprocess.run(["cp", "-al", made.world.root / "layers", bases / "master"], check=True)

    def say(directory: str) -> Done:
        place = scratch / directory.replace("/", "-")
        words = ("--durations=25", "-m", "not slow", directory)
        with Machine(parts, place, image.make_data(scratch / f"{place.name}.img", bases)) as machine:
            return suite(machine, *words, timeout=7000, log=scratch / f"{place.name}.log")

    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(say, name) for name in selection.whole() if name in asked}


@pytest.mark.vm_all
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("directory", selection.whole())
def test_a_whole_directory_of_tests_passes_there(
    whole: dict[str, Future[Done]], directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert passed(whole[directory].result(), capsys) > 0
