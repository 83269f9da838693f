"""Locks between doit processes: one builder a product, the second waits and says for what."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from isochamber import paths
from isochamber.build.state import State
from isochamber.errors import IsochamberError

_BUILDS = "builds"

# What this run of the graph holds until it ends, by state directory (see hold_builds): a descriptor of the lock file.
_held: dict[str, int] = {}


def hold_builds(state: State, say: Callable[[str], None]) -> None:
    """Hold what :func:`building` holds until :func:`let_builds_go`, or until this process ends.

    Between two tasks of one run nothing is being built, and what the first made has no
    entry yet that refers to it: without this a prune beside would take it. The processes
    that are forked from this one hold it together.
    """
    if state.identifier not in _held:
        descriptor = _open(state, _BUILDS)
        _take(descriptor, _BUILDS, say, fcntl.LOCK_SH)
        _held[state.identifier] = descriptor


def let_builds_go() -> None:
    """Give back what :func:`hold_builds` holds, for every state directory; nothing held is fine."""
    while _held:
        _, descriptor = _held.popitem()
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing it is not enough where something was forked
        os.close(descriptor)


@contextlib.contextmanager
def building(state: State, say: Callable[[str], None]) -> Iterator[None]:
    """Hold, together with any other builder, what :func:`nobody_builds` waits for."""
    with product_lock(state, _BUILDS, say, shared=True):
        yield


@contextlib.contextmanager
def nobody_builds(state: State, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until nobody builds in this state directory, and keep it so for the block.

    Who holds :func:`hold_builds` would wait for itself: its lock becomes this one for the
    block. What it made before must be referred to by then.
    """
    descriptor = _held.get(state.identifier)
    if descriptor is None:
        with product_lock(state, _BUILDS, say):
            yield
        return
    _take(descriptor, _BUILDS, say, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_SH)


@contextlib.contextmanager
def product_lock(state: State, product: str, say: Callable[[str], None], *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of ``product`` (``layer-<recipe>``, ``containers``) for the block; flock(2), so death frees it.

    When another process holds it, ``say`` is called once with what is waited for
    and who has it, then the call waits. The file stays: removing it would let two
    processes lock two files of one name. With ``shared`` several hold it at once.
    """
    descriptor = _open(state, product)
    try:
        _take(descriptor, product, say, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open(state: State, product: str) -> int:
    path = Path(paths.product_lock(state.identifier, product))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="lock", hint="run as root, or set ISOCHAMBER_RUN") from error


def _take(descriptor: int, product: str, say: Callable[[str], None], kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        say(f"waiting for {product}, which process {holder or '?'} is building")
        fcntl.flock(descriptor, kind)
    with contextlib.suppress(OSError):  # only told to who waits
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
