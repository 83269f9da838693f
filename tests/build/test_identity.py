"""Who a tenant is: the same tid and range through every loss, and never a range that somebody has."""

import itertools
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isochamber.build import identity, registry
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from tests.properties import PROPERTY

SLOTS = identity._SLOTS


@pytest.fixture
def state(tmp_path: Path) -> State:
    made = State(tmp_path / "state")
    made.create()
    return made


def _entry(state: State, who: identity.Identity, name: str) -> registry.Entry:
    return {"tid": who.tid, "name": name, "version": 1, "uid_base": who.uid_base, "uid_count": identity.UID_COUNT}


def test_a_tenant_has_a_tid_a_range_and_directories_of_its_own(state: State) -> None:
    assert identity.find(state, "one") is None
    who = identity.ensure(state, "one")
    assert (len(who.tid), int(who.tid, 16) > 0) == (32, True)
    assert identity.FIRST <= who.uid_base <= identity.LAST + 1 - identity.UID_COUNT
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
    assert abs(one.uid_base - two.uid_base) >= identity.UID_COUNT
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
    preferred = identity.FIRST + identity.preferred_slot(tid) * identity.UID_COUNT
    taken = {"tid": "f" * 32, "name": "other", "version": 1, "uid_base": preferred, "uid_count": identity.UID_COUNT}
    registry.put(state, taken)
    second = state.tenant_fs("e" * 32) / "upper"
    second.mkdir(parents=True)
    os.chown(second, preferred + identity.UID_COUNT, preferred + identity.UID_COUNT)
    assert identity.ensure(state, "one").uid_base == preferred + 2 * identity.UID_COUNT


def test_a_range_of_a_user_a_group_or_a_subordinate_of_the_host_is_passed_over(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    etc = tmp_path / "etc"
    etc.mkdir()
    base = identity.FIRST + identity.preferred_slot(state.tid("one")) * identity.UID_COUNT
    step = identity.UID_COUNT
    (etc / "passwd").write_text(f"root:x:0:0::/:/bin/sh\nodd\nuser:x:{base + 5}:0::/:/bin/sh\n")
    (etc / "group").write_text(f"group:x:{base + step + 65535}:\n")
    (etc / "subuid").write_text(f"user:{base + 2 * step}:1\nbroken:x:y\n")
    (etc / "subgid").write_text(f"user:{base + 3 * step - 1}:{2 * step + 1}\n")

    class Elsewhere(type(tmp_path)):  # type: ignore[misc] # a Path whose /etc is the test's
        def __new__(cls, *parts: object) -> Path:  # type: ignore[misc]
            return etc if parts == ("/etc",) else Path(*parts)  # type: ignore[arg-type]

    monkeypatch.setattr(identity, "Path", Elsewhere)
    assert identity.ensure(state, "one").uid_base == base + 5 * step


def test_when_every_range_is_taken_there_is_one_line() -> None:
    with pytest.raises(IsochamberError, match="every uid range of this machine is taken"):
        identity.first_free("0" * 32, set(range(SLOTS)))


@PROPERTY
@given(
    st.lists(st.uuids().map(lambda value: value.hex), unique=True, max_size=40),
    st.lists(st.tuples(st.integers(0, 1 << 32), st.integers(0, 1 << 20)), max_size=20),
    st.integers(0, SLOTS - 1),
)
def test_ranges_that_are_allocated_never_overlap_each_other_nor_what_is_taken(
    tids: list[str], others: list[tuple[int, int]], crowded: int
) -> None:
    taken = {slot for first, length in others for slot in identity.slots(first, first + length)}
    # Many that want the same slot, so that they have to give way to each other.
    tids = [*tids, *(f"{crowded:012x}{number:020x}" for number in range(5))]
    ranges = []
    for tid in dict.fromkeys(tids):
        base = identity.first_free(tid, taken)
        taken.add((base - identity.FIRST) // identity.UID_COUNT)
        ranges.append((base, base + identity.UID_COUNT - 1))
    assert all(first >= identity.FIRST and last <= identity.LAST for first, last in ranges)
    ordered = sorted([*ranges, *((first, first + length) for first, length in others)])
    ours = set(ranges)
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
    found = identity.slots(first, last)
    for slot in (*found, found.start - 1, found.stop):
        low = identity.FIRST + slot * identity.UID_COUNT
        touches = low <= last and first <= low + identity.UID_COUNT - 1 and 0 <= slot < SLOTS
        assert (slot in found) == touches
