"""Every kind of mistake in tenants.yaml is a line with its place; all of them come at once, and nothing is touched."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isochamber.errors import SpecError
from isochamber.spec import document, load, validate
from isochamber.spec.model import Seccomp, Spec
from tests.properties import PROPERTY
from tests.spec import packages


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory for tenants.yaml, with one good package called good."""
    packages.make(tmp_path / "good")
    return tmp_path


def _load(place: Path, text: str | bytes) -> Spec:
    file = place / "tenants.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load.load(file, root=place / "state")


def _lines(place: Path, text: str | bytes) -> list[str]:
    """Return the refusal's lines without the file's directory."""
    (place / "tenants.yaml").touch()
    before = set(packages.snapshot(place))
    with pytest.raises(SpecError) as caught:
        _load(place, text)
    assert caught.value.exit_code == 2
    assert set(packages.snapshot(place)) == before
    lines = caught.value.lines()
    assert all(packages.harmless(line) for line in lines)
    return [line.removeprefix(f"{place}/") for line in lines]


GOOD = "tenants:\n  a: {package: good}\n"

# One mistake each: the text, where it is, and words of the line.
ONE_MISTAKE: dict[str, tuple[str | bytes, str, str]] = {
    "an unknown key": ("tenants:\n  a: {packge: good}\n", "2:7", "a: unknown key packge (did you mean package?)"),
    "an unknown key at the top": ("tenant: {}\n", "1:1", "unknown key tenant (did you mean tenants?), allowed: bases"),
    "an unknown key of a limit": ("defaults:\n  limits: {tmpp: 1}\n", "2:12", "unknown key tmpp (did you mean tmp?)"),
    "a wrong type": ("tenants:\n  a: {ipc: 3}\n", "2:7", "a: ipc: 3 is not allowed, must be a text"),
    "a list for a mapping": ("tenants: []\n", "1:1", "tenants: [] is not allowed, must be a mapping"),
    "nothing for a mapping": ("bases:\n", "1:1", "bases: None is not allowed, must not be empty"),
    "a text for the whole": ("hello\n", "1:1", "must be a mapping"),
    "a wrong word": ("defaults: {network: all}\n", "1:12", "network: all is not allowed, must be one of none, "),
    "an unknown stage": ("defaults: {seccomp: strict}\n", "1:12", "must be one of kill, errno, notify, log, none, "),
    "a number for a stage": ("defaults: {seccomp: 1}\n", "1:12", "must be a text or a mapping"),
    "true for a number": ("defaults: {limits: {open_files: yes}}\n", "1:21", "open_files: True is not allowed"),
    "a text for a number": ("defaults: {limits: {open_files: '64'}}\n", "1:21", "must be a whole number"),
    "a fraction": ("defaults: {limits: {open_files: 64.5}}\n", "1:21", "open_files: 64.5 is not allowed"),
    "infinity": ("defaults: {limits: {open_files: .inf}}\n", "1:21", "must be a whole number"),
    "a number too small": ("defaults: {limits: {open_files: 15}}\n", "1:21", "must be at least 16"),
    "a number too large": ("defaults: {limits: {open_files: 1048577}}\n", "1:21", "must be at most 1048576"),
    "a number of 5000 digits": (f"defaults: {{limits: {{open_files: {'9' * 5000}}}}}\n", "1:33", "number is too long"),
    "an octal number of YAML 1.1": ("defaults: {limits: {open_files: 0100}}\n", "1:21", "must be a whole number"),
    "a number of base 60": ("defaults: {limits: {open_files: 1:30}}\n", "1:21", "must be a whole number"),
    "a size of nothing": ("defaults: {limits: {tmp: 0}}\n", "1:21", "must be a size in bytes above 0"),
    "a size in an unknown unit": ("defaults: {limits: {tmp: 5T}}\n", "1:21", "must be a size in bytes above 0"),
    "a size beyond all disks": ("defaults: {limits: {tmp: 100000G}}\n", "1:21", "must be a size in bytes above 0"),
    "a duplicate key": ("tenants:\n  a: {package: good}\n  a: {package: good}\n", "3:3", "a: the key a stands twice"),
    "a duplicate key in flow": ("defaults: {ipc: none, ipc: none}\n", "1:23", "the key ipc stands twice"),
    "a bad name": ("tenants:\n  A/b: {package: good}\n", "2:3", "A/b: the name A/b is not allowed, must match"),
    "a name that ends in a newline": ('tenants:\n  "a\\n": {}\n', "2:3", r"a\x0a: the name a\x0a is not allowed"),
    "a name that steers terminals": ('tenants:\n  "\\e[2J": {}\n', "2:3", r"\x1b[2J: the name \x1b[2J is not allowed"),
    "an empty name": ("tenants:\n  '': {}\n", "2:3", "the name  is not allowed"),
    "a name of 64 characters": (f"tenants:\n  {'a' * 64}: {{}}\n", "2:3", "is not allowed, must match"),
    "a name that looks like a tid": (f"tenants:\n  '{'0a' * 16}': {{}}\n", "2:3", "is no name for a tenant"),
    "a name of doit's own": ("tenants:\n  base:x=1: {}\n", "2:3", "the name base:x=1 is not allowed"),
    "a key that is a list": ("tenants: {[a]: {}}\n", "1:11", "a key must be a plain text"),
    "a tag of Python's": (GOOD + "root: !!python/object/apply:os.system [id]\n", "3:7", "apply:os.system is not"),
    "a tag on a mapping": ("tenants: !!python/object:os.system {}\n", "1:10", "python/object:os.system is not allowed"),
    "a tag on a list": ("bases: {b: {packages: !odd [bc]}}\n", "1:23", "the tag !odd is not allowed"),
    "a tag on a key": ("tenants: {!odd a: {package: good}}\n", "1:11", "the tag !odd is not allowed"),
    "a set": ("tenants: !!set {a}\n", "1:10", "the tag tag:yaml.org,2002:set is not allowed"),
    "binary data": ("root: !!binary aGVsbG8=\n", "1:7", "the tag tag:yaml.org,2002:binary is not allowed"),
    "a merge key": ("tenants: {a: {<<: {}, package: good}}\n", "1:15", "a: merge keys (<<) are not supported"),
    "deep nesting": ("[" * 100 + "]" * 100, "1:25", "is nested deeper than 24"),
    "nesting that exhausts the stack": ("[" * 200_000, "1:25", "is nested deeper than 24"),
    "nested mappings": ("{a: " * 100_000, "1:97", "is nested deeper than 24"),
    "an alias of itself": ("tenants: &a {b: *a}\n", "1:10", "is nested deeper than 24"),
    "an unknown alias": ("tenants: *a\n", "1:10", "is not YAML: found undefined alias"),
    "a text that is not closed": ("root: 'x\n\n", "3:1", "is not YAML: found unexpected end of stream"),
    "a tab for a blank": ("tenants:\n\ta: {}\n", "2:1", "is not YAML: found character that cannot start any token"),
    "a second document": ("tenants: {}\n---\ntenants: {}\n", "2:1", "is not YAML: but found another document"),
    "bytes that are not UTF-8": ("tenants:\n  é: ".encode() + b"\xff\n", "2:6", "is not UTF-8"),
    "UTF-16": ("tenants: {}\n".encode("utf-16"), "1:1", "is not UTF-8"),
    "a control character": ("tenants: {}\n# \x07\n", "2:1", "is not YAML: a character that is not allowed"),
    "a file of more than 4 MiB": (b"#" * ((4 << 20) + 1), "1:1", "is larger than 4194304 bytes"),
    "a base that is not there": ("tenants:\n  a: {package: good, base: b}\n", "2:22", "there is no base b"),
    "a default base that is not there": ("defaults: {base: b}\n", "1:12", "there is no base b, allowed: default"),
    "a package that is not there": ("tenants:\n  a: {package: nowhere}\n", "2:7", "nowhere is not a directory"),
    "a relative root": ("root: here\n", "1:1", "root: here is not allowed, must match"),
    "a root that mount would split": ("root: '/a:b'\n", "1:1", "root: /a:b is not allowed"),
    "an option as a package of a base": ("bases: {b: {packages: [-oDebug=1]}}\n", "1:24", "-oDebug=1 is not allowed"),
    "shell text as a package": ("bases: {b: {packages: ['bc; id']}}\n", "1:24", "bc; id is not allowed"),
    "a file out of the base": ("bases: {b: {files: {/a/../../b: good}}}\n", "1:21", "must be an absolute path inside"),
    "a file that is not there": ("bases: {b: {files: {/a: nowhere}}}\n", "1:21", "nowhere is not a file"),
    "a directory for a file": ("bases: {b: {files: {/a: good}}}\n", "1:21", "good is not a file"),
    "snapshot and mirror": ("bases: {b: {snapshot: 20250101T000000Z, mirror: 'http://m/'}}\n", "1:13", "leave one"),
    "a name of the environment": ("defaults: {install_env: {A=B: x}}\n", "1:26", "the name A=B is not allowed"),
    "NUL in the environment": ('defaults: {install_env: {A: "x\\0y"}}\n', "1:26", r"A: x\x00y is not allowed"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", ONE_MISTAKE)
def test_a_mistake_is_one_line_with_its_place(place: Path, mistake: str) -> None:
    text, where, words = ONE_MISTAKE[mistake]
    (line,) = _lines(place, text)
    assert line.startswith(f"tenants.yaml:{where}: "), line
    assert words in line


def test_the_same_without_a_mistake_is_accepted(place: Path) -> None:
    """The control: what the mistakes are mistakes of."""
    (place / "file").touch()
    spec = _load(
        place,
        "root: /srv/iso\n"
        "defaults: {base: b, ipc: none, network: none, install_env: {A: x}, limits: {tmp: 5G, open_files: 64}}\n"
        "bases: {b: {packages: [bc], files: {/a/b: file}, snapshot: 20250101T000000Z}}\n"
        f"tenants:\n  a: {{package: good}}\n  {'a' * 63}: {{package: good, ipc: /srv/ipc}}\n",
    )
    assert set(spec.tenants) == {"a", "a" * 63}
    assert spec.tenants["a"].limits.tmp == 5 << 30
    assert str(spec.tenants["a"].place) == f"{place}/tenants.yaml:5:3"
    assert spec.bases["b"].files == {"/a/b": place / "file"}


@pytest.mark.parametrize(
    "proxy", ["http://127.0.0.1:3128", "localhost:3128", "http://[::1]:3128/", "http://u:p@127.9.9.9"]
)
def test_a_proxy_that_an_install_script_would_not_reach_is_refused_unless_its_network_is_named(
    place: Path, proxy: str
) -> None:
    packages.make(place / "installs")
    packages.configure(place / "good", {"dependencies": ""})
    tenants = "tenants: {a: {package: installs%s}, b: {package: good}}\n"
    given = f"defaults: {{install_env: {{http_proxy: '{proxy}'}}}}\n"
    (line,) = _lines(place, given + tenants % "")
    assert line.startswith("tenants.yaml:1:26: a: layer: "), line
    assert line.endswith("is on this host's loopback, where its install script does not get; "
                         "write install_network: host, or another address")  # fmt: skip
    assert "tenants.yaml:1:" in _lines(place, tenants % f", install_env: {{HTTPS_PROXY: '{proxy}'}}")[0]
    for network in ("host", "bridge"):
        spec = _load(place, given + tenants % f", install_network: {network}")
        assert (spec.tenants["a"].install_network, spec.tenants["b"].install_network) == (network, "bridge")
    _load(place, given + tenants % ", install_env: {http_proxy: 'http://proxy.example:3128'}")


def test_a_mirror_that_an_install_script_would_not_reach_is_refused(place: Path) -> None:
    packages.make(place / "installs")
    packages.configure(place / "good", {"dependencies": ""})
    bases = "bases: {b: {mirror: 'http://127.0.0.1:8080/debian'}}\n"
    (line,) = _lines(place, f"{bases}tenants: {{a: {{package: installs, base: b}}}}\n")
    assert line.startswith("tenants.yaml:1:13: a: layer: http://127.0.0.1:8080/debian is on this host's loopback"), line
    _load(place, f"{bases}tenants: {{a: {{package: good, base: b}}}}\n")


@pytest.mark.parametrize("mode", validate.STAGES)
def test_a_mode_alone_is_short_for_the_mapping(place: Path, mode: str) -> None:
    for own in (mode, f"{{mode: {mode}}}"):
        (tenant,) = _load(place, f"tenants:\n  a: {{package: good, seccomp: {own}}}\n").tenants.values()
        assert tenant.seccomp == Seccomp(mode)
    given = "defaults: {seccomp: {mode: errno, approved: [ptrace]}}\n"
    (tenant,) = _load(place, f"{given}tenants:\n  a: {{package: good, seccomp: {mode}}}\n").tenants.values()
    assert tenant.seccomp == Seccomp(mode, frozenset({"ptrace"}))
    (tenant,) = _load(place, f"defaults: {{seccomp: {mode}}}\ntenants:\n  a: {{package: good}}\n").tenants.values()
    assert tenant.seccomp == Seccomp(mode)


def test_both_forms_know_the_same_modes() -> None:
    rule = validate.schema("tenants")["defaults"]["schema"]["seccomp"]
    assert tuple(rule["schema"]["mode"]["allowed"]) == validate.STAGES


def test_an_empty_file_has_no_tenants(place: Path) -> None:
    for text in ("", "# nothing\n", "tenants: {}\n", "\ufefftenants: {}\n"):
        assert _load(place, text).tenants == {}


def test_an_alias_is_what_it_stands_for(place: Path) -> None:
    spec = _load(place, "defaults: {install_env: &e {A: x}}\ntenants:\n  a: {package: good, install_env: *e}\n")
    assert spec.tenants["a"].install_env == {"A": "x"}


def test_an_alias_bomb_is_one_line(place: Path) -> None:
    rows = [f"{chr(97 + n)}: &{chr(97 + n)} [{','.join([f'*{chr(96 + n)}' if n else 'x'] * 10)}]" for n in range(10)]
    (line,) = _lines(place, "\n".join(rows))
    assert "expands to more than" in line
    assert line.startswith("tenants.yaml:1:")


def test_all_mistakes_come_at_once_in_the_files_order(place: Path) -> None:
    """Of every kind: of the text, of the schema, of what only the code knows, and of a package."""
    packages.make(place / "odd")
    (place / "odd/progs/link").symlink_to("/etc/shadow")
    lines = _lines(
        place,
        "root: relative\n"
        "bases: {b: {files: {/a: nowhere}}}\n"
        "defaults: {limits: {tmp: 99999999999999999999999, shm: 5Q}}\n"
        "tenants:\n"
        "  a: {package: odd}\n"
        "  Bad: {}\n"
        "  c: {package: good, ipx: none}\n"
        "  c: {}\n"
        "  d: {package: good, base: nothing}\n"
        "  e: {package: good, network: !odd none}\n"
        "  f: {package: nowhere}\n",
    )
    assert [line.split(": ")[0] for line in lines] == [
        "tenants.yaml:1:1", "tenants.yaml:2:21", "tenants.yaml:3:26", "tenants.yaml:3:51", "tenants.yaml:6:3",
        "tenants.yaml:7:22", "tenants.yaml:8:3", "tenants.yaml:9:22", "tenants.yaml:10:31", "tenants.yaml:11:7",
        "odd/progs/link",
    ]  # fmt: skip


def test_a_dropped_package_with_a_bad_name_is_refused_and_one_that_is_being_copied_is_left_alone(place: Path) -> None:
    for name in ("Bad Name", ".being-copied", "fine"):
        packages.make(place / "state/new_tenants" / name)
    (line,) = _lines(place, "tenants: {}\n")
    assert line.startswith("state/new_tenants/Bad Name: is no name for a tenant")
    (place / "state/new_tenants/Bad Name").rename(place / "elsewhere")
    assert list(_load(place, "tenants: {}\n").tenants) == ["fine"]


def test_a_file_that_can_not_be_read_is_one_line(place: Path) -> None:
    for file in (place / "nothing", place / "good"):
        with pytest.raises(SpecError) as caught:
            load.load(file)
        assert caught.value.lines()[0].startswith(f"{file}: can't be read: ")


# Whatever is written, it is a Spec or a list of places.

_WORDS = st.sampled_from(
    ["root", "defaults", "bases", "tenants", "default", "a", "b.c", "A", "ipc", "network", "limits", "tmp", "shm",
     "open_files", "install_env", "package", "base", "files", "packages", "none", "host", "required", "/x", "64M",
     "good", "0a" * 16, "../good", "<<", "suite", "bookworm", "snapshot", "mirror"]
)  # fmt: skip
_SCALARS = st.one_of(_WORDS, st.integers(-9, 1 << 70), st.booleans(), st.none(), st.floats(), st.text(max_size=8))
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_WORDS, inner, max_size=4)),
    max_leaves=12,
)
_TENANT = st.fixed_dictionaries(
    {"package": st.sampled_from(["good", "nowhere", "../x"])}, optional={"ipc": _WORDS, "limits": _VALUES, "a": _VALUES}
)
_DOCUMENTS = st.one_of(
    _VALUES,
    st.fixed_dictionaries(
        {"tenants": st.dictionaries(_WORDS, st.one_of(st.none(), _TENANT, _VALUES), max_size=4)},
        optional={"defaults": _VALUES, "bases": st.dictionaries(_WORDS, st.none() | _VALUES, max_size=2)},
    ),
)


@PROPERTY
@given(_DOCUMENTS)
def test_whatever_is_written_is_a_spec_or_has_lines_with_a_place(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    import yaml

    place = tmp_path_factory.getbasetemp() / "property"
    if not place.exists():
        packages.make(place / "good")
    file = place / "tenants.yaml"
    file.write_text(yaml.safe_dump(value, allow_unicode=True))
    try:
        spec = load.load(file, root=place / "state")
    except SpecError as error:
        assert error.lines()
        for line in error.lines():
            assert line.startswith(f"{place}/"), line
            assert packages.harmless(line)
            if line.startswith(f"{file}:"):
                row, column = line.removeprefix(f"{file}:").split(":")[:2]
                assert 1 <= int(row) <= len(file.read_text().splitlines()) + 1
                assert int(column) >= 1
    else:
        assert set(spec.tenants) == set((value or {}).get("tenants", ()))  # type: ignore[attr-defined]
        assert all(tenant.base in spec.bases for tenant in spec.tenants.values())


@PROPERTY
@given(st.one_of(st.binary(max_size=200), st.text(alphabet="{}[]:,-&*! \n\t#'\"|>?%@ab<0", max_size=200)))
def test_whatever_bytes_are_there_the_parser_answers_with_a_value_or_a_problem(content: bytes | str) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    found = document.parse("f", data)
    for place, _, what in found.problems:
        assert place.line >= 1
        assert place.column >= 1
        assert what
    if found.value is not None and not found.problems:
        validate.problems("tenants", found.value)


@PROPERTY
@given(st.text(), st.integers())
def test_a_size_is_read_or_refused_and_never_misread(text: str, number: int) -> None:
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for value in (text, number, str(number), *(f"{number}{unit}" for unit in units), f"{number % 99999}G", f"{text}M"):
        size = validate.parse_size(value)
        if size is not None:
            assert 0 < size <= 99999 << 30
            digits = str(value).rstrip("KMG")
            assert size == int(digits) * units[str(value)[len(digits) :]]


def test_reading_follows_a_symlink_of_the_operators_to_tenants_yaml(place: Path) -> None:
    (place / "real.yaml").write_text(GOOD)
    os.symlink("real.yaml", place / "link.yaml")
    assert list(load.load(place / "link.yaml", root=place / "state").tenants) == ["a"]
