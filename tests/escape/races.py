"""Races: a process that swaps a directory for a link as fast as the kernel can, against whoever opens or deletes."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from isochamber.build import tree
from isochamber.errors import IsochamberError
from isochamber.launch import mounts
from tests.escape.attempts import Attempt, Guard, Off
from tests.escape.worlds import Worlds

ROUNDS = 2000
_DEADLINE = 120  # seconds for a control to win its race, which takes some hundred rounds


def compiled(directory: Path, name: str, *options: str) -> Path:
    """Compile the C program ``name`` beside this file, once a session."""
    program = directory / name
    if not program.exists():
        source = Path(__file__).with_name(f"{name}.c")
        words = ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", *options, "-o", str(program), str(source)]
        subprocess.run(words, check=True, timeout=120)
        program.chmod(0o755)
    return program


@contextmanager
def swapping(worlds: Worlds, first: Path, second: Path) -> Iterator[None]:
    """Exchange ``first`` and ``second`` all the while."""
    swapper = compiled(worlds.scratch, "swapper")
    with subprocess.Popen([swapper, first, second], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            process.kill()


def _naive_target(root: int, path: str) -> int:
    """Open a mount target as a launcher would that checks first and opens then."""
    where = f"/proc/self/fd/{root}/{path}"
    if os.path.islink(where):
        raise IsochamberError("a link", stage="launch")
    return os.open(where, os.O_PATH | os.O_DIRECTORY)


def _naive_removal(directory: Path) -> None:
    """Remove what is in a directory as one does who checks first and removes then."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _naive_removal(Path(entry.path))
            else:
                os.unlink(entry.path)


BY_DESCRIPTOR = Guard("mount targets are opened in one step, through no link")
BELOW_DESCRIPTORS = Guard("trees are deleted below descriptors")


def _open_targets(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """F07: the tenant's second process swaps a mount point for a link while the launcher opens it."""
    directory = worlds.scratch / "race-open"
    (directory / "root/dev").mkdir(parents=True)
    outside = directory / "outside"
    outside.mkdir()
    (directory / "root/link").symlink_to(outside)
    root = os.open(directory / "root", os.O_PATH | os.O_DIRECTORY)
    opener: Callable[[int, str], int] = _naive_target if BY_DESCRIPTOR in off else mounts.open_target
    refused = opened = 0
    end = time.monotonic() + _DEADLINE
    try:
        with swapping(worlds, directory / "root/dev", directory / "root/link"):
            while (
                refused + opened < ROUNDS or (off and time.monotonic() < end) or (not off and not (refused and opened))
            ):
                try:
                    found = opener(root, "dev")
                except (IsochamberError, OSError):
                    refused += 1
                    continue
                opened += 1
                where = os.readlink(f"/proc/self/fd/{found}")
                os.close(found)
                if where == str(outside):
                    return "escaped"
        return "stayed inside"
    finally:
        os.close(root)
        shutil.rmtree(directory)


def _delete(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """F24: the tenant swaps a directory for a link to the host's while its tree is deleted."""
    directory = worlds.scratch / "race-delete"
    outside = directory / "outside"
    outside.mkdir(parents=True)
    rounds = 0
    end = time.monotonic() + _DEADLINE
    link = directory / "link"
    place = directory / "place"
    place.mkdir()
    try:
        link.symlink_to(outside)
        with swapping(worlds, place / "victim", link):
            while rounds < ROUNDS or (off and time.monotonic() < end):
                rounds += 1
                (outside / "canary").touch()
                # Either name is there at any time, or neither: what is missing is made again.
                for path in (place / "victim", link):
                    try:
                        path.mkdir()
                    except FileExistsError:
                        continue
                try:
                    (place / "victim/file").touch()
                    if BELOW_DESCRIPTORS in off:
                        _naive_removal(place)
                    else:
                        descriptor = os.open(place, tree.DIRECTORY)
                        try:
                            tree.remove_contents(descriptor)
                        finally:
                            os.close(descriptor)
                except OSError:
                    pass  # the swapper was quicker
                if not (outside / "canary").exists():
                    return "escaped"
                if not link.is_symlink() and not (place / "victim").is_symlink():
                    _put_link(link, outside)
        return "stayed inside"
    finally:
        shutil.rmtree(directory)


def _put_link(link: Path, outside: Path) -> None:
    new = link.with_name("new")
    new.symlink_to(outside)
    try:
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        new.rename(link)
    except OSError:
        new.unlink(missing_ok=True)


def attempts() -> Iterator[Attempt]:
    """Yield the races."""
    stayed = frozenset({"stayed inside"})
    yield Attempt("F07", f"a mount point swapped for a link, {ROUNDS:,} rounds", (BY_DESCRIPTOR,), _open_targets,
                  refused=stayed)  # fmt: skip
    yield Attempt("F24", f"a directory swapped for a link while it is deleted, {ROUNDS:,} rounds", (BELOW_DESCRIPTORS,),
                  _delete, refused=stayed)  # fmt: skip
