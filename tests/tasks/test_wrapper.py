"""The wrapper ./doit and doit's own command over dodo.py."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.tasks.world import World, make_world


def _world(root: Path, tmp_path: Path) -> World:
    return make_world(tmp_path / "world", root)


def _sh(world: World, *argv: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(word) for word in argv], env=world.environment, cwd="/", stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_the_wrapper_runs_the_graph_from_any_directory(root: Path, tmp_path: Path) -> None:
    world = _world(root, tmp_path)
    done = _sh(world, PROJECT / "doit", "--no-install", "run:plain")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "here"


def test_the_wrapper_refuses_to_install_when_told_so(root: Path, tmp_path: Path) -> None:
    world = _world(root, tmp_path)
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / "doit").write_bytes((PROJECT / "doit").read_bytes())
    (clone / "doit").chmod(0o755)
    (clone / "requirements").symlink_to(PROJECT / "requirements")
    done = _sh(world, clone / "doit", "--no-install", "list")
    assert done.returncode == 125
    assert "--no-install" in done.stderr
    assert not (clone / ".venv").exists()


def test_plain_doit_with_dodo_py_offers_the_same_tasks(root: Path, tmp_path: Path) -> None:
    world = _world(root, tmp_path)
    ours = _sh(world, PROJECT / "doit", "--no-install", "list", "--all", "--quiet")
    plain = _sh(world, PROJECT / ".venv/bin/doit", "-f", PROJECT / "dodo.py", "list", "--all", "--quiet")
    assert ours.returncode == plain.returncode == 0, ours.stderr + plain.stderr
    assert ours.stdout == plain.stdout
    for task in (
        "base_fs",
        "configure:plain",
        "run:plain",
        "shell:plain",
        "delete:plain",
        "prune",
        "test",
        "test:slow",
    ):
        assert task in plain.stdout.split()


def test_plain_doit_runs_a_tenant_and_fails_when_the_tenant_does(root: Path, tmp_path: Path) -> None:
    world = _world(root, tmp_path)
    dodo = ("-f", PROJECT / "dodo.py")
    done = _sh(world, PROJECT / ".venv/bin/doit", *dodo, "run:plain")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "here" in done.stdout
    world.prog("plain", "main").write_text("#!/bin/sh\nexit 9\n")
    done = _sh(world, PROJECT / ".venv/bin/doit", *dodo, "run:plain")
    assert done.returncode == 1
    assert "exit status 9" in done.stdout + done.stderr


def test_bad_input_is_exit_2_with_one_line_each_and_doit_shows_no_traceback(root: Path, tmp_path: Path) -> None:
    world = _world(root, tmp_path)
    world.tenants.write_text("tenants: {plain: {pakage: x, base: 1}}\n")
    done = _sh(world, PROJECT / "doit", "--no-install")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) >= 2
    assert all("tenants.yaml:1:" in line for line in lines)
    plain = _sh(world, PROJECT / ".venv/bin/doit", "-f", PROJECT / "dodo.py", "list")
    assert plain.returncode == 3
    assert "Traceback" not in plain.stderr


def test_an_unknown_task_is_exit_2(root: Path, tmp_path: Path) -> None:
    world = _world(root, tmp_path)
    done = _sh(world, PROJECT / "doit", "--no-install", "run:nobody")
    assert done.returncode == 2
    assert "run:nobody" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_wrapper_needs_nft_for_an_install_script_and_only_for_one(root: Path, tmp_path: Path) -> None:
    world = _world(root, tmp_path)
    tenants = world.tenants.read_text()
    hidden = 'mount --bind /dev/null "$0" && exec "$@"'
    nft = shutil.which("nft")
    if nft is None:
        pytest.skip("nft is not installed")
    for given, task, needed in (
        ("", "install_deps", True),
        ("", "install_deps:sensor", True),
        ("", "dirs:plain", False),
        ("", "run:plain", False),
        (", install_network: host", "install_deps:sensor", False),
    ):
        world.tenants.write_text(tenants.replace(", install_network: host", given))
        done = _sh(world, "unshare", "-m", "sh", "-c", hidden, nft, PROJECT / "doit", "--no-install", task)
        if needed:
            assert done.returncode == 125
            assert "missing: nftables;" in done.stderr
        else:
            assert done.returncode == 0, done.stderr


def test_the_wrapper_is_posix_sh() -> None:
    assert subprocess.run(["/bin/sh", "-n", PROJECT / "doit"], check=False).returncode == 0
    assert os.access(PROJECT / "doit", os.X_OK)
