"""/home is deployed by manifest: ours is brought up to date, the tenant's is never touched, no link is followed."""

import contextlib
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isochamber.build import home
from isochamber.errors import IsochamberError
from tests.build.homes import House, Tree, exchange
from tests.properties import PROPERTY


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_what_is_deployed_is_the_packages_own_with_normal_modes_and_owners(house: House) -> None:
    house.write({"main": "#!/bin/sh\n", "conf/a": "a\n", "empty": None})
    (house.progs / "main").chmod(0o6755)
    (house.progs / "conf/a").chmod(0o600)
    os.chown(house.progs / "conf/a", 1234, 1234)
    os.setxattr(house.progs / "conf/a", "user.note", b"x") if _takes_xattrs(house.progs) else None
    former = os.umask(0o077)
    try:
        house.deploy()
    finally:
        os.umask(former)
    assert house.seen() == {"main": "#!/bin/sh\n", "conf": None, "conf/a": "a\n", "empty": None}
    modes = {path: stat.S_IMODE((house.home / path).stat().st_mode) for path in house.seen()}
    assert modes == {"main": 0o755, "conf": 0o755, "conf/a": 0o644, "empty": 0o755}
    assert {(house.home / path).stat().st_uid for path in house.seen()} == {0}
    assert os.listxattr(house.home / "conf/a") == []
    assert house.current()


def _takes_xattrs(directory: Path) -> bool:
    try:
        os.setxattr(directory, "user.probe", b"x")
    except OSError:
        return False
    return True


def test_the_next_version_replaces_removes_and_adds_what_the_tenant_left_alone(house: House) -> None:
    house.deploy({"a": "1", "gone": "1", "d/gone": "1", "mode": "x"})
    assert house.deploy({"a": "2", "new": "2", "mode": "#!x"}) == []
    assert house.seen() == {"a": "2", "new": "2", "mode": "#!x"}


def test_a_file_that_becomes_a_directory_and_a_directory_that_becomes_a_file_are_replaced(house: House) -> None:
    house.deploy({"a": "file", "b/c": "below"})
    assert house.deploy({"a/c": "below", "b": "file"}) == []
    assert house.seen() == {"a": None, "a/c": "below", "b": "file"}


def test_a_directory_with_the_tenants_files_stays_and_is_said(house: House) -> None:
    house.deploy({"b/c": "below"})
    (house.home / "b/own").write_text("the tenant's")
    (line,) = house.deploy({"b": "file"})
    assert line.startswith("probe: /home/b: ")
    assert house.seen() == {"b": None, "b/own": "the tenant's"}
    house.deploy({})
    assert house.seen() == {"b": None, "b/own": "the tenant's"}


def test_what_the_tenant_changed_stays_through_every_version_and_is_said(house: House) -> None:
    house.deploy({"settings": "1", "gone": "1"})
    (house.home / "settings").write_text("the tenant's")
    (house.home / "gone").write_text("the tenant's too")
    said = house.deploy({"settings": "2"})
    assert sorted(line.split(":")[1] for line in said) == [" /home/gone", " /home/settings"]
    house.deploy({"settings": "3"})
    house.deploy({})
    assert house.seen() == {"settings": "the tenant's", "gone": "the tenant's too"}


def test_what_the_tenant_made_before_the_package_had_it_stays(house: House) -> None:
    house.deploy({})
    (house.home / "a").write_text("the tenant's")
    assert len(house.deploy({"a": "1"})) == 1
    assert house.seen() == {"a": "the tenant's"}


def test_what_the_tenant_removed_comes_back_only_with_a_new_version(house: House) -> None:
    house.deploy({"a": "1", "b": "1"})
    (house.home / "a").unlink()
    house.deploy({"a": "1", "b": "2"})
    assert house.seen() == {"b": "2"}
    house.deploy({"a": "2", "b": "2"})
    assert house.seen() == {"a": "2", "b": "2"}


@pytest.mark.parametrize("odd", ["a FIFO", "a socket", "a link to a secret", "a dangling link", "a directory"])
def test_something_odd_where_a_file_belongs_stays_and_holds_nobody(house: House, odd: str) -> None:
    import socket

    house.deploy({"a": "1"})
    path, secret = house.home / "a", house.directory / "secret"
    secret.write_text("1")  # what the file would hold: still not to be followed
    path.unlink()
    if odd == "a FIFO":
        os.mkfifo(path)
    elif odd == "a socket":
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:
            made.bind("a")
    elif odd == "a directory":
        path.mkdir()
    else:
        path.symlink_to(secret if odd == "a link to a secret" else "nowhere")
    before = path.lstat()
    assert len(house.deploy({"a": "2"})) == 1
    house.deploy({})
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert secret.read_text() == "1"
    assert not (house.directory / "nowhere").exists()


def test_a_directory_swapped_for_a_link_leads_nowhere(house: House) -> None:
    outside = house.directory / "outside"
    outside.mkdir()
    (outside / "a").write_text("1")
    house.deploy({"d/a": "1", "d/gone": "1"})
    shutil.rmtree(house.home / "d")
    (house.home / "d").symlink_to(outside)
    (outside / "gone").write_text("1")  # exactly what we deployed, and not ours
    assert house.deploy({"d/a": "2", "d/new": "2"})
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"a": "1", "gone": "1"}
    house.deploy({})
    assert sorted(path.name for path in outside.iterdir()) == ["a", "gone"]


def test_a_deployment_that_was_cut_is_finished_by_the_next(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each of its steps: what was new arrives, what was withdrawn and came back arrives, the tenant's stays."""
    first: Tree = {"a": "1", "gone": "1", "kind": "file", "mine": "1"}
    second: Tree = {"a": "2", "new": "2", "kind/below": "2", "mine": "2"}
    steps = ("rename", "link", "unlink", "mkdir", "rmdir")
    done = False
    cuts = 0
    while not done:
        house.deploy(first)
        (house.home / "mine").write_text("the tenant's")
        house.write(second)
        with _cut_after(cuts, steps, monkeypatch) as counted:
            try:
                house.deploy()
                done = True
            except KeyboardInterrupt:
                assert not house.current()
        assert counted() or not cuts
        for target in (second, first) if cuts % 2 else (first, second):
            house.deploy(target)
            expected = {**target, "mine": "the tenant's"}
            expected |= {"kind": None} if "kind/below" in target else {}
            assert house.seen() == expected, f"after {cuts} steps"
        shutil.rmtree(house.state.tenant_persist(house.tid))
        house.__post_init__()
        cuts += 1
    assert cuts > 5, "there was nothing to cut"


@contextlib.contextmanager
def _cut_after(count: int, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Let home.py's own system calls of these names happen ``count`` times, then end it as Ctrl-C would."""
    calls = [0]

    class Cut:
        """The os module, with calls that count."""

        def __getattr__(self, name: str) -> object:
            real = getattr(os, name)
            if name not in names:
                return real

            def call(*arguments: object, **keywords: object) -> object:
                if calls[0] >= count:
                    raise KeyboardInterrupt
                calls[0] += 1
                return real(*arguments, **keywords)

            return call

    with monkeypatch.context() as patch:
        patch.setattr(home, "os", Cut())
        yield lambda: calls[0]


def test_a_damaged_manifest_takes_nothing_from_the_tenant(house: House) -> None:
    house.deploy({"a": "1", "b": "1"})
    (house.home / "a").write_text("the tenant's")
    for text in ("", "{", "[]", '{"desired": 1}', '{"deployed": {"a": 1}, "desired": null, "unsure": []}', "[" * 5000):
        (house.home.parent / "home.manifest.json").write_text(text)
        assert not house.current()
        house.deploy({"a": "2", "b": "1"})
        assert house.seen() == {"a": "the tenant's", "b": "1"}
        assert house.current()


def test_a_package_that_changes_while_it_is_deployed_is_an_error_and_the_next_run_is_right(house: House) -> None:
    house.write({"a": "1" * 100_000})
    tenant = house.tenant()
    wanted = house.wanted(tenant)
    with (house.progs / "a").open("r+b") as file:
        file.write(b"2")
    with pytest.raises(IsochamberError, match="changed while it was read"):
        home.deploy(house.state, tenant, house.tid, wanted, house.reporter)
    assert house.seen() == {}
    assert not list(house.state.staging.iterdir())
    house.deploy()
    assert house.seen() == {"a": "2" + "1" * 99_999}


def test_a_tenant_that_races_directories_for_links_never_gets_us_out_of_its_home(house: House) -> None:
    """It swaps d for a link to a directory of the host, with every name that we deploy, all the while."""
    outside = house.directory / "outside"
    (outside / "e").mkdir(parents=True)
    canaries = {"a": "1", "b": "2", "e/a": "1", "e/b": "2"}
    for path, text in canaries.items():
        (outside / path).write_text(text)

    def state_of(path: str) -> tuple[int, ...]:
        status = (outside / path).lstat()
        return status.st_ino, status.st_mode, status.st_nlink, status.st_uid, status.st_mtime_ns, status.st_ctime_ns

    before = {path: state_of(path) for path in (*canaries, "e", ".")}
    trees: tuple[Tree, Tree] = ({"d/a": "1", "d/e/a": "1", "d/x": "1"}, {"d/b": "2", "d/e/b": "2", "d/y": "2"})
    house.deploy(trees[0])
    link = house.home / "link"
    link.symlink_to(outside)
    stop, rounds = threading.Event(), [0]

    def swap() -> None:
        while not stop.is_set():
            with contextlib.suppress(FileNotFoundError):
                exchange(house.home / "d", link)
                rounds[0] += 1

    thread = threading.Thread(target=swap)
    thread.start()
    outcomes = []
    try:
        number = 0
        while number < 60 or (rounds[0] < 2_000 and number < 2_000):
            number += 1
            try:
                outcomes.append("said" if house.deploy(trees[number % 2]) else "deployed")
            except IsochamberError as error:
                assert error.stage in ("home", "package")
                outcomes.append("failed")
    finally:
        stop.set()
        thread.join()
    assert {path.relative_to(outside).as_posix() for path in outside.rglob("*")} == set(before) - {"."}
    assert {path: state_of(path) for path in before} == before, "something of the host was touched"
    assert rounds[0] >= 2_000
    assert set(outcomes) & {"said", "failed"}, "the swaps never met a deployment: the test shows nothing"


# Any versions, and any tenant in between.

_PATHS = ["a", "b", "d", "d/a", "d/b", "d/e", "d/e/a", "d/e/b", "main"]
_TREES = st.dictionaries(st.sampled_from(_PATHS), st.one_of(st.none(), st.sampled_from(["1", "2", "#!1"])), max_size=6)
_DEEDS = st.lists(st.tuples(st.sampled_from(["write", "remove", "link"]), st.sampled_from(_PATHS)), max_size=4)


def _possible(tree: Tree) -> dict[str, str | None]:
    """Return the tree with every parent a directory."""
    made = dict(tree)
    for path in tree:
        made |= {str(parent): None for parent in Path(path).parents if str(parent) != "."}
    return made


def _do(deed: str, path: Path, root: Path) -> bool:
    """Do what a tenant might; says whether it could."""
    if any(parent.is_symlink() or not parent.is_dir() for parent in path.parents if root in (parent, *parent.parents)):
        return False
    if path.is_dir() and not path.is_symlink():
        if deed == "write":
            return False
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if deed == "write":
        path.write_text(f"the tenant's {path.name}")
    elif deed == "link":
        path.symlink_to("/nonexistent/target")
    return True


@PROPERTY
@given(st.lists(st.tuples(_TREES, _DEEDS), min_size=1, max_size=2), _TREES)
def test_deploying_twice_is_deploying_once_and_the_tenants_own_is_never_touched(
    tmp_path_factory: pytest.TempPathFactory, versions: list[tuple[Tree, list[tuple[str, str]]]], last: Tree
) -> None:
    house = _empty_house(tmp_path_factory)
    touched: set[str] = set()
    for tree, deeds in versions:
        house.deploy(_possible(tree))
        for deed, path in deeds:
            if _do(deed, house.home / path, house.home):
                touched.add(path)
    own = {
        path: value for path, value in house.seen().items()
        if value is not None and value.startswith(("the tenant's", "-> /nonexistent"))
    }  # fmt: skip
    wanted = _possible(last)
    house.deploy(wanted)
    seen = house.seen()
    assert {path: seen.get(path) for path in own} == own, "the tenant's own was touched"
    for path, content in wanted.items():
        if not any(path == other or Path(path) in Path(other).parents or Path(other) in Path(path).parents
                   for other in touched):  # fmt: skip
            assert seen[path] == content, f"{path} was not deployed"
    for path in set(seen) - set(own):
        kept_for_the_tenant = any(Path(path) in Path(other).parents for other in own)
        assert path in wanted or kept_for_the_tenant, f"{path} was left behind"
    assert house.current()
    house.deploy()
    assert house.seen() == seen
    assert not list(house.state.staging.iterdir())


_houses: dict[Path, House] = {}


def _empty_house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """One house for all examples, emptied."""
    directory = tmp_path_factory.getbasetemp() / "house"
    if directory not in _houses:
        directory.mkdir()
        _houses[directory] = House(directory)
    house = _houses[directory]
    shutil.rmtree(house.state.tenant_persist(house.tid))
    house.__post_init__()
    return house
