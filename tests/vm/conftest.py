"""One kernel and one root disk a test run, and machines made of them."""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vm import image, kernel
from tests.vm.machine import QEMU, Machine, Parts


@pytest.fixture(scope="session")
def parts(make_root: Callable[[], Path], scratch: Path) -> Parts:
    """The second kernel and a root disk with the project in it; skips, by name, where it can't be had."""
    if platform.machine() != "x86_64":
        pytest.skip(f"the second kernel is Debian's for amd64, this machine is {platform.machine()}")
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is missing: apt-get install qemu-system-x86")
    directory = scratch / "vm"
    directory.mkdir()
    kept = os.environ.get("ISOCHAMBER_TEST_PACKAGES")  # a developer's directory, so that nothing is downloaded twice
    found = kernel.fetch(Path(kept) if kept else directory / "packages")
    root, dependencies = image.make_root(make_root(), found, directory)
    kernel.make_initrd(found, dependencies, directory / "initrd")
    return Parts(found.image, directory / "initrd", root)


@pytest.fixture(scope="session")
def bases(make_root: Callable[[], Path], scratch: Path) -> Path:
    """A directory to be put on a data disk: ``master`` in it is a state directory that holds the base."""
    content = scratch / "vm-data"
    (content / "master").mkdir(parents=True)
    subprocess.run(["cp", "-al", make_root() / "base_fs", content / "master"], check=True)
    return content


@pytest.fixture(scope="session")
def machine(parts: Parts, bases: Path, scratch: Path) -> Iterator[Machine]:
    """A machine that is on, for all tests that leave it as they found it."""
    with Machine(parts, scratch / "machine", image.make_data(scratch / "machine.img", bases)) as made:
        yield made
