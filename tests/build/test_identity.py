"""Who a tenant is: the same tid and range through every loss, and never a range that somebody has."""

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isochamber import paths
from isochamber.build import identity, ranges, registry
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from tests.properties import PROPERTY

SLOTS = ranges.SLOTS


@pytest.fixture
def state(tmp_path: Path) -> State:
    made = State(tmp_path / "state")
    made.create()
    return made


def _entry(state: State, who: identity.Identity, name: str) -> registry.Entry:
    return {"tid": who.tid, "name": name, "version": 1, "uid_base": who.uid_base, "uid_count": ranges.UID_COUNT}


def test_a_tenant_has_a_tid_a_range_and_directories_of_its_own(state: State) -> None:
    assert identity.find(state, "one") is None
    who = identity.ensure(state, "one")
    assert (len(who.tid), int(who.tid, 16) > 0) == (32, True)
    assert ranges.FIRST <= who.uid_base <= ranges.LAST + 1 - ranges.UID_COUNT
    for name, owner in (("upper", who.uid_base), ("workdir", who.uid_base), ("overlay", 0)):
        status = (state.tenant_fs(who.tid) / name).stat()
        assert (status.st_uid, status.st_gid) == (owner, owner)
    home = (state.tenant_persist(who.tid) / "home").stat()
    assert (home.st_uid, home.st_mode & 0o7777) == (0, 0o755)
    assert identity.find(state, "one") == who
    assert not list(state.staging.iterdir())


def test_the_same_name_has_the_same_identity_and_another_has_another(state: State, tmp_path: Path) -> None:
    one, two = identity.ensure(state, "one"), identity.ensure(state, "two")
    assert one.tid != two.tid
    assert abs(one.uid_base - two.uid_base) >= ranges.UID_COUNT
    assert identity.ensure(state, "one") == one
    other = State(tmp_path / "other")
    other.create()
    assert identity.ensure(other, "one").tid != one.tid, "two state directories share tids"


def test_identity_survives_the_deletion_of_containers_json(state: State) -> None:
    made = {name: identity.ensure(state, name) for name in ("one", "two", "three")}
    for name, who in made.items():
        registry.put(state, _entry(state, who, name))
    state.containers.unlink()
    assert {name: identity.ensure(State(state.root), name) for name in made} == made


def test_a_damaged_containers_json_stops_no_allocation(state: State) -> None:
    state.containers.write_text("{")
    assert identity.find(state, "one") is None
    assert identity.ensure(state, "one") == identity.find(state, "one")


@pytest.mark.parametrize("lost", ["upper", "workdir", "overlay", "home", "upper and workdir"])
def test_a_lost_part_is_made_again_with_the_same_range(state: State, lost: str) -> None:
    who = identity.ensure(state, "one")
    before = {path: path.stat().st_ino for path in (*state.tenant_fs(who.tid).iterdir(), state.tenant_persist(who.tid))}
    for part in lost.split(" and "):
        directory = state.tenant_persist(who.tid) if part == "home" else state.tenant_fs(who.tid)
        shutil.rmtree(directory / part)
    if lost == "upper and workdir":
        (state.tenant_fs(who.tid) / "upper.b").mkdir()
        os.chown(state.tenant_fs(who.tid) / "upper.b", who.uid_base, who.uid_base)
    assert identity.find(state, "one") is None
    assert identity.ensure(state, "one") == who
    assert identity.find(state, "one") == who
    kept = {path: inode for path, inode in before.items() if path.name not in lost.split(" and ")}
    assert {path: path.stat().st_ino for path in kept} == kept, "what was not lost was made anew"


def test_when_all_is_lost_but_the_namespace_the_tid_and_mostly_the_range_are_the_same(state: State) -> None:
    who = identity.ensure(state, "one")
    shutil.rmtree(state.tenant_fs(who.tid))
    assert identity.ensure(state, "one") == who


def test_a_range_that_another_tenant_has_by_its_entry_or_its_directory_is_passed_over(state: State) -> None:
    tid = state.tid("one")
    preferred = ranges.FIRST + ranges.preferred_slot(tid) * ranges.UID_COUNT
    taken = {"tid": "f" * 32, "name": "other", "version": 1, "uid_base": preferred, "uid_count": ranges.UID_COUNT}
    registry.put(state, taken)
    second = state.tenant_fs("e" * 32) / "upper"
    second.mkdir(parents=True)
    os.chown(second, preferred + ranges.UID_COUNT, preferred + ranges.UID_COUNT)
    assert identity.ensure(state, "one").uid_base == preferred + 2 * ranges.UID_COUNT


def test_a_range_of_a_user_a_group_or_a_subordinate_of_the_host_is_passed_over(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    etc = tmp_path / "etc"
    etc.mkdir()
    base = ranges.FIRST + ranges.preferred_slot(state.tid("one")) * ranges.UID_COUNT
    step = ranges.UID_COUNT
    (etc / "passwd").write_text(f"root:x:0:0::/:/bin/sh\nodd\nuser:x:{base + 5}:0::/:/bin/sh\n")
    (etc / "group").write_text(f"group:x:{base + step + 65535}:\n")
    (etc / "subuid").write_text(f"user:{base + 2 * step}:1\nbroken:x:y\n")
    (etc / "subgid").write_text(f"user:{base + 3 * step - 1}:{2 * step + 1}\n")

    monkeypatch.setattr(ranges, "ETC", etc)
    assert identity.ensure(state, "one").uid_base == base + 5 * step


def _preferred(state: State, name: str) -> int:
    return ranges.FIRST + ranges.preferred_slot(state.tid(name)) * ranges.UID_COUNT


def _taken_directory(state: State, tid: str, uid_base: int) -> Path:
    """Make what another process would have made of a tenant."""
    upper = state.tenant_fs(tid) / "upper"
    upper.mkdir(parents=True)
    os.chown(upper, uid_base, uid_base)
    return upper.parent


def test_an_allocation_sees_what_came_and_went_since_the_last_one_of_its_process(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "ETC", tmp_path)
    monkeypatch.setattr(ranges, "_BELIEVED", 3600.0)  # a change is seen because it is one, and not by chance
    identity.ensure(state, "first")
    step = ranges.UID_COUNT

    made = _taken_directory(state, "e" * 32, _preferred(state, "a directory"))
    assert identity.ensure(state, "a directory").uid_base == _preferred(state, "a directory") + step
    shutil.rmtree(made)
    shutil.rmtree(state.tenant_fs(state.tid("a directory")))
    assert identity.ensure(state, "a directory").uid_base == _preferred(state, "a directory"), "freed"

    (state.tenant_fs("d" * 32)).mkdir()
    identity.ensure(state, "between")
    upper = state.tenant_fs("d" * 32) / "upper"
    upper.mkdir()
    os.chown(upper, _preferred(state, "late"), 0)
    assert identity.ensure(state, "late").uid_base == _preferred(state, "late") + step, "in a directory that was there"

    (tmp_path / "subuid").write_text(f"user:{_preferred(state, 'a file')}:1\n")
    assert identity.ensure(state, "a file").uid_base == _preferred(state, "a file") + step
    (tmp_path / "subuid").write_text(f"user:{_preferred(state, 'another file')}:1\n")
    assert identity.ensure(state, "another file").uid_base == _preferred(state, "another file") + step
    (tmp_path / "subuid").unlink()

    other = {"tid": "f" * 32, "name": "other", "version": 1, "uid_count": step}
    for name in ("an entry", "an entry again"):
        registry.put(state, {**other, "uid_base": _preferred(state, name)})
        assert identity.ensure(state, name).uid_base == _preferred(state, name) + step
    state.tenant_fs(str(other["tid"])).mkdir()  # else its entry would be that of one that was deleted
    with registry.together(state):
        for name in ("held back", "held back too"):
            registry.put(state, {**other, "uid_base": _preferred(state, name)})
            assert identity.ensure(state, name).uid_base == _preferred(state, name) + step


def test_processes_that_allocate_by_turns_never_give_the_same_range(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them prefer the same few slots, and each remembers what it saw."""
    monkeypatch.setattr(ranges, "_BELIEVED", 3600.0)
    monkeypatch.setattr(ranges, "preferred_slot", lambda tid: int(tid[:12], 16) % 3)
    identity.ensure(state, "before")  # known to both by memory
    children: list[tuple[int, int, int]] = []
    for _ in range(2):
        orders, said = os.pipe(), os.pipe()
        if (pid := os.fork()) == 0:
            status = 1
            for end in (orders[1], *(child[1] for child in children)):
                os.close(end)  # else nobody would hear the end of them
            try:
                while name := os.read(orders[0], 64).decode():
                    os.write(said[1], b"%d\n" % identity.ensure(state, name).uid_base)
                status = 0
            finally:
                os._exit(status)
        os.close(orders[0])
        os.close(said[1])
        children.append((pid, orders[1], said[0]))
    given: dict[str, int] = {}

    def ask(child: int, name: str) -> int:
        _, order, answer = children[child]
        os.write(order, name.encode())
        return int(os.read(answer, 64))

    for turn in range(24):
        name = f"tenant{turn}"
        given[name] = ask(turn // (1 + turn % 3) % 2, name)
    assert len(set(given.values())) == len(given)
    # A directory that both know is lost, its range given away, and it gets another one from one of them.
    lost = next(name for name in given if given[name] < ranges.FIRST + 5 * ranges.UID_COUNT)
    shutil.rmtree(state.tenant_fs(state.tid(lost)))
    (state.tenant_fs(state.tid(lost))).mkdir()
    given["instead"] = ask(0, "instead")
    given[lost] = ask(0, lost)
    given["last"] = ask(1, "last")
    assert len(set(given.values())) == len(given)
    for _, *ends in children:  # all of them first: the second child has copies of the first one's
        for end in ends:
            os.close(end)
    for pid, *_ in children:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_tenant_more_is_looked_at_no_more_often_the_more_there_are(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "_BELIEVED", 3600.0)
    monkeypatch.setattr(ranges, "_LONGEST_NEWS", 33 * 60)  # one change of the file falls into the second half
    calls: list[str] = []
    for name in ("lstat", "listdir"):
        real = getattr(os, name)

        def counting(path: str | Path, name: str = name, real: Callable[..., object] = real) -> object:
            calls.append(name)
            return real(path)

        monkeypatch.setattr(os, name, counting)
    counted = []
    for part in range(4):
        calls.clear()
        for number in range(50):
            identity.ensure(state, f"tenant{part}-{number}")
        counted.append({name: calls.count(name) for name in ("lstat", "listdir")})
    assert counted[0]["listdir"] < 50, counted
    first, *_, last = counted
    assert last["lstat"] <= first["lstat"] + 2 * 200, counted


def test_the_news_are_kept_short_and_nothing_is_missed_when_they_begin_anew(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "_LONGEST_NEWS", 33 * 3)
    monkeypatch.setattr(ranges, "preferred_slot", lambda _tid: 0)
    news = Path(paths.product_lock(state.identifier, "identities-news"))
    made, sizes = [], []
    for number in range(20):
        made.append(identity.ensure(state, f"tenant{number}").uid_base)
        sizes.append(news.stat().st_size if news.exists() else 0)
    assert len(set(made)) == 20
    assert (min(sizes), max(sizes) <= 33 * 4) == (0, True)


def test_when_every_range_is_taken_there_is_one_line() -> None:
    with pytest.raises(IsochamberError, match="every uid range of this machine is taken"):
        ranges.first_free("0" * 32, set(range(SLOTS)))


@PROPERTY
@given(
    st.lists(st.uuids().map(lambda value: value.hex), unique=True, max_size=40),
    st.lists(st.tuples(st.integers(0, 1 << 32), st.integers(0, 1 << 20)), max_size=20),
    st.integers(0, SLOTS - 1),
)
def test_ranges_that_are_allocated_never_overlap_each_other_nor_what_is_taken(
    tids: list[str], others: list[tuple[int, int]], crowded: int
) -> None:
    taken = {slot for first, length in others for slot in ranges.slots(first, first + length)}
    # Many that want the same slot, so that they have to give way to each other.
    tids = [*tids, *(f"{crowded:012x}{number:020x}" for number in range(5))]
    given = []
    for tid in dict.fromkeys(tids):
        base = ranges.first_free(tid, taken)
        taken.add((base - ranges.FIRST) // ranges.UID_COUNT)
        given.append((base, base + ranges.UID_COUNT - 1))
    assert all(first >= ranges.FIRST and last <= ranges.LAST for first, last in given)
    ordered = sorted([*given, *((first, first + length) for first, length in others)])
    ours = set(given)
    for one, two in itertools.pairwise(ordered):
        assert one[1] < two[0] or not {one, two} & ours, f"{one} and {two} overlap"
    highest = -1
    for first, last in ordered:
        assert first > highest or (first, last) not in ours
        highest = max(highest, last)


@PROPERTY
@given(st.integers(0, 1 << 32), st.integers(0, 1 << 20))
def test_slots_are_exactly_those_that_an_interval_touches(first: int, length: int) -> None:
    last = first + length
    found = ranges.slots(first, last)
    for slot in (*found, found.start - 1, found.stop):
        low = ranges.FIRST + slot * ranges.UID_COUNT
        touches = low <= last and first <= low + ranges.UID_COUNT - 1 and 0 <= slot < SLOTS
        assert (slot in found) == touches
