"""Packages and tenants.yaml: what root reads that somebody else wrote. In this process, with one check patched away."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from isochamber.build import contents, home, identity, manifest
from isochamber.build.state import State
from isochamber.errors import IsochamberError, SpecError
from isochamber.spec import load, package
from isochamber.spec.document import Document
from isochamber.spec.model import Package
from tests.build.products import Bench, Lines
from tests.conftest import SCRATCH
from tests.escape.attempts import Attempt, Guard, Off, Run
from tests.escape.worlds import Worlds, patched

_real_open, _real_fstat, _real_kind = os.open, os.fstat, stat.S_IFMT


def _naive_openat2(dir_fd: int, path: str, flags: int, mode: int = 0, resolve: int = 0) -> int:
    return _real_open(path, flags & ~os.O_NOFOLLOW | os.O_CLOEXEC, mode or 0o600, dir_fd=dir_fd)


def _naive_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    return _real_open(path, flags & ~os.O_NOFOLLOW, mode, dir_fd=dir_fd)


class _OneLink:
    """What fstat(2) says, but for the number of links."""

    def __init__(self, status: os.stat_result) -> None:
        self._status = status
        self.st_nlink = 1

    def __getattr__(self, name: str) -> object:
        return getattr(self._status, name)


class _Same(tuple[int, int, int, int, int]):
    """An identity that is equal to every other."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = tuple.__hash__


def _everything(mode: int) -> bool:
    return True


def _as_file(mode: int) -> int:
    return _real_kind(mode) if stat.S_ISDIR(mode) else stat.S_IFREG


def _plain_json(directory: Path, content: bytes, found: object) -> Any:
    return json.loads(content)


def _unsafe_yaml(file: str, content: bytes) -> Document:
    return Document(file, yaml.load(content, Loader=yaml.UnsafeLoader))


def _nothing_wrong(*words: object) -> list[object]:
    return []


LINKS = Guard(
    "no link is followed: O_NOFOLLOW, openat2(2)",
    patches=(("isochamber.launch.syscalls:openat2", _naive_openat2), ("os:open", _naive_open)),
)
KINDS = Guard("only regular files and directories", patches=(("stat:S_IFMT", _as_file), ("stat:S_ISREG", _everything)))
ONE_LINK = Guard("only files of one hard link", patches=(("os:fstat", lambda fd: _OneLink(_real_fstat(fd))),))
IDENTITY = Guard("what is read must be what was looked at")
SCHEMA = Guard("the schema", patches=(("isochamber.spec.validate:problems", _nothing_wrong),))
NAMES = Guard("the pattern of names", patches=(("isochamber.spec.package:is_name", lambda text: True),))
CROSS = Guard("paths must be files of progs/", patches=(("isochamber.spec.package:_cross_check", _nothing_wrong),))
PARSER = Guard("a strict JSON parser", patches=(("isochamber.spec.package:_parse", _plain_json),))
YAML = Guard("a YAML reader for plain data", patches=(("isochamber.spec.load:document.parse", _unsafe_yaml),))
COUNTS = Guard(
    "counts, depths and sizes are bounded",
    patches=tuple(
        (f"isochamber.spec.{name}", 1 << 60)
        for name in (
            "package:MAX_ENTRIES", "package:MAX_DEPTH", "package:MAX_BYTES", "package:MAX_CONFIG_BYTES",
            "document:MAX_DEPTH",
        )
    ),
)  # fmt: skip
ESCAPING = Guard(
    "what tenants wrote is escaped before it is printed",
    patches=tuple(
        (f"isochamber.{name}:printable", str)
        for name in ("spec.package", "spec.load", "spec.validate", "spec.document", "errors")
    ),
)
PLAIN_NAMES = Guard("plain file names", patches=(("isochamber.spec.package:printable", str),))
DEPLOYED_BELOW = Guard(
    "files are deployed below /home's descriptor, through no link",
    patches=(
        ("isochamber.launch.syscalls:openat2", _naive_openat2),
        ("isochamber.build.home:_Deployment._what_is", lambda self, path: None),
    ),
)

REFUSED = frozenset({"refused"})
_CONFIG: dict[str, object] = {"tid": "", "cname": "evil", "dependencies": "", "init": "/home/main"}


@contextlib.contextmanager
def _package(config: dict[str, object] | bytes | None = None) -> Iterator[Path]:
    """Make a package with one program."""
    directory = Path(tempfile.mkdtemp(prefix="isochamber-test-", dir=SCRATCH)) / "evil"
    (directory / "progs").mkdir(parents=True)
    (directory / "progs/main").write_text("#!/bin/sh\n")
    text = config if isinstance(config, bytes) else json.dumps({**_CONFIG, **(config or {})}).encode()
    (directory / "config.json").write_bytes(text)
    try:
        yield directory
    finally:
        shutil.rmtree(directory.parent)


def _read(directory: Path, off: Off) -> Package | str:
    """Read the package as the build does; "refused" when it was refused in lines, "traceback" for a bug."""
    with patched(off):
        try:
            return package.read(directory, "evil")
        except SpecError as error:
            assert error.problems
            return "refused"
        except (IsochamberError, Exception) as error:
            return f"traceback: {type(error).__name__}"


def _word(directory: Path, off: Off) -> str:
    found = _read(directory, off)
    return found if isinstance(found, str) else "worked"


Prepare = Callable[[Worlds, Path], object]


def _prepared(prepare: Prepare, config: dict[str, object] | bytes | None = None) -> Run:
    def run(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        with _package(config) as directory:
            left = prepare(worlds, directory)
            try:
                return _word(directory, off)
            finally:
                if hasattr(left, "close"):
                    left.close()

    return run


def _configured(config: dict[str, object] | bytes) -> Run:
    return _prepared(lambda _worlds, _directory: None, config)


def _replace(path: Path, to: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(to)


def _hosts_config(worlds: Worlds, directory: Path) -> None:
    secret = worlds.public / "config.json"
    secret.write_text(json.dumps(_CONFIG))
    _replace(directory / "config.json", secret)


def _hosts_directory(worlds: Worlds) -> Path:
    (worlds.public / "sub").mkdir(exist_ok=True)
    (worlds.public / "sub/canary").write_text("the host's\n")
    return worlds.public / "sub"


def _linked_directory(worlds: Worlds, directory: Path) -> None:
    (directory / "progs/etc").symlink_to(_hosts_directory(worlds))


def _fifo_config(_worlds: Worlds, directory: Path) -> object:
    (directory / "config.json").unlink()
    os.mkfifo(directory / "config.json")
    writer = (directory / "config.json").open("r+b", buffering=0)
    writer.write(json.dumps(_CONFIG).encode())
    return writer


def _hard_link(name: str) -> Prepare:
    def prepare(worlds: Worlds, directory: Path) -> None:
        secret = worlds.public / f"secret-{os.getpid()}"
        secret.write_text(json.dumps(_CONFIG))
        (directory / name).unlink(missing_ok=True)
        (directory / name).hardlink_to(secret)

    return prepare


def _socket(_worlds: Worlds, directory: Path) -> object:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "progs/socket"))
    return listener


def _node(kind: int, major: int, minor: int) -> Prepare:
    return lambda _worlds, directory: os.mknod(directory / "progs/node", kind | 0o600, os.makedev(major, minor))


_FEW = 100  # files that a package may have here: ten thousand are slow to make


def _many(_worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    with _package() as directory, mock.patch.object(package, "MAX_ENTRIES", _FEW):
        for number in range(_FEW):
            (directory / "progs" / str(number)).touch()
        return _word(directory, off)


def _deep(_worlds: Worlds, directory: Path) -> None:
    (directory / "progs" / "/".join(["d"] * (package.MAX_DEPTH + 1))).mkdir(parents=True)


def _large(_worlds: Worlds, directory: Path) -> None:
    with (directory / "progs/hole").open("wb") as file:
        file.truncate(package.MAX_BYTES + 1)


def _named(name: bytes) -> Prepare:
    return lambda _worlds, directory: Path(os.fsdecode(bytes(directory / "progs") + b"/" + name)).touch()


def _swapped(change: Callable[[Worlds, Path], object]) -> Run:
    def run(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        """Looked at as one thing, read as another: at the latest when it is hashed or copied."""
        with _package() as directory:
            found = package.read(directory, "evil")
            change(worlds, directory / "progs/main")
            if IDENTITY in off:
                progs = tuple(dataclasses.replace(prog, identity=_Same(prog.identity)) for prog in found.progs)
                found = dataclasses.replace(found, progs=progs)
            with patched(off):
                try:
                    os.close(package.open_prog(found, found.progs[0]))
                except IsochamberError:
                    return "refused"
        return "worked"

    return run


def _another(_worlds: Worlds, path: Path) -> None:
    path.unlink()
    path.write_text("other")


def _grows_while_hashed(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    state = State(worlds.scratch / "hash")
    state.create()
    real = manifest.hash_descriptor
    with _package() as directory:
        found = package.read(directory, "evil")

        def hashed(descriptor: int) -> str:
            digest = real(descriptor)
            with (directory / "progs/main").open("ab") as file:
                file.write(b"more")
            return digest

        with patched(off), mock.patch("isochamber.build.manifest.hash_descriptor", hashed):
            try:
                contents.digests(state, found)
            except IsochamberError:
                return "refused"
    return "worked"


UNCHANGED = Guard("the file is looked at again after it was hashed",
                  patches=(("isochamber.build.contents:_check_unchanged", lambda *rest: None),))  # fmt: skip


def _race(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """P02: progs/sub is swapped for a link to a directory of the host while the package is read, 10,000 times."""
    from tests.escape.races import swapping

    outside = _hosts_directory(worlds)
    with _package() as directory, patched(off):
        (directory / "progs/sub").mkdir()
        (directory / "link").symlink_to(outside)
        root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with swapping(worlds, directory / "progs/sub", directory / "link"):
                for _ in range(10_000):
                    found = package._read_progs(root, package._Problems(directory, "evil"))
                    if any("canary" in prog.path for prog in found):
                        return "escaped"
        finally:
            os.close(root)
    return "stayed inside"


# tenants.yaml


def _load(text: str, off: Off) -> str:
    with _package() as directory:
        file = directory.parent / "tenants.yaml"
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
        (directory.parent / "state/new_tenants").mkdir(parents=True)
        with patched(off):
            try:
                load.load(file, root=directory.parent / "state")
            except SpecError as error:
                assert error.problems
                return "refused"
            except Exception as error:
                return f"traceback: {type(error).__name__}"
    return "worked"


def _yaml(text: str) -> Run:
    return lambda _worlds, off, _attempt: _load(text, off)


def _tag(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """A tag that makes PyYAML call a function; the file that it makes tells."""
    made = worlds.public / "made-by-yaml"
    made.unlink(missing_ok=True)
    word = _load(f"tenants: !!python/object/apply:os.mkfifo [{made}]\n", off)
    return "escaped" if made.exists() else word


def _tenant_named(name: str) -> Run:
    return _yaml(json.dumps({"tenants": {name: {"package": "evil", "ipc": "none"}}}))


def _dropped(name: bytes) -> Run:
    def run(_worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        """A package that is dropped into new_tenants/ under a name that is none."""
        with _package() as directory:
            state = directory.parent / "state"
            (state / "new_tenants").mkdir(parents=True)
            directory.rename(os.fsdecode(bytes(state / "new_tenants") + b"/" + name))
            file = directory.parent / "tenants.yaml"
            file.write_text("tenants: {}\n")
            with patched(off):
                try:
                    found = load.load(file, root=state)
                except SpecError:
                    return "refused"
                finally:
                    directory.mkdir(exist_ok=True)
            return "worked" if found.tenants else "refused"

    return run


def _lines_are_plain(config: bytes, progs: bytes = b"main") -> Run:
    def run(_worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        """P08: what is wrong is said in lines that no terminal obeys."""
        with _package(config) as directory:
            if progs != b"main":
                os.mkfifo(bytes(directory / "progs") + b"/" + progs)
            with patched(off):
                try:
                    package.read(directory, "evil")
                except SpecError as error:
                    said = "".join(error.lines())
                    return "worked" if re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", said) else "refused"
        return "nothing was said"

    return run


# /home


def _deploys_through_a_link(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """F23: the tenant put a link to a directory of the host where a directory of progs/ is to be deployed."""
    outside = worlds.public / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir()
    state = State(worlds.scratch / f"deploy-{len(off)}")
    state.create()
    with _package() as directory:
        (directory / "progs/sub").mkdir()
        (directory / "progs/sub/file").write_text("evil\n")
        who = identity.ensure(state, "evil")
        tenant_home = state.tenant_persist(who.tid) / identity.HOME
        (tenant_home / "sub").symlink_to(outside)
        bench = Bench(state, directory, name="evil", base="none", config={"dependencies": ""})
        tenant = bench.tenant()
        found = tenant.package
        wanted = home.desired(state, contents.digests(state, found), None)
        with patched(off):
            home.deploy(state, tenant, who.tid, wanted, Lines())
    shutil.rmtree(state.root)
    return "escaped" if list(outside.iterdir()) else "refused"


def attempts() -> Iterator[Attempt]:
    """Yield every attempt of this group."""

    def one(row: str, title: str, guards: tuple[Guard, ...], run: Run) -> Attempt:
        return Attempt(row, title, guards, run, refused=REFUSED)

    yield one("P01", "config.json is a link to a file of the host", (LINKS,), _prepared(_hosts_config))
    yield one("P01", "progs is a link to a directory of the host", (LINKS,),
              _prepared(lambda worlds, directory: _replace(directory / "progs", _hosts_directory(worlds))))  # fmt: skip
    yield one("P01", "a program is a link to a file of the host", (LINKS,),
              _prepared(lambda worlds, directory: _replace(directory / "progs/main", worlds.canary)))  # fmt: skip
    yield one("P01", "a directory of progs is a link to one of the host", (LINKS,), _prepared(_linked_directory))
    yield one("P01", "the package is a link to a directory of the host", (LINKS,), _linked_package)
    yield one("P02", "a program swapped for a link between look and read", (LINKS, IDENTITY),
              _swapped(lambda worlds, path: _replace(path, worlds.canary)))  # fmt: skip
    yield one("P02", "a program swapped for another file between look and read", (IDENTITY,),
              _swapped(_another))  # fmt: skip
    yield Attempt("P02", "a directory swapped for a link while it is read, 10,000 rounds", (LINKS,), _race,
                  refused=frozenset({"stayed inside"}))  # fmt: skip
    yield one("P03", "config.json is a FIFO", (KINDS,), _prepared(_fifo_config))
    yield one("P03", "a FIFO in progs", (KINDS,),
              _prepared(lambda _worlds, directory: os.mkfifo(directory / "progs/fifo")))  # fmt: skip
    yield one("P03", "a socket in progs", (KINDS,), _prepared(_socket))
    yield one("P03", "/dev/zero in progs", (KINDS,), _prepared(_node(stat.S_IFCHR, 1, 5)))
    yield one("P03", "a disk in progs", (KINDS,), _prepared(_node(stat.S_IFBLK, 8, 0)))
    yield one("P03", "a whiteout in progs", (KINDS,), _prepared(_node(stat.S_IFCHR, 0, 0)))
    yield one("P04", "a hard link to a file of the host in progs", (ONE_LINK,), _prepared(_hard_link("progs/secret")))
    yield one(
        "P04", "config.json is a hard link to a file of the host", (ONE_LINK,), _prepared(_hard_link("config.json"))
    )
    yield one("P05", "a program changed in place between look and read", (IDENTITY,),
              _swapped(lambda _worlds, path: path.write_text("changed")))  # fmt: skip
    yield one("P05", "a program that grows while it is hashed", (UNCHANGED,), _grows_while_hashed)
    yield one("P17", "more files than are allowed", (COUNTS,), _many)
    yield one("P17", "deeper than is allowed", (COUNTS,), _prepared(_deep))
    yield one("P17", "a hole larger than is allowed", (COUNTS,), _prepared(_large))
    yield one("P12", "config.json larger than is allowed", (COUNTS,),
              _configured(json.dumps({**_CONFIG, "env": {"A": "x" * (1 << 17)}}).encode()))  # fmt: skip
    for title, name in (("a newline", b"a\nb"), ("an escape", b"\x1b[2J"), ("bytes that are no UTF-8", b"\xff\xfe"),
                        ("reversed text", "\u202etxt.sh".encode())):  # fmt: skip
        yield one("P06", f"a program's name with {title}", (PLAIN_NAMES,), _prepared(_named(name)))
    for text in (
        "..",
        ".",
        "",
        "/etc",
        "a/b",
        "a\nb",
        "name\n",
        "-rf",
        "--",
        "x" * 64,
        "a b",
        "Tenant",
        "base:x",
        "a=b",
    ):
        yield one("P06", f"a tenant named {text!r}", (SCHEMA, NAMES), _tenant_named(text))
    yield one("P06", "a tenant named as a tid", (NAMES,), _tenant_named("0123456789abcdef" * 2))
    for dropped in (b"-rf", b"a b", b"UPPER", b"a\nb", b"\xff"):
        yield one("P06", f"a package dropped as {dropped!r}", (NAMES,), _dropped(dropped))
    for path, guards in (("/home/../../etc/passwd", (CROSS,)), ("/etc/passwd", (SCHEMA, CROSS)), ("/home/", (SCHEMA,)),
                         ("/home/missing", (CROSS,)), ("/home/main; id", (CROSS,))):  # fmt: skip
        yield one("P07", f"an install script named {path}", guards, _configured({"dependencies": path}))
    for path in ("../config.json", "/etc", "..", "main/../../config.json"):
        yield one("P07", f"inputs named {path}", (CROSS,), _configured({"inputs": [path]}))
    raw = json.dumps(_CONFIG).encode()[:-1]
    for title, config in (
        ("an escape in a key", raw + b', "\\u001b]8;;": 1}'),
        ("a bell in a value", raw.replace(b'"tid": ""', b'"tid": "\\u0007"') + b"}"),
        ("reversed text in a key", raw + b', "\\u202ekey": 1}'),
    ):
        yield one("P08", f"{title} of config.json, printed", (ESCAPING,), _lines_are_plain(config))
    yield one(
        "P08", "an escape in a file's name, printed", (ESCAPING,), _lines_are_plain(raw + b"}", b"\x1b]52;c;x\x07")
    )
    yield one("P09", "JSON nested 30,000 deep", (PARSER,), _configured(b"[" * 30_000))
    for title, config, guards in (
        ("a number of 5,000 digits", raw + b', "x": ' + b"9" * 5000 + b"}", (PARSER,)),
        ("1e400", raw + b', "x": 1e400}', (PARSER, SCHEMA)),
        ("NaN", raw + b', "x": NaN}', (PARSER, SCHEMA)),
        ("-Infinity", raw + b', "x": -Infinity}', (PARSER, SCHEMA)),
    ):
        yield one("P10", title, guards, _configured(config))
    yield one("P10", "true for a text", (SCHEMA,), _configured({"cname": True}))
    yield one("P11", "a key that stands twice", (PARSER,), _configured(raw + b', "init": "/home/other"}'))
    for title, config in (
        ("a byte order mark", b"\xef\xbb\xbf" + raw + b"}"), ("UTF-16", json.dumps(_CONFIG).encode("utf-16")),
        ("bytes that are no UTF-8", raw + b', "x": "\xff"}'),
        ("half of a character", raw + b', "env": {"A": "\\ud800"}}'),
        ("an empty file", b""), ("a NUL after the end", raw + b"}\0"),
    ):  # fmt: skip
        yield one("P12", f"{title} as config.json", (PARSER,), _configured(config))
    yield one("P12", "config.json is a directory", (KINDS, ONE_LINK), _prepared(_directory_config))
    yield one("P13", "a YAML tag that calls a function", (YAML,), _tag)
    yield one("P13", "YAML nested deeper than is allowed", (COUNTS, SCHEMA), _yaml("x: " + "[" * 40 + "]" * 40))
    yield one("P13", "a YAML key that stands twice", (YAML,), _yaml("tenants: {}\ntenants: {}\n"))
    for word in ("a;b", "$(id)", "-oDebug=1", "a b", "a\nb"):
        text = json.dumps({"bases": {"default": {"packages": [word]}}})
        yield one("P15", f"a Debian package named {word!r}", (SCHEMA,), _yaml(text))
    for key, value in (("suite", "../x"), ("mirror", "http://x -o y"), ("arch", "--help"), ("variant", "x;y")):
        yield one(
            "P15", f"a base's {key} {value!r}", (SCHEMA,), _yaml(json.dumps({"bases": {"default": {key: value}}}))
        )
    yield one("F23", "/home deployed through a link", (DEPLOYED_BELOW,), _deploys_through_a_link)


def _linked_package(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    with _package() as directory:
        link = directory.parent / "link"
        link.symlink_to(directory)
        return _word(link, off)


def _directory_config(_worlds: Worlds, directory: Path) -> None:
    (directory / "config.json").unlink()
    (directory / "config.json").mkdir()
