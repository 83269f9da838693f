"""containers.json as the launcher reads it: one wrong entry is one line, and nothing is started."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isochamber.errors import IsochamberError
from isochamber.launch import entry, lean
from tests.launch import tenants
from tests.launch.tenants import Tenant, write_entries

Change = tuple[str, Any]

WRONG: list[Change] = [
    ("tid", "short"), ("tid", "Z" * 32), ("tid", "../" + "a" * 29), ("tid", None), ("version", 2), ("version", True),
    ("argv", []), ("argv", "/bin/sh"), ("argv", [""]), ("argv", ["/bin/sh", 1]), ("argv", ["/bin/\0sh"]),
    ("env", []), ("env", {"A": 1}), ("env", {"A=B": "x"}), ("env", {"": "x"}), ("cwd", "home"), ("hostname", ""),
    ("uid_base", 0), ("uid_base", -1), ("uid_base", 1 << 32), ("uid_base", "1"), ("uid_base", 1.5), ("uid_count", 0),
    ("uid", 65536), ("uid", -1), ("gid", None), ("lowers", []), ("lowers", ["/etc"]), ("lowers", ["../x"]),
    ("lowers", ["a:b"]), ("lowers", ["a,b"]), ("lowers", ["a\\b"]), ("lowers", ["a//b"]), ("lowers", "base"),
    ("upper", "/tmp/x"), ("upper", "a/../b"), ("workdir", ""), ("overlay", "."), ("home", "/root"), ("home", None),
    ("ipc", "relative"), ("ipc", 1), ("network", "bridge"), ("net", {}), ("net", []), ("network", None),
    ("capabilities", "CHOWN"),
    ("tmpfs", {"tmp": -1}), ("tmpfs", {"tmp": "64M"}), ("tmpfs", []), ("rlimits", {"CORE": True}), ("rlimits", None),
    ("seccomp", None), ("seccomp", {}), ("seccomp", {"mode": "none", "filters": ["../x"], "learned": None}),
    ("seccomp", {"mode": "none", "filters": "0" * 40, "learned": None}),
    ("seccomp", {"mode": "none", "filters": [], "learned": "0" * 40}),
    ("seccomp", {"mode": "kill", "filters": [], "learned": None}),
    ("seccomp", {"mode": "shout", "filters": [], "learned": "0" * 40}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda value: str(value)[:20])
def test_a_wrong_field_is_one_line_that_names_it_and_nothing_starts(tenant: Tenant, key: str, value: Any) -> None:
    tenant.entry[key] = value
    done = tenant.run("/bin/echo", "must not run")
    assert (done.returncode, done.stdout) == (125, "")
    (line,) = done.stderr.splitlines()
    assert key.rstrip("s") in line or str(value) in line
    assert "containers.json" in line


@pytest.mark.parametrize("key", sorted(set(dict(WRONG)) - {"ipc"}))
def test_a_missing_field_is_one_line_too(tenant: Tenant, key: str) -> None:
    tenant.change()
    del tenant.entry[key]
    done = tenant.run()
    assert done.returncode == 125
    assert key in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged"), (b"[", "damaged"), (b"{}", "not a list"), (b"[\xff]", "damaged"), (b"[NaN]", "damaged"),
        (b"[" * 100000, "damaged"), (b"[\n]\n", "is not configured"), (b"[] []", "damaged"), (b"null", "not a list"),
        (b'[{"name": "other"}, 7, null]', "is not configured"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_told_from_one_that_lacks_the_tenant(tenant: Tenant, content: bytes, reason: str) -> None:
    tenant.containers.write_bytes(content)
    done = tenants.run(tenant.words())
    assert done.returncode == 125
    (line,) = done.stderr.splitlines()
    assert reason in line
    assert str(tenant.containers) in line


def test_no_file_says_how_one_is_made(tenant: Tenant) -> None:
    tenant.containers.unlink()
    done = tenants.run(tenant.words())
    assert done.returncode == 125
    assert f"./doit configure:{tenant.name}" in done.stderr


def test_an_entry_is_found_by_name_and_by_tid_among_many_however_the_file_is_laid_out(
    make_tenant: Callable[..., Tenant],
) -> None:
    first, second = make_tenant(), make_tenant()
    root = str(first.root)
    entries = [first.entry, second.entry]
    for write in (
        lambda: tenants.write_entries(first.containers, entries),
        lambda: first.containers.write_text(json.dumps(entries)),
        lambda: first.containers.write_text(json.dumps(entries, indent=4)),
    ):
        write()
        for wanted in entries:
            assert entry.read(root, wanted["name"]).tid == wanted["tid"]
            assert entry.read(root, wanted["tid"]).name == wanted["name"]


def test_a_tenant_named_like_anothers_tid_is_not_taken_for_it(make_tenant: Callable[..., Tenant]) -> None:
    first, second = make_tenant(), make_tenant()
    impostor = {**first.entry, "name": second.tid}
    tenants.write_entries(first.containers, [impostor, second.entry])
    assert entry.read(str(first.root), second.tid).name == second.name


def test_in_a_large_file_an_entry_is_found_by_reading_a_little_of_it(tenant: Tenant, tmp_path: Path) -> None:
    names = sorted(f"t{number}" for number in range(1500))
    write_entries(tmp_path / "containers.json", [{**tenant.entry, "name": name} for name in names])
    size = (tmp_path / "containers.json").stat().st_size
    for name in (*names[::97], names[0], names[-1]):
        before = _bytes_read()
        assert entry.read(str(tmp_path), name).name == name
        assert _bytes_read() - before < size / 4
    for name in ("a", "t5x", "z"):
        with pytest.raises(IsochamberError, match="is not configured"):
            entry.read(str(tmp_path), name)


@pytest.mark.parametrize("order", ["backwards", "one long line", "a long entry"])
def test_a_large_file_that_somebody_laid_out_otherwise_is_read_all_the_same(
    tenant: Tenant, tmp_path: Path, order: str
) -> None:
    names = sorted((f"t{number}" for number in range(1500)), reverse=order == "backwards")
    entries = [{**tenant.entry, "name": name} for name in names]
    if order == "a long entry":
        entries[700]["env"] = {"LONG": "x" * 100_000}
    write_entries(tmp_path / "containers.json", entries)
    if order == "one long line":
        (tmp_path / "containers.json").write_text(json.dumps(entries))
    for name in ("t3", "t999", names[700]):
        assert entry.read(str(tmp_path), name).name == name


def test_in_a_large_file_a_tid_goes_before_a_name(tenant: Tenant, tmp_path: Path) -> None:
    entries = [{**tenant.entry, "tid": f"{number:032x}", "name": f"t{number:04}"} for number in range(1500)]
    entries[3]["name"] = entries[700]["tid"]
    write_entries(tmp_path / "containers.json", sorted(entries, key=lambda one: str(one["name"])))
    assert entry.read(str(tmp_path), f"{700:032x}").name == "t0700"


def _bytes_read() -> int:
    """Return what this process has read until now (proc_pid_io(5))."""
    return int(Path("/proc/self/io").read_text().splitlines()[0].split()[1])


def test_a_name_that_another_entry_only_mentions_is_not_that_entry(make_tenant: Callable[..., Tenant]) -> None:
    first, second = make_tenant(), make_tenant()
    first.entry["argv"] = ["/bin/echo", second.name]
    tenants.write_entries(first.containers, [first.entry, second.entry])
    assert entry.read(str(first.root), second.name).tid == second.tid


@pytest.mark.parametrize(
    "changes",
    [
        {"home_fd": -1}, {"home_fd": "3"}, {"binds": {}}, {"binds": ["/x"]}, {"binds": [{"source": "/x"}]},
        {"binds": [{"source": "/x", "target": "y"}]}, {"timeout": 0}, {"timeout": "1"}, {"timeout": True},
    ],
)  # fmt: skip
def test_what_only_a_plan_has_is_checked_as_well(tenant: Tenant, changes: dict[str, Any]) -> None:
    with pytest.raises(IsochamberError) as caught:
        entry.Entry({**tenant.entry, **changes})
    assert any(word in caught.value.what for word in ("home_fd", "binds", "target", "timeout"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(value=JSON, ascii_only=st.booleans(), indent=st.none() | st.integers(0, 3))
def test_the_lean_parser_reads_what_json_writes(value: Any, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    try:
        content = text.encode()
    except UnicodeEncodeError:
        return  # a lone surrogate, which no file holds
    assert lean.parse(content) == json.loads(text)


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=60) | st.text(alphabet='{}[]",:0123456789.eE+-truefalsn\\u \n').map(str.encode))
def test_the_lean_parser_refuses_exactly_what_json_refuses(content: bytes) -> None:
    def outcome(parse: Callable[[bytes], object]) -> object:
        try:
            return parse(content)
        except ValueError:
            return ValueError

    def standard(raw: bytes) -> object:
        return json.loads(raw.decode(), parse_constant=lean._refuse_constant)

    assert outcome(lean.parse) == outcome(standard)


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_the_lean_quoting_is_jsons(text: str) -> None:
    assert lean.quote(text) == json.dumps(text)


def test_a_directory_in_the_files_place_is_one_line(tenant: Tenant) -> None:
    words = tenant.words()
    tenant.containers.unlink()
    tenant.containers.mkdir()
    done = tenants.run(words)
    tenant.containers.rmdir()
    assert done.returncode == 125
    (line,) = done.stderr.splitlines()
    assert "EISDIR" in line
