"""Tenants as in the launcher's tests, and the program that makes raw system calls in them."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.conftest import base, launch_root, make_tenant, tenant  # noqa: F401 - fixtures
from tests.launch.tenants import Tenant
from tests.seccomp.probes import Probe


@pytest.fixture(scope="session")
def probe_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """probe.c, compiled without any C library."""
    program = tmp_path_factory.mktemp("probe") / "probe"
    source = Path(__file__).with_name("probe.c")
    options = ["-O1", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-pie", "-no-pie"]
    subprocess.run(["gcc", *options, "-o", program, source], check=True)
    return program


@pytest.fixture
def probe(probe_program: Path, make_tenant: Callable[..., Tenant]) -> Callable[..., Probe]:  # noqa: F811
    """Make tenants that have the program in their /home."""

    def make(**changes: object) -> Probe:
        return Probe(make_tenant(**changes), probe_program)

    return make
