"""Deleting and pruning: everything of it, nothing beside it, through no link, however deep the tree."""

import concurrent.futures
import fcntl
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from isochamber import paths
from isochamber.build import backup, durable, entry, gc, identity, locks, ranges, registry, sandbox, tree
from isochamber.build.pipeline import Pipeline
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import pins
from isochamber.spec.model import Spec
from tests.build.products import Lines, eventually


@pytest.fixture
def state(tmp_path: Path) -> State:
    made = State(tmp_path / "state")
    made.create()
    return made


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What must not be touched."""
    made = tmp_path / "outside"
    made.mkdir()
    (made / "canary").write_text("alive")
    return made


def _spec(state: State, *names: str) -> Spec:
    return Spec(Path("/tenants.yaml"), state.root, {}, dict.fromkeys(names))  # type: ignore[arg-type] # names only


def _tenant(state: State, name: str, *lowers: str) -> identity.Identity:
    who = identity.ensure(state, name)
    registry.put(
        state,
        {
            "tid": who.tid,
            "name": name,
            "version": 1,
            "uid_base": who.uid_base,
            "uid_count": 65536,
            "lowers": list(lowers),
        },
    )
    return who


def _product(state: State, kind: str, name: str, *, complete: bool = True) -> str:
    directory = state.root / kind / name
    (directory / "rootfs").mkdir(parents=True)
    (directory / "rootfs/file").write_text("x" * 10_000)
    if complete:
        (directory / "manifest.json").write_text("{}")
    return f"{kind}/{name}/rootfs"


def make_deep(directory: Path, depth: int, name: str = "d" * 200) -> None:
    """Make a tree that no path can name (PATH_MAX is 4,096) and no recursion can walk."""
    descriptor = os.open(directory, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=descriptor)
        with open(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor), "w"):
            pass
        below = os.open(name, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)


def _fill_with_hostility(directory: Path, outside: Path) -> None:
    """What a tenant leaves so that its removal fails or removes something else."""
    make_deep(directory, 1_500)
    wide = directory / "wide"
    wide.mkdir()
    for number in range(500):
        (wide / f"{number}").mkdir()
    (directory / "to-directory").symlink_to(outside)
    (directory / "to-file").symlink_to(outside / "canary")
    (directory / "to-root").symlink_to("/")
    (directory / "dangling").symlink_to("nowhere")
    os.link(outside / "canary", directory / "hard")
    os.mkfifo(directory / "fifo")
    os.mknod(directory / "null", 0o020666, os.makedev(1, 3))
    locked = directory / "locked"
    locked.mkdir()
    (locked / "inside").write_text("")
    locked.chmod(0)
    for name in (b"\xff\xfe", b"a\nb", b"-rf", b"\x1b[2J", b"x" * 255):
        with open(os.path.join(os.fsencode(directory), name), "w"):
            pass


def test_delete_removes_a_hostile_tenant_whole_and_nothing_through_its_links(state: State, outside: Path) -> None:
    base = _product(state, "base_fs", "default-1")
    who, spared = _tenant(state, "doomed", base), _tenant(state, "spared", base)
    for directory in (state.tenant_fs(who.tid) / "upper", state.tenant_persist(who.tid) / "home"):
        _fill_with_hostility(directory, outside)
    before = len(os.listdir("/proc/self/fd"))
    gc.delete(state, "doomed", Lines())
    assert len(os.listdir("/proc/self/fd")) == before
    assert sorted(path.name for path in outside.iterdir()) == ["canary"]
    assert (outside / "canary").read_text() == "alive"
    assert (outside / "canary").stat().st_nlink == 1
    assert not [path for path in state.root.rglob("*") if who.tid in path.name or path.name.startswith(".tmp")]
    assert identity.find(state, "spared") == spared
    assert list(registry.read(state)) == [spared.tid]


def test_the_usual_way_fails_on_such_a_tree(state: State, outside: Path) -> None:
    """The control: the standard library can't remove it."""
    directory = outside / "deep"
    directory.mkdir()
    make_deep(directory, 1_500)
    with pytest.raises((RecursionError, OSError)):
        shutil.rmtree(directory)
    durable.remove_tree(directory)
    assert sorted(path.name for path in outside.iterdir()) == ["canary"]


@pytest.mark.parametrize(
    "name", ["nobody", "", ".", "..", "../..", "a/b", "x" * 5000, "a\0b", "\ud800", "home", "\x1b[2J"]
)
def test_deleting_what_is_no_tenant_is_one_line(state: State, name: str) -> None:
    who = _tenant(state, "one")
    before = sorted(path.name for path in state.root.rglob("*"))
    with pytest.raises(IsochamberError, match="there is no such tenant") as caught:
        gc.delete(state, name, Lines())
    assert "\x1b" not in caught.value.line()
    assert sorted(path.name for path in state.root.rglob("*")) == before
    assert list(registry.read(state)) == [who.tid]


def test_deleting_takes_the_namespaces_of_an_install_script_whose_build_was_killed(state: State) -> None:
    who = identity.ensure(state, "sensor")
    run = sandbox.build_tid(who.tid)
    for descriptor in pins.ensure(run, who.uid_base, ranges.UID_COUNT):
        os.close(descriptor)
    gc.delete(state, "sensor", Lines())
    assert run not in Path("/proc/self/mountinfo").read_text()
    assert not Path(paths.namespace_pin(run, "user")).parent.exists()
    assert not Path(paths.tenant_lock(run)).exists()


@pytest.mark.parametrize("by", ["name", "tid"])
def test_a_tenant_without_an_entry_can_be_deleted_by_name_and_by_tid(state: State, by: str) -> None:
    who = identity.ensure(state, "one")
    gc.delete(state, who.tid if by == "tid" else "one", Lines())
    assert identity.find(state, "one") is None
    assert not list((state.root / "tenants_fs").iterdir())
    assert not list((state.root / "tenants_persist").iterdir())


def test_a_cut_in_the_middle_of_a_deletion_is_finished_by_prune(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each directory that it removes; nothing of it is left under any name."""
    real = tree.remove_contents
    cuts = 0
    done = False
    while not done:
        who = _tenant(state, "doomed")
        make_deep(state.tenant_fs(who.tid) / "upper", 3)
        calls = [0]

        def cut(root: int, calls: list[int] = calls, after: int = cuts) -> None:
            if calls[0] == after:
                raise KeyboardInterrupt
            calls[0] += 1
            real(root)

        with monkeypatch.context() as patch:
            patch.setattr(tree, "remove_contents", cut)
            try:
                gc.delete(state, "doomed", Lines())
                done = True
            except KeyboardInterrupt:
                cuts += 1
        gc.prune(state, _spec(state), Lines())
        left = [path for path in state.root.rglob("*") if who.tid in path.name or path.name.startswith(".tmp")]
        assert not left, f"after {cuts} steps"
    assert cuts == 2, "there was nothing to cut"


def test_prune_keeps_what_a_tenant_stands_on_and_removes_the_rest_with_its_size(state: State, outside: Path) -> None:
    used = [_product(state, "layers", "used-1"), _product(state, "base_fs", "default-1")]
    _product(state, "layers", "unused-1")
    _product(state, "base_fs", "old-1")
    _product(state, "base_fs", "half-1", complete=False)
    _fill_with_hostility(state.root / "layers/unused-1/rootfs", outside)
    kept, gone = _tenant(state, "kept", *used), _tenant(state, "gone", "layers/unused-1/rootfs", used[1])
    (state.staging / ".tmp-half").mkdir()
    (state.root / "cache/old").write_text("x" * 5000)
    (state.root / "cache/link").symlink_to(outside)
    leftover = state.tenant_fs(kept.tid) / ".tmp-0123"
    leftover.mkdir()
    removed = gc.prune(state, _spec(state, "kept"), Lines())
    assert {(kind, name) for kind, name, _ in removed} == {
        ("tenant", "gone"), ("layer", "unused-1"), ("base", "old-1"), ("remains", "half-1"),
        ("remains", f"tenants_fs/{kept.tid}/.tmp-0123"),
        ("staging", "staging/.tmp-half"), ("cache", "cache/old"), ("cache", "cache/link"),
    }  # fmt: skip
    sizes = {name: size for _, name, size in removed}
    assert sizes["old-1"] >= 10_000
    assert sizes["cache/old"] == 5000
    assert all((state.root / lower / "file").exists() for lower in used)
    assert identity.find(state, "kept") == kept
    assert identity.find(state, "gone") is None
    assert gone.tid not in registry.read(state)
    assert (outside / "canary").read_text() == "alive"
    assert gc.prune(state, _spec(state, "kept"), Lines()) == []


def test_prune_of_a_state_directory_that_is_not_there_makes_nothing(tmp_path: Path) -> None:
    state = State(tmp_path / "nothing")
    assert gc.prune(state, _spec(state), Lines()) == []
    assert not state.root.exists()


def test_prune_waits_until_nobody_builds_and_builders_do_not_wait_for_each_other(state: State) -> None:
    _product(state, "layers", "just-built")
    lines = Lines()
    with locks.building(state, lines.say):
        with locks.building(state, lines.say):
            assert lines.said == []
        pruning = threading.Thread(target=gc.prune, args=(state, _spec(state), lines))
        pruning.start()
        assert eventually(lambda: bool(lines.said)), "prune did not say that it waits"
        assert "waiting for builds" in lines.said[0]
        assert (state.root / "layers/just-built").exists()
    pruning.join(60)
    assert not (state.root / "layers/just-built").exists()


def test_prune_waits_for_the_whole_of_a_run_that_builds_and_not_only_for_its_tasks(state: State) -> None:
    """Between two tasks of one ./doit nothing is being built, and the layer just made has no entry yet."""
    pipeline = Pipeline(_spec(state), Lines())
    pipeline.hold()
    pipeline.hold()
    _product(state, "layers", "just-built")
    waits, child = os.pipe(), 0
    try:
        child = os.fork()
        if child == 0:
            os.close(locks._held.popitem()[1])  # another process prunes, which holds nothing
            reporter = Lines()
            reporter.say = lambda text: os.write(waits[1], text.encode())  # type: ignore[assignment,method-assign]
            gc.prune(state, _spec(state), reporter)
            os._exit(0)
        os.close(waits[1])
        assert os.read(waits[0], 100).startswith(b"waiting for builds")
        assert (state.root / "layers/just-built").exists()
        locks.let_builds_go()
        assert os.waitpid(child, 0)[1] == 0
        assert not (state.root / "layers/just-built").exists()
    finally:
        locks.let_builds_go()
        os.close(waits[0])


def _waits_for_builds(state: State) -> bool:
    """Say whether another process that prunes would wait."""
    with Path(paths.product_lock(state.identifier, "builds")).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_who_builds_and_prunes_in_one_run_does_not_wait_for_itself_and_holds_what_it_held(state: State) -> None:
    try:
        Pipeline(_spec(state), Lines()).hold()
        _product(state, "layers", "just-built")
        assert [kind for kind, _, _ in gc.prune(state, _spec(state), Lines())] == ["layer"]
        assert _waits_for_builds(state)
    finally:
        locks.let_builds_go()
    assert not _waits_for_builds(state)


def test_a_prune_of_a_process_of_the_run_does_not_wait_for_the_others(state: State) -> None:
    """What ``./doit -n 2 prune configure`` does: the lock was taken before its processes were forked."""
    try:
        Pipeline(_spec(state), Lines()).hold()
        _product(state, "layers", "just-built")
        child = os.fork()
        if child == 0:
            gc.prune(state, _spec(state), Lines())
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert not (state.root / "layers/just-built").exists()
        assert _waits_for_builds(state)
    finally:
        locks.let_builds_go()


def test_a_prune_in_a_run_takes_nothing_that_an_entry_refers_to_which_is_held_back(state: State) -> None:
    """Another prune may come first, and reads the file."""
    product = _product(state, "layers", "referred-to")
    with registry.together(state):
        for number in range(2):  # the first is written at once
            _tenant(state, f"t{number}", product)
            registry._together.due = float("inf")  # type: ignore[union-attr] # as after a slow write
        assert len(json.loads(state.containers.read_text())) == 1, "nothing is held back"
        gc.prune(state, _spec(state, "t0", "t1"), Lines())
        assert len(json.loads(state.containers.read_text())) == 2


def test_a_tenant_that_was_deleted_while_its_entry_was_held_back_does_not_come_again(state: State) -> None:
    with registry.together(state):
        for name in ("stays", "goes"):
            registry._together.due = float("inf")  # type: ignore[union-attr] # as after a slow write
            _tenant(state, name)
        child = os.fork()  # it reads the file, which does not hold them yet
        if child == 0:
            gc.delete(state, "goes", Lines())
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert [entry["name"] for entry in registry.read(state).values()] == ["stays"]


@pytest.mark.parametrize("what", ["rollback", "backup"])
def test_what_waited_for_a_tenant_that_was_deleted_says_so(state: State, tmp_path: Path, what: str) -> None:
    tid = _tenant(state, "sensor").tid
    steps = {
        "rollback": lambda: entry.rollback(state, "sensor"),
        "backup": lambda: backup.backup(state, "sensor", tmp_path / "sensor.tar.zst"),
    }
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with locks.product_lock(state, f"tenant-{tid}", lambda _line: None):
            inode = Path(paths.product_lock(state.identifier, f"tenant-{tid}")).stat().st_ino
            asked = pool.submit(steps[what])
            assert eventually(lambda: _somebody_waits(inode)), "nobody waits for the tenant's lock"
            registry.remove(state, tid)
        with pytest.raises(IsochamberError, match="was removed meanwhile") as raised:
            asked.result(60)
    assert raised.value.stage == what
    assert not (tmp_path / "sensor.tar.zst").exists()


def _somebody_waits(inode: int) -> bool:
    waiting = [line.split() for line in Path("/proc/locks").read_text().splitlines() if " -> " in line]
    return any(words[6].endswith(f":{inode}") for words in waiting)


def test_a_prune_passes_over_a_tenant_that_is_deleted_meanwhile(state: State) -> None:
    assert durable.stale_stages(state.tenant_fs("0" * 32)) == []
