"""Every write of state keeps the protocol: synced, then named, the name synced, then said. And the checker works."""

import ast
import shutil
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.crash import protocol, variants
from tests.crash.client import Server
from tests.crash.world import World


def _check(server: Server, worlds: dict[str, World], directory: Path, variant: str | None) -> protocol.Checker:
    world = worlds["base"].copy(directory / "traced")
    try:
        trace = server.trace("everything", world, children=True, variant=variant)
        state, backups = (protocol.check(trace, str(root)) for root in (world.root, world.backups))
    finally:
        shutil.rmtree(world.directory)
    state.violations += backups.violations
    state.published += backups.published
    return state


def test_every_step_syncs_before_it_names_and_before_it_says_success(
    server: Server, worlds: dict[str, World], crash_directory: Path
) -> None:
    checked = _check(server, worlds, crash_directory, None)
    assert checked.violations == []
    assert checked.published > 30, "the trace was not understood"
    assert checked.synced > 60


@pytest.mark.parametrize("variant", [*variants.VARIANTS, *variants.sites()])
def test_the_checker_notices_every_sync_that_is_left_out(
    server: Server, worlds: dict[str, World], crash_directory: Path, variant: str
) -> None:
    if variants.is_without_need(variant):
        pytest.skip(
            "nothing is lost without it: a name that comes back in staging/ is cleaned up; the reserve is filler"
        )
    if variants.is_not_in_the_workload(variant):
        pytest.skip("the traced tenants have no limits: disk, whose image is synced there")
    assert _check(server, worlds, crash_directory, variant).violations


def test_a_no_op_makes_no_call_that_could_write_below_the_state_directory(server: Server, fresh: World) -> None:
    def written(trace: str) -> list[str]:
        harmless = ("open", "openat", "openat2")
        return [
            call.line
            for call in protocol.calls(trace)
            if str(fresh.root) in call.line
            and (call.name not in harmless or any(flag in call.arguments for flag in ("O_WRONLY", "O_RDWR", "O_CREAT")))
        ]

    server.do("configure", fresh)
    assert written(server.trace("configure", fresh, children=True)) == []
    fresh.change()
    assert written(server.trace("configure", fresh, children=True)), "the trace shows nothing"


# Writers that may be found outside durable.py, with the reason.
_STAGED_ONLY = {
    "isochamber/build/base.py": "writes below a stage",
    "isochamber/build/bootstrap.py": "writes below a stage",
    "isochamber/build/layer.py": "renames inside a stage",
    "isochamber/build/staged.py": "writes below a stage",
    "isochamber/build/seal.py": "removes below a stage",
    "isochamber/build/sandbox.py": "makes directories in a stage; a memfd",
    "isochamber/build/identity.py": "makes directories in a stage",
    "isochamber/build/manifest.py": "writes below a stage; notes in the run-time directory",
    "isochamber/build/home.py": "renames out of a synced stage, into a directory that the tenant may be changing",
    "isochamber/build/backup.py": "copies into a stage",
    "isochamber/build/restore.py": "writes below a stage",
    "isochamber/build/tree.py": "removes what durable.py has renamed away",
    "isochamber/build/debcache.py": "cache/: synced before it is named, may be lost",
    "isochamber/build/process.py": "logs/",
    "isochamber/build/gc.py": "removes files of cache/, and locks",
    "isochamber/build/locks.py": "locks, in the run-time directory",
    "isochamber/build/recover.py": "a note in the run-time directory",
    "isochamber/build/disk.py": "an image is made in a stage, synced, renamed; a cut is settled at the mount",
    "isochamber/build/diskfill.py": "fills an image that lies in a stage",
    "isochamber/build/durable.py": "this is it",
    "isochamber/build/ranges.py": "a file of news in /run, which a start of the machine ends",
}
_WRITING = {
    "write_text", "write_bytes", "rename", "replace", "renames", "unlink", "mkdir", "makedirs", "rmdir", "link",
    "symlink", "symlink_to", "hardlink_to", "touch", "mkfifo", "mknod", "rmtree", "copytree", "move",
    "copyfile", "rename_exchange", "rename_noreplace", "truncate", "ftruncate",
}  # fmt: skip


def _writes(file: Path) -> list[str]:
    """Return the calls in ``file`` that change a file system (str.replace has two arguments, and is none)."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name = node.func.attr
        if name in _WRITING and not (name == "replace" and len(node.args) != 1):
            found.append(f"{name} in line {node.lineno}")
        if name == "open" and any(isinstance(word, ast.Constant) and str(word.value)[:1] in "wax" and word.value
                                  for word in node.args if isinstance(getattr(word, "value", None), str)):  # fmt: skip
            found.append(f"open in line {node.lineno}")
    return found


def test_all_state_is_written_through_the_durable_module() -> None:
    for file in sorted((PROJECT / "isochamber/build").glob("*.py")):
        name = str(file.relative_to(PROJECT))
        if name not in _STAGED_ONLY:
            assert _writes(file) == [], f"{name} changes files: through isochamber.build.durable, or with a reason here"
    assert _writes(PROJECT / "isochamber/build/durable.py"), "the search finds nothing"
