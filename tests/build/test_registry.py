"""containers.json: whatever is put comes back, one entry a line, whole at every moment."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isochamber.build import registry
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from tests.properties import PROPERTY


@pytest.fixture
def state(tmp_path: Path) -> State:
    made = State(tmp_path / "state")
    made.create()
    return made


def _entry(number: int, **more: Any) -> registry.Entry:
    return {"tid": f"{number:032x}", "name": f"t{number}", "version": 1, "uid_base": 1, "uid_count": 2, **more}


def _directories(state: State, count: int) -> None:
    """What tenants have whose entries may be held back: one without was deleted meanwhile."""
    for number in range(count):
        state.tenant_fs(_entry(number)["tid"]).mkdir()


_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(1 << 62), 1 << 62), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=4,
)
_ENTRIES = st.builds(
    lambda number, more: _entry(number, **{f"x{key}": value for key, value in more.items()}),
    st.integers(0, 9), st.dictionaries(st.text(max_size=5), _VALUES, max_size=2),
)  # fmt: skip


@PROPERTY
@given(st.lists(_ENTRIES, unique_by=lambda entry: entry["tid"], max_size=4))
def test_what_is_encoded_is_decoded_again_and_lies_one_entry_a_line(entries: list[registry.Entry]) -> None:
    wanted = {entry["tid"]: entry for entry in entries}
    content = registry.encode(wanted)
    assert registry.decode(content) == wanted
    assert registry.encode(dict(reversed(wanted.items()))) == content, "the order of insertion shows"
    lines = content.decode("ascii").splitlines()
    assert [lines[0], lines[-1]] == ["[", "]"]
    assert [json.loads(line.removesuffix(","))["name"] for line in lines[1:-1]] == sorted(
        entry["name"] for entry in entries
    )


@PROPERTY
@given(st.lists(st.tuples(st.sampled_from(["put", "remove"]), st.builds(_entry, st.integers(0, 4))), max_size=5))
def test_puts_and_removals_leave_what_a_dictionary_would(
    tmp_path_factory: pytest.TempPathFactory, deeds: list[tuple[str, registry.Entry]]
) -> None:
    state = State(tmp_path_factory.getbasetemp() / "registry")
    state.create()
    state.containers.unlink(missing_ok=True)
    model: dict[str, registry.Entry] = {}
    for deed, entry in deeds:
        if deed == "put":
            registry.put(state, entry)
            model[entry["tid"]] = entry
        else:
            registry.remove(state, entry["tid"])
            model.pop(entry["tid"], None)
        assert registry.read(state) == model
        assert registry.find(state, entry["name"]) == registry.find(state, entry["tid"]) == model.get(entry["tid"])
    assert not [path for path in state.root.iterdir() if path.name.startswith(".tmp")]


def test_writing_the_same_again_writes_nothing(state: State) -> None:
    registry.put(state, _entry(1))
    before = state.containers.stat()
    registry.put(state, _entry(1))
    registry.remove(state, _entry(2)["tid"])
    after = state.containers.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert after.st_mode & 0o777 == 0o600


DAMAGED = {
    "nothing": b"", "half": b'[\n{"tid": "', "a mapping": b"{}", "null": b"null", "NULs": b"\0" * 100,
    "not UTF-8": b'["\xff"]', "deep": b"[" * 100_000, "a long number": b"[" + b"9" * 5000 + b"]",
    "another version": json.dumps([_entry(1, version=2)]).encode(), "no version": b'[{"tid": "a", "name": "b"}]',
    "no range": json.dumps([_entry(1, uid_base=None)]).encode(), "a list of texts": b'["a"]',
    "a tid twice": json.dumps([_entry(1), _entry(1, name="b")]).encode(),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_one_line_that_says_how_to_get_it_back_and_is_put_aside_by_the_next_write(
    state: State, kind: str
) -> None:
    state.containers.write_bytes(DAMAGED[kind])
    with pytest.raises(IsochamberError, match="is damaged") as caught:
        registry.read(state)
    assert "run ./doit" in caught.value.line()
    assert registry.read(state, salvage=True) == {}
    assert state.containers.read_bytes() == DAMAGED[kind]
    registry.put(state, _entry(1))
    assert list(registry.read(state).values()) == [_entry(1)]
    assert (state.root / "containers.json.damaged").read_bytes() == DAMAGED[kind]


def test_of_a_damaged_file_the_entries_on_whole_lines_are_kept(state: State) -> None:
    for number in range(3):
        registry.put(state, _entry(number, name=f"t{number}"))
    lines = state.containers.read_bytes().splitlines(keepends=True)
    state.containers.write_bytes(b"".join(lines[:2]) + lines[2][:40] + b"\0\0\n" + b"".join(lines[3:]))
    assert {entry["name"] for entry in registry.read(state, salvage=True).values()} == {"t0", "t2"}
    registry.put(state, _entry(1, name="t1"))
    assert {entry["name"] for entry in registry.read(state).values()} == {"t0", "t1", "t2"}


def test_a_symlink_for_the_file_is_not_followed(state: State, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(registry.encode({}))
    state.containers.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IsochamberError):
        registry.read(state)


def test_many_writers_lose_nothing_and_a_reader_never_sees_a_part(state: State) -> None:
    failed: list[BaseException] = []
    stop = threading.Event()
    seen = [0]

    def read() -> None:
        try:
            while not stop.is_set():
                if state.containers.exists():
                    seen[0] = max(seen[0], len(registry.decode(state.containers.read_bytes())))
        except BaseException as error:
            failed.append(error)

    def write(first: int) -> None:
        try:
            for number in range(first, first + 10):
                registry.put(state, _entry(number))
        except BaseException as error:
            failed.append(error)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(10 * number,)) for number in range(4)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert not failed
    assert len(registry.read(state)) == 40
    assert len(os.listdir(state.root)) == len({*os.listdir(state.root)} - {".tmp"})


def test_what_is_put_together_counts_at_once_for_its_process_and_is_in_the_file_at_the_end(state: State) -> None:
    alone = State(state.root.parent / "alone")
    alone.create()
    writes = 0
    _directories(state, 50)
    with registry.together(state):
        for number in range(50):
            before = state.containers.stat().st_ino if state.containers.exists() else 0
            registry.put(state, _entry(number))
            registry.put(alone, _entry(number))
            assert registry.read(state)[_entry(number)["tid"]] == _entry(number)
            assert registry.is_whole(state)
            writes += before != state.containers.stat().st_ino
        assert writes < 50, "every put writes the file"
        registry.remove(state, _entry(3)["tid"])
        registry.remove(alone, _entry(3)["tid"])
        assert _entry(3)["tid"] not in registry.read(state)
    assert state.containers.read_bytes() == alone.containers.read_bytes()


def test_a_file_that_can_not_be_written_is_said_at_the_end_of_what_was_put_together(state: State) -> None:
    _directories(state, 3)
    registry.put(state, _entry(0))
    with pytest.raises(IsochamberError, match="containers"), registry.together(state):
        registry.put(state, _entry(1))
        registry._together.due = float("inf")  # type: ignore[union-attr] # as after a slow write
        registry.put(state, _entry(2))
        state.staging.rename(state.root / "elsewhere")
    assert list(registry.read(state).values()) == [_entry(0), _entry(1)]


def test_a_process_forked_meanwhile_writes_its_own_puts(state: State) -> None:
    _directories(state, 3)
    with registry.together(state):
        registry.put(state, _entry(0))
        registry._together.due = float("inf")  # type: ignore[union-attr] # as after a slow write
        child = os.fork()
        if child == 0:
            registry.put(state, _entry(1))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert registry.read(state).keys() == {_entry(0)["tid"], _entry(1)["tid"]}
        registry.put(state, _entry(2))
    assert len(registry.read(state)) == 3
