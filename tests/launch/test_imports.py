"""The run-time half pays for nothing it does not need: the standard library only, and the lean part of that."""

import ast
import os
import re
import sys
from pathlib import Path

import pytest

from isochamber.launch import command
from tests.conftest import PROJECT
from tests.launch import tenants
from tests.launch.tenants import Tenant

LAUNCH = PROJECT / "isochamber" / "launch"
MODULES = sorted(LAUNCH.glob("*.py"))

# What costs milliseconds to import and must not come in by the back door.
SLOW = {
    "argparse", "asyncio", "collections", "contextlib", "dataclasses", "enum", "functools", "inspect", "json",
    "logging", "pathlib", "re", "shutil", "signal", "site", "socket", "subprocess", "tempfile", "threading", "typing",
}  # fmt: skip


def _imported(tenant: Tenant, *words: str) -> set[str]:
    launcher = tenant.words(*words)
    tenant.change()
    done = tenants.run([launcher[0], "-X", "importtime", *launcher[1:]])
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"^import time:.*\|\s+(\S+)$", done.stderr, re.M))


def test_a_whole_start_imports_only_the_standard_library_and_ours(tenant: Tenant) -> None:
    imported = {name.split(".")[0] for name in _imported(tenant, "/bin/true")}
    assert "isochamber" in imported
    assert imported - set(sys.stdlib_module_names) - {"isochamber", "site"} == set()


def test_a_whole_start_imports_nothing_slow_and_nothing_of_the_compile_time_half(tenant: Tenant) -> None:
    imported = _imported(tenant, "/bin/true")
    assert imported & SLOW == set()
    ours = {name.split(".")[1] for name in imported if name.startswith("isochamber.")}
    assert ours == {"errors", "launch", "paths"}


def test_the_launcher_is_started_isolated_and_without_site_packages(tenant: Tenant) -> None:
    words = command.argv("run")
    assert words[0] == sys.executable
    assert words[1:3] == ["-I", "-S"]
    assert Path(words[3]).is_absolute()
    hostile = {"PYTHONPATH": "/nowhere", "PYTHONHOME": "/nowhere", "PYTHONINSPECT": "1"}
    done = tenant.run("/bin/true", env={**os.environ, **hostile})
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_ctypes_is_imported_by_syscalls_alone(path: Path) -> None:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    assert ("ctypes" in names) == (path.stem == "syscalls")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_file_has_one_subject_and_fits_in_400_lines(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < 400
    assert ast.get_docstring(ast.parse(text))
