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

# What this process holds until it ends, by state directory (see hold_builds).
_held: dict[str, contextlib.ExitStack] = {}


def hold_builds(state: State, say: Callable[[str], None]) -> None:
    """Hold what :func:`building` holds until this process ends, or itself waits until nobody builds.

    Between two tasks of one run nothing is being built, and what the first made has no
    entry yet that refers to it: without this a prune beside would take it.
    """
    if state.identifier not in _held:
        stack = contextlib.ExitStack()
        stack.enter_context(building(state, say))
        _held[state.identifier] = stack


def let_builds_go(state: State) -> None:
    """Give back what :func:`hold_builds` holds; nothing held is fine."""
    stack = _held.pop(state.identifier, None)
    if stack is not None:
        stack.close()


def let_all_builds_go() -> None:
    """The same for every state directory."""
    while _held:
        _held.popitem()[1].close()


@contextlib.contextmanager
def building(state: State, say: Callable[[str], None]) -> Iterator[None]:
    """Hold, together with any other builder, what :func:`nobody_builds` waits for."""
    with product_lock(state, _BUILDS, say, shared=True):
        yield


@contextlib.contextmanager
def nobody_builds(state: State, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until nobody builds in this state directory, and keep it so for the block."""
    let_builds_go(state)  # who builds and prunes in one run would wait for itself
    with product_lock(state, _BUILDS, say):
        yield


@contextlib.contextmanager
def product_lock(state: State, product: str, say: Callable[[str], None], *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of ``product`` (``layer-<recipe>``, ``containers``) for the block; flock(2), so death frees it.

    When another process holds it, ``say`` is called once with what is waited for
    and who has it, then the call waits. The file stays: removing it would let two
    processes lock two files of one name. With ``shared`` several hold it at once.
    """
    path = Path(paths.product_lock(state.identifier, product))
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="lock", hint="run as root, or set ISOCHAMBER_RUN") from error
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            say(f"waiting for {product}, which process {holder or '?'} is building")
            fcntl.flock(descriptor, kind)
        with contextlib.suppress(OSError):  # only told to who waits
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
