"""A hostile package, read by root: rows P01 to P17 of the project's list of attacks, each beside its control.

The control of every row is :func:`packages.make`: the same package without the attack is
accepted, which each test of a refusal sees before and after it.
"""

import contextlib
import io
import json
import os
import socket
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isochamber.errors import SpecError, printable
from isochamber.spec import package
from isochamber.spec.model import ProgFile
from tests.conftest import run
from tests.properties import PROPERTY
from tests.spec import packages

SECRET = "a secret of the host's\n"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A package that is accepted, beside a secret; what a test made of it must never let the secret out."""
    made = packages.make(tmp_path / "probe")
    outside = packages.make(tmp_path / "outside")
    (outside / "progs/main").write_text(SECRET)
    (tmp_path / "secret").write_text(SECRET)
    packages.accepted(made)
    yield made
    assert (tmp_path / "secret").read_text() == SECRET


def _refused_at(directory: Path, where: str, words: str) -> str:
    """Check that there is one line, about ``where``, with ``words``; returns it."""
    (line,) = packages.refused(directory)
    assert line.startswith(f"{directory}/{where}" if where else f"{directory}: "), line
    assert words in line, line
    assert SECRET.strip() not in line
    return line


def test_the_control_is_read_as_it_is(directory: Path) -> None:
    found = packages.accepted(directory)
    assert (found.cname, found.script, found.argv) == ("probe", "install.sh", ("/home/main", "-v"))
    assert [(prog.path, prog.kind, prog.executable, prog.size) for prog in found.progs] == [
        ("conf", "directory", False, 0), ("conf/a", "file", False, 4),
        ("install.sh", "file", False, 10), ("main", "file", True, 10),
    ]  # fmt: skip


# P01, P03, P04: what is not a plain file or directory of the package's own.


@pytest.mark.parametrize("target", ["/etc", "../outside/progs", "conf"])
def test_p01_progs_as_a_symlink_is_refused_wherever_it_points(directory: Path, target: str) -> None:
    (directory / "progs").rename(directory / "conf")
    (directory / "progs").symlink_to(target)
    _refused_at(directory, "progs", "must be a directory")


def test_p01_the_package_itself_as_a_symlink_is_refused(directory: Path) -> None:
    link = directory.with_name("link")
    link.symlink_to("outside")
    _refused_at(link, "", "the package can't be opened")


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "../outside/config.json", "nothing", "config.json"])
def test_p01_config_json_as_a_symlink_is_refused(directory: Path, target: str) -> None:
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to(target)
    _refused_at(directory, "config.json", "can't be opened")


@pytest.mark.parametrize(
    "target", ["/etc/shadow", "/root/.ssh", "../../secret", "main", ".", "nothing", "/proc/self/fd/0"]
)
def test_p01_a_symlink_in_progs_is_refused_wherever_it_points(directory: Path, target: str) -> None:
    for where in ("link", "conf/link"):
        link = directory / "progs" / where
        link.symlink_to(target)
        _refused_at(directory, f"progs/{where}", "is a symlink, must be a regular file or a directory")
        link.unlink()
    packages.accepted(directory)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


def _device(number: tuple[int, int], kind: int) -> Callable[[Path], None]:
    return lambda path: os.mknod(path, kind | 0o666, os.makedev(*number))


ODD = {
    "a FIFO": _fifo,
    "a socket": _socket,
    "/dev/zero": _device((1, 5), stat.S_IFCHR),
    "a disk": _device((8, 0), stat.S_IFBLK),
    "a whiteout": _device((0, 0), stat.S_IFCHR),
}


@pytest.mark.parametrize("kind", ODD)
def test_p03_a_special_file_in_progs_is_refused_and_nobody_waits_for_it(directory: Path, kind: str) -> None:
    ODD[kind](directory / "progs/odd")
    _refused_at(directory, "progs/odd", "must be a regular file or a directory")
    (directory / "progs/odd").unlink()
    packages.accepted(directory)


@pytest.mark.parametrize("kind", [*ODD, "a directory"])
def test_p03_p12_a_special_file_as_config_json_is_refused_and_nobody_waits_for_it(directory: Path, kind: str) -> None:
    (directory / "config.json").unlink()
    {**ODD, "a directory": Path.mkdir}[kind](directory / "config.json")
    (line,) = packages.refused(directory)
    assert line.startswith(f"{directory}/config.json: ")
    assert "a regular file" in line


@pytest.mark.parametrize("kind", [*ODD, "a file"])
def test_p03_a_special_file_as_progs_is_refused(directory: Path, kind: str) -> None:
    (directory / "progs").rename(directory / "away")
    {**ODD, "a file": Path.touch}[kind](directory / "progs")
    _refused_at(directory, "progs", "must be a directory")


def test_p04_a_hard_link_is_refused_since_it_could_be_a_file_of_the_host(directory: Path) -> None:
    os.link(directory.with_name("secret"), directory / "progs/linked")
    _refused_at(directory, "progs/linked", "has another hard link")
    (directory / "progs/linked").unlink()
    packages.accepted(directory)
    (directory / "config.json").rename(directory.with_name("config.json"))
    os.link(directory.with_name("config.json"), directory / "config.json")
    _refused_at(directory, "config.json", "has another hard link")
    directory.with_name("config.json").unlink()
    packages.accepted(directory)


# P06, P08: names.

BAD_NAMES = {
    "an escape sequence": b"\x1b[2J", "OSC 8": b"\x1b]8;;x\x07", "a carriage return": b"a\rb", "BEL": b"\x07",
    "a newline": b"a\n", "not UTF-8": b"\xff\xfe", "half of a character": b"\xc3", "C1": "\u009b2J".encode(),
    "bidi": "a\u202etxt".encode(), "a zero-width space": "a\u200bb".encode(), "a soft hyphen": "a\u00adb".encode(),
    "DEL": b"\x7f", "a tag character": "a\U000e0041".encode(),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_NAMES)
def test_p06_p08_a_name_that_could_steer_a_terminal_is_refused_and_printed_escaped(directory: Path, kind: str) -> None:
    path = os.path.join(os.fsencode(directory), b"progs", BAD_NAMES[kind])
    with open(path, "w"):
        pass
    line = _refused_at(directory, "progs/", "its name holds control or invisible characters, or is not UTF-8")
    assert line.isascii()
    os.unlink(path)
    packages.accepted(directory)


@pytest.mark.parametrize(
    "name", ["-rf", "--", "a b", "$(id)", "a;b", "é", "e\u0301", "A", "x" * 255, "...", "'", "=", "*"]
)
def test_p06_an_odd_but_printable_name_is_only_a_name(directory: Path, name: str) -> None:
    (directory / "progs" / name).write_text("x")
    found = {prog.path for prog in packages.accepted(directory).progs}
    assert name in found
    (directory / "progs" / name.swapcase()).write_text("y")  # a twin in case is another file
    assert {name, name.swapcase()} <= {prog.path for prog in packages.accepted(directory).progs}


@PROPERTY
@given(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=40))
def test_p06_every_name_is_either_refused_in_a_printable_line_or_printable_itself(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    directory = tmp_path_factory.getbasetemp() / "names"
    if not directory.exists():
        packages.make(directory)
    try:
        path = directory / "progs" / name
        path.touch()
    except (OSError, UnicodeEncodeError):
        return  # no name of a file
    if name in (".", ".."):
        return
    try:
        assert printable(name) == name
        assert name in {prog.path for prog in package.read(directory).progs}
    except AssertionError:
        with pytest.raises(SpecError) as caught:
            package.read(directory)
        assert all(packages.harmless(line) for line in caught.value.lines())
    finally:
        path.unlink()


# P07, P15: what config.json says.

BAD_CONFIG: dict[str, tuple[dict[str, object], str]] = {
    "a script out of progs": ({"dependencies": "/home/../../etc/passwd"}, "is not a file of progs/"),
    "a script of the host's": ({"dependencies": "/bin/sh"}, "must match"),
    "a script below a script": ({"dependencies": "/home/main/x"}, "is not a file of progs/"),
    "a directory as the script": ({"dependencies": "/home/conf"}, "is not a file of progs/"),
    "a script with two slashes": ({"dependencies": "/home//main"}, "is not a file of progs/"),
    "a script with a dot": ({"dependencies": "/home/./main"}, "is not a file of progs/"),
    "a script that ends in a newline": ({"dependencies": "/home/main\n"}, "must match"),
    "shell text as the script": ({"dependencies": "/home/main; id"}, "is not a file of progs/"),
    "a list of 100,000 dependencies": ({"dependencies": ["a"] * 9000}, "must be a text"),
    "a tid of its own choice": ({"tid": "0" * 32}, "allowed: blank"),
    "a name that is a path": ({"cname": "../x"}, "must match"),
    "a name that ends in a newline": ({"cname": "x\n"}, "must match"),
    "no program": ({"init": ""}, "at least the program's path"),
    "an empty list": ({"init": []}, "at least the program's path"),
    "an empty first word": ({"init": "'' x"}, "at least the program's path"),
    "an open quote": ({"init": "/home/main 'x"}, "No closing quotation"),
    "a number as a word": ({"init": ["/home/main", 1]}, "texts without NUL"),
    "NUL in a word": ({"init": ["/home/main", "a\0b"]}, "texts without NUL"),
    "inputs out of progs": ({"inputs": ["../../etc/passwd"]}, "is not in progs/"),
    "absolute inputs": ({"inputs": ["/etc/passwd"]}, "is not in progs/"),
    "a name of the environment": ({"env": {"A=B": "x"}}, "the name A=B is not allowed"),
    "NUL in the environment": ({"env": {"A": "x\0"}}, "is not allowed"),
    "true as a text": ({"cname": True}, "must be a text"),
    "a grant": ({"network": "host"}, "unknown key network"),
    "a key that steers terminals": ({"\x1b[2J": 1}, r"unknown key \x1b[2J"),
}


@pytest.mark.parametrize("mistake", BAD_CONFIG)
def test_p07_p15_what_config_json_may_not_say_is_a_line_with_its_place(directory: Path, mistake: str) -> None:
    change, words = BAD_CONFIG[mistake]
    packages.configure(directory, change)
    line = _refused_at(directory, "config.json:1:", words)
    assert int(line.removeprefix(f"{directory}/config.json:1:").split(":")[0]) >= 1


def test_all_mistakes_of_a_package_come_at_once(directory: Path) -> None:
    packages.configure(directory, '{"cname": "a/b",\n "init": "",\n "extra": 1}')
    (directory / "progs/link").symlink_to("main")
    _fifo(directory / "progs/conf/fifo")
    lines = packages.refused(directory)
    places = sorted(line.removeprefix(f"{directory}/").split(": ")[0] for line in lines)
    assert places == ["config.json:1:2", "config.json:2:2", "config.json:3:2", "progs/conf/fifo", "progs/link"]


def test_p15_shell_text_in_init_is_words_and_nothing_else(directory: Path) -> None:
    packages.configure(directory, {"init": "/home/main $(id) ; rm -rf `x` \"a b\" 'c$d' e\\ f > /x"})
    assert packages.accepted(directory).argv == (
        "/home/main", "$(id)", ";", "rm", "-rf", "`x`", "a b", "c$d", "e f", ">", "/x",
    )  # fmt: skip


# P09 to P12: the JSON text.

BAD_JSON: dict[str, tuple[bytes, str]] = {
    "a million brackets": (b"[" * 60_000, "is nested too deeply"),
    "a million objects": (b'{"a":' * 10_000, "is nested too deeply"),
    "deep but parsed": (b'{"cname":"x","init":' + b"[" * 500 + b"]" * 500 + b"}", "texts without NUL"),
    "a number of 5000 digits": (b'{"cname":' + b"9" * 5000 + b"}", "a number is too long"),
    "a negative number of 5000 digits": (b'{"cname":-' + b"9" * 5000 + b"}", "a number is too long"),
    "a number beyond all": (b'{"cname":1e400}', "a number is too large"),
    "NaN": (b'{"cname":NaN}', "NaN is not JSON"),
    "Infinity": (b'{"cname":Infinity}', "Infinity is not JSON"),
    "-Infinity": (b'{"cname":-Infinity}', "-Infinity is not JSON"),
    "minus nothing": (b'{"cname":-0,"init":"x"}', "must be a text"),
    "a key twice": (b'{"init":"/a","init":"/b","cname":"x"}', "the key init stands twice"),
    "a key twice, spelt differently": (b'{"init":"/a","in\\u0069t":"/b"}', "the key init stands twice"),
    "a key twice further in": (b'{"env":{"A":"1","A":"2"},"cname":"x","init":"x"}', "the key A stands twice"),
    "a BOM": (b'\xef\xbb\xbf{"cname":"x"}', "is not JSON"),
    "UTF-16": ('{"cname":"x"}'.encode("utf-16"), "is not UTF-8"),
    "UTF-32": ('{"cname":"x"}'.encode("utf-32-le"), "is not JSON"),
    "not UTF-8": (b'{"cname":"\xff"}', "is not UTF-8"),
    "a surrogate in UTF-8": (b'{"cname":"\xed\xa0\x80"}', "is not UTF-8"),
    "half of a character": (b'{"cname":"\\ud800","init":"x"}', "half of a character"),
    "half of a character as a key": (b'{"\\udfff":1}', "half of a character"),
    "an empty file": (b"", "is not JSON"),
    "only blanks": (b" \n\t ", "is not JSON"),
    "NULs": (b"\0" * 4096, "is not JSON"),
    "null": (b"null", "must be a mapping"),
    "a list": (b"[]", "must be a mapping"),
    "a text": (b'"x"', "must be a mapping"),
    "two values": (b"{}{}", "is not JSON"),
    "YAML": (b"cname: x\ninit: x\n", "is not JSON"),
    "a Python tag": (b'{"cname": !!python/name:os.system x}', "is not JSON"),
    "a raw control character": (b'{"cname":"a\x1bb"}', "is not JSON"),
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_p09_to_p13_a_hostile_json_text_is_one_line(directory: Path, kind: str) -> None:
    content, words = BAD_JSON[kind]
    packages.configure(directory, content)
    _refused_at(directory, "config.json:", words)


def test_p09_the_plain_parser_would_raise_what_is_no_value_error() -> None:
    """The control: what the standard library does with two of them."""
    with pytest.raises(RecursionError):
        json.loads("[" * 60_000)
    assert json.loads('{"a":1,"a":2}') == {"a": 2}


def test_p12_a_config_of_4_gib_is_refused_without_reading_it(directory: Path) -> None:
    os.truncate(directory / "config.json", 4 << 30)  # a hole: it occupies nothing
    _refused_at(directory, "config.json", f"is larger than {package.MAX_CONFIG_BYTES} bytes")


@PROPERTY
@given(
    st.one_of(
        st.binary(max_size=300),
        st.text(alphabet='{}[]",: \\ud8019eE.+-tfnulcamis\n', max_size=300).map(str.encode),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=5)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(st.sampled_from(["cname", "init", "env", "inputs", "tid", "x"]), inner, max_size=5),
            ),
            max_leaves=10,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_p09_to_p12_whatever_config_json_holds_it_is_a_package_or_lines(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    directory = tmp_path_factory.getbasetemp() / "configs"
    if not directory.exists():
        packages.make(directory)
    packages.configure(directory, content)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(package, "_TICK", 0)  # nobody races us here
            found = package.read(directory)
    except SpecError as error:
        assert error.lines()
        for line in error.lines():
            assert packages.harmless(line)
            assert line.startswith(f"{directory}/config.json:")
            assert ": configs: " in line
    else:
        assert found.argv[0]
        assert json.loads(content)["cname"] == found.cname


# P14, P16: contents.


def test_p14_an_archive_is_a_file_like_any_other(directory: Path) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../../escaped"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/shadow"
        tar.addfile(link)
    (directory / "progs/data.tar").write_bytes(archive.getvalue())
    (prog,) = (prog for prog in packages.accepted(directory).progs if prog.path == "data.tar")
    assert (prog.kind, prog.size) == ("file", len(archive.getvalue()))
    assert not list(directory.parent.rglob("*escaped*"))
    unpackers = {"tarfile", "zipfile", "shutil"} & set(vars(package))
    assert not unpackers, "the reader of packages can unpack archives now: test what it does with hostile ones"


def test_p16_of_a_mode_only_the_execute_bit_is_kept(directory: Path) -> None:
    for number, mode in enumerate((0o4755, 0o2755, 0o6777, 0o1777, 0o111, 0o001)):
        file = directory / f"progs/mode{number}"
        file.write_text("x")
        file.chmod(mode)
    progs = {prog.path: prog for prog in packages.accepted(directory).progs}
    assert all(progs[f"mode{number}"].executable for number in range(6))
    assert {field for field in ProgFile.__dataclass_fields__ if "mode" in field or "uid" in field} == set()


# P17: amounts.


def test_p17_too_many_files_are_one_line(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MAX_ENTRIES", 200)
    for number in range(196):
        (directory / f"progs/conf/{number:03}").touch()
    packages.accepted(directory)
    (directory / "progs/conf/one-more").touch()
    _refused_at(directory, "progs", "holds more than 200 files")


def test_p17_the_limit_of_files_is_a_real_one(directory: Path) -> None:
    for number in range(package.MAX_ENTRIES):
        (directory / f"progs/conf/{number}").touch()
    _refused_at(directory, "progs", "holds more than 10000 files")


def test_p17_a_tree_too_deep_is_one_line_also_when_no_path_could_name_it(directory: Path) -> None:
    deep = directory / "progs/d0"
    for level in range(1, package.MAX_DEPTH - 1):
        deep = deep / f"d{level}"
    deep.mkdir(parents=True)
    packages.accepted(directory)
    descriptor = os.open(deep, os.O_RDONLY)
    for _ in range(1500):  # far beyond PATH_MAX and Python's stack
        os.mkdir("x" * 20, dir_fd=descriptor)
        below = os.open("x" * 20, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    with pytest.raises(SpecError) as caught:
        package.read(directory)
    (line,) = caught.value.lines()
    assert "is deeper than 32 directories" in line
    assert run("rm", "-rf", directory / "progs/d0").returncode == 0


def test_p17_too_many_bytes_are_one_line_and_holes_count(directory: Path) -> None:
    for name in ("a", "b"):
        (directory / f"progs/{name}").touch()
        os.truncate(directory / f"progs/{name}", package.MAX_BYTES // 2 - 100)
    packages.accepted(directory)
    os.truncate(directory / "progs/a", 1 << 40)
    _refused_at(directory, "progs", f"holds more than {package.MAX_BYTES} bytes")


def test_reading_leaves_no_descriptor_open_however_it_ends(directory: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for spoil in ("nothing", "a FIFO", "no config.json"):
        if spoil == "a FIFO":
            _fifo(directory / "progs/fifo")
        elif spoil == "no config.json":
            (directory / "config.json").unlink()
        with contextlib.suppress(SpecError):
            package.read(directory)
        assert len(os.listdir("/proc/self/fd")) == before
