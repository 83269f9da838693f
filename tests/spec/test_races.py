"""P02 and P05: a tenant that swaps what we read while we read it. Never another file's content."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isochamber.build import contents
from isochamber.build.state import State
from isochamber.errors import IsochamberError, SpecError
from isochamber.spec import package
from isochamber.spec.model import Package
from tests.spec import packages

ROUNDS = 2_000
SECRET = b"a secret of the host's, exactly as long\n"
OWN = b"what the package says of its own, here.\n"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes all the time is refused either way; not waiting for it gives thousands of attempts."""
    monkeypatch.setattr(package, "_wait", lambda _seconds: None)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A package with progs/conf/a, beside a secret of the same size and a directory that has it under the same name."""
    assert len(SECRET) == len(OWN)
    made = packages.make(tmp_path / "probe")
    (made / "progs/conf/a").write_bytes(OWN)
    _settle(made)
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/a").write_bytes(SECRET)
    (tmp_path / "config.json").write_text(json.dumps({**packages.CONFIG, "cname": "secret"}))
    return made


def _settle(directory: Path) -> None:
    """Wait until what was just written is old enough to be read at the first try."""
    newest = max(path.lstat().st_ctime for path in directory.rglob("*"))
    while time.time() - newest < 2 * package._TICK:
        time.sleep(package._TICK)


@contextlib.contextmanager
def swapping(*swaps: Callable[[], None]) -> Iterator[Callable[[], int]]:
    """Call ``swaps`` in turn, for ever, in another thread; gives how often it went round."""
    stop, rounds, failed = threading.Event(), [0], []

    def loop() -> None:
        try:
            while not stop.is_set():
                for swap in swaps:
                    swap()
                rounds[0] += 1
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield lambda: rounds[0]
    finally:
        stop.set()
        thread.join()
    assert not failed, failed


def _replace(path: Path, make: Callable[[Path], object]) -> Callable[[], None]:
    """Return a swap that puts something else under ``path`` by one rename, so that there is always something."""
    fresh = path.with_name(f".{path.name}.new")

    def swap() -> None:
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()
        make(fresh)
        fresh.rename(path)

    return swap


def _exchange(one: Path, other: Path) -> Callable[[], None]:
    """Return a swap of a directory and a symlink, by three renames."""
    spare = one.with_name(".spare")

    def swap() -> None:
        one.rename(spare)
        other.rename(one)
        spare.rename(other)

    return swap


def _content(found: Package, path: str) -> bytes:
    prog = next((prog for prog in found.progs if prog.path == path), None)
    if prog is None:
        raise SpecError(("its directory was away just then",))
    with os.fdopen(package.open_prog(found, prog), "rb") as file:
        return file.read()


def _outcomes(attempt: Callable[[], object], rounds: Callable[[], int]) -> dict[str, int]:
    """Make at least ROUNDS attempts while the swaps go round at least as often; count what came of them."""
    counted: dict[str, int] = {}
    attempts = 0
    while attempts < ROUNDS or (rounds() < ROUNDS and attempts < 100 * ROUNDS):
        attempts += 1
        try:
            result = str(attempt())
        except (SpecError, IsochamberError):
            result = "refused"
        counted[result] = counted.get(result, 0) + 1
    return counted


def test_p02_a_file_swapped_for_links_to_a_secret_is_never_read_as_the_secret(directory: Path) -> None:
    path, secret = directory / "progs/conf/a", directory.with_name("secret")
    swaps = (
        _replace(path, lambda new: new.symlink_to(secret)),
        _replace(path, lambda new: os.link(secret, new)),
        _replace(path, lambda new: new.write_bytes(OWN)),
    )
    with swapping(*swaps) as rounds:
        counted = _outcomes(lambda: _content(package.read(directory), "conf/a"), rounds)
    assert set(counted) <= {str(OWN), "refused"}, counted
    assert counted.get("refused", 0) > 0, "the swaps never met a read: the test shows nothing"


def test_p02_a_directory_swapped_for_a_link_to_one_outside_is_never_entered(directory: Path) -> None:
    (directory / "link").symlink_to(directory.with_name("outside"))
    with swapping(_exchange(directory / "progs/conf", directory / "link")) as rounds:
        counted = _outcomes(lambda: _content(package.read(directory), "conf/a"), rounds)
    assert set(counted) <= {str(OWN), "refused"}, counted
    assert counted.get("refused", 0) > 0, "the swaps never met a read: the test shows nothing"


def test_p02_config_json_swapped_for_links_to_another_is_never_read_as_the_other(directory: Path) -> None:
    path, other = directory / "config.json", directory.with_name("config.json")
    swaps = (
        _replace(path, lambda new: new.symlink_to(other)),
        _replace(path, lambda new: os.link(other, new)),
        _replace(path, lambda new: new.write_text(json.dumps(packages.CONFIG))),
    )
    with swapping(*swaps) as rounds:
        counted = _outcomes(lambda: package.read(directory).cname, rounds)
    assert set(counted) <= {"probe", "refused"}, counted
    assert counted.get("refused", 0) > 0, "the swaps never met a read: the test shows nothing"


def test_p02_progs_swapped_for_a_link_between_the_walk_and_the_use_is_never_entered(directory: Path) -> None:
    """Check once, use often: the package as it was read stays the only thing that is opened."""
    found = package.read(directory)
    (directory.with_name("outside") / "conf").mkdir()
    (directory.with_name("outside") / "conf/a").write_bytes(SECRET)
    (directory / "link").symlink_to(directory.with_name("outside"))
    with swapping(_exchange(directory / "progs", directory / "link")) as rounds:
        counted = _outcomes(lambda: _content(found, "conf/a"), rounds)
    assert set(counted) <= {str(OWN), "refused"}, counted
    assert len(counted) == 2, "the swaps never met a read, or never missed one: the test shows nothing"


def test_p02_the_swap_works_on_a_reader_that_checks_the_path_first(directory: Path) -> None:
    """The control: lstat and then open, as one would, reads the secret."""
    path, secret = directory / "progs/conf/a", directory.with_name("secret")

    def careless() -> bytes:
        if path.is_symlink() or not path.is_file():
            raise SpecError(("refused",))
        return path.read_bytes()

    swaps = (_replace(path, lambda new: new.symlink_to(secret)), _replace(path, lambda new: new.write_bytes(OWN)))
    seen = set()
    with swapping(*swaps):
        for _ in range(200_000):
            with contextlib.suppress(SpecError, OSError):
                seen.add(careless())
            if SECRET in seen:
                break
    assert SECRET in seen


@pytest.mark.parametrize("change", ["grows", "shrinks", "other bytes, the mtime put back"])
def test_p05_a_file_that_changed_after_the_walk_is_an_error(directory: Path, change: str) -> None:
    found = package.read(directory)
    path = directory / "progs/conf/a"
    before = path.stat()
    if change == "grows":
        with path.open("ab") as file:
            file.write(b"more")
    elif change == "shrinks":
        os.truncate(path, 5)
    else:
        while path.stat().st_ctime_ns == before.st_ctime_ns:  # the kernel's clock ticks every few milliseconds
            path.write_bytes(SECRET)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(IsochamberError, match="changed while it was read"):
        _content(found, "conf/a")
    _settle(directory)
    assert _content(package.read(directory), "conf/a") == path.read_bytes()


def test_p05_a_file_written_to_all_the_time_gives_the_digest_of_what_it_held_or_an_error(
    directory: Path, tmp_path: Path
) -> None:
    import hashlib

    state = State(tmp_path / "state")
    state.create()
    path = directory / "progs/conf/a"
    known = {hashlib.sha256(data).hexdigest() for data in (OWN, SECRET)}

    def write(data: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY)
        os.pwrite(descriptor, data, 0)
        os.close(descriptor)

    counted: dict[str, int] = {}
    with swapping(lambda: write(OWN), lambda: write(SECRET)):
        for _ in range(50):
            try:
                result = contents.digests(state, package.read(directory))["conf/a"]
                assert result in known
            except IsochamberError:
                result = "refused"
            counted[result] = counted.get(result, 0) + 1
    # When nobody writes any more, nothing that was remembered on the way may be wrong.
    for data in (OWN, SECRET):
        write(data)
        _settle(directory)
        assert contents.digests(state, package.read(directory))["conf/a"] == hashlib.sha256(data).hexdigest()
