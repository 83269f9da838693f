"""A tenant's package: read by root, made by somebody who would like root to read something else.

Every path is opened below the package's own descriptor with openat2(2)
(RESOLVE_BENEATH, no symlinks), every check is made on what was opened, and nothing
but regular files of one link and directories is let in: a symlink in progs/ is
refused altogether, wherever it points.

A hard link to a file of the host would show in the link count, but a tenant could take
its link away between our open and our look. So a file counts only when its inode had
not changed for a tick of the kernel's clock before it was opened: giving a name and
taking it away both set the ctime, which nobody can set back.
"""

import errno
import json
import math
import os
import re
import shlex
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from isochamber.errors import IsochamberError, SpecError, printable
from isochamber.launch import syscalls
from isochamber.spec import document, validate
from isochamber.spec.model import Package, Place, ProgFile

CONFIG = "config.json"
PROGS = "progs"

MAX_CONFIG_BYTES = 64 << 10
MAX_ENTRIES = 10_000
MAX_DEPTH = 32
MAX_BYTES = 4 << 30

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_TID = re.compile(r"[0-9a-f]{32}")

_BENEATH = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO must not hold us

_TICK = 0.02  # seconds; the clock of file times ticks every 10 ms at worst
_TRIES = 5
_wait = time.sleep

_KINDS = {
    stat.S_IFLNK: "a symlink", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def _open_settled(opener: Callable[[], int]) -> tuple[int, os.stat_result]:
    """Return a descriptor of ``opener`` and its status; a regular file of one link had it for a tick before.

    Raises OSError, also when the file changes all the time. A ctime of the future (the
    host's clock was set back) tells nothing and is let in: what is left is the link count.
    """
    for _ in range(_TRIES):
        before = time.time()
        descriptor = opener()
        status = os.fstat(descriptor)
        age = before - status.st_ctime_ns / 1e9
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or age >= _TICK or age < -1:
            return descriptor, status
        os.close(descriptor)
        _wait(_TICK)
    raise OSError(errno.EBUSY, "it changes all the time")


def is_name(text: str) -> bool:
    """Say whether ``text`` may name a tenant: the pattern whole, and no tid, which run: takes too."""
    return NAME.fullmatch(text) is not None and _TID.fullmatch(text) is None


class _Problems:
    """Collects what is wrong with one package, each as a whole line."""

    def __init__(self, directory: Path, tenant: str) -> None:
        self.directory, self.tenant = directory, tenant
        self.lines: list[str] = []
        self.partial = False  # progs/ was not read to its end: what is missing there says nothing

    def add(self, where: str | Place, what: str) -> None:
        place = where if isinstance(where, Place) else f"{self.directory}/{where}" if where else self.directory
        self.lines.append(f"{place}: {self.tenant}: {what}")


def read(directory: Path, tenant: str | None = None) -> Package:
    """Return the package in ``directory``; raises SpecError with every problem, touches nothing."""
    found = _Problems(directory, tenant or directory.name)
    package = None
    try:
        root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        found.add("", f"the package can't be opened: {error.strerror}, must be a directory with {CONFIG} and {PROGS}/")
        raise SpecError(tuple(found.lines)) from None
    try:
        content = _read_config(root, found)
        progs = tuple(_read_progs(root, found))
        if content is not None:
            package = _validated(directory, content, progs, found)
    finally:
        os.close(root)
    if package is None or found.lines:
        raise SpecError(tuple(found.lines))
    return package


# config.json


def _read_config(root: int, found: _Problems) -> bytes | None:
    try:
        descriptor, status = _open_settled(lambda: syscalls.openat2(root, CONFIG, _READ, resolve=_BENEATH))
    except OSError as error:
        found.add(CONFIG, f"can't be opened: {error.strerror}, must be a regular file")
        return None
    try:
        if not stat.S_ISREG(status.st_mode):
            found.add(CONFIG, "is not a regular file")
        elif status.st_nlink != 1:
            found.add(CONFIG, "has another hard link, which could be a file of the host: copy it")
        else:
            content = os.read(descriptor, MAX_CONFIG_BYTES + 1)
            if len(content) <= MAX_CONFIG_BYTES:
                return content
            found.add(CONFIG, f"is larger than {MAX_CONFIG_BYTES} bytes")
    finally:
        os.close(descriptor)
    return None


class _BadError(ValueError):
    """A JSON text that the standard parser takes and we do not."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _BadError(f"the key {printable(key)} stands twice")
        result[key] = value
    return result


def _refuse_constant(text: str) -> Any:
    raise _BadError(f"{text} is not JSON")


def _number(text: str) -> int:
    if len(text) > 20:
        raise _BadError("a number is too long")
    return int(text)


def _fraction(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _BadError("a number is too large")
    return value


def _parse(directory: Path, content: bytes, found: _Problems) -> Any:
    file = f"{directory}/{CONFIG}"
    try:
        text = content.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=_number, parse_float=_fraction
        )
        text_of_values = json.dumps(value, ensure_ascii=False)
        text_of_values.encode("utf-8")  # a lone surrogate escape passes the parser and can't be written again
    except json.JSONDecodeError as error:
        found.add(Place(file, error.lineno, error.colno), f"is not JSON: {error.msg}")
    except UnicodeDecodeError as error:
        found.add(Place(file, content[: error.start].count(b"\n") + 1, 1), "is not UTF-8")
    except UnicodeEncodeError:
        found.add(Place(file, 1, 1), "a text holds half of a character (a lone surrogate)")
    except RecursionError:
        found.add(Place(file, 1, 1), "is nested too deeply")
    except ValueError as error:
        found.add(Place(file, 1, 1), str(error))
    else:
        return value
    return None


def _validated(directory: Path, content: bytes, progs: tuple[ProgFile, ...], found: _Problems) -> Package | None:
    before = len(found.lines)
    value = _parse(directory, content, found)
    if len(found.lines) > before:
        return None
    problems = validate.problems("config", value)
    if not problems:
        problems = [] if found.partial else list(_cross_check(value, {prog.path: prog for prog in progs}))
    if problems:
        # JSON is YAML enough to be asked where each value stands.
        places = document.parse(f"{directory}/{CONFIG}", content)
        for path, what in problems:
            found.add(places.place(path), what)
        return None
    init = value["init"]
    inputs = value.get("inputs")
    return Package(
        directory=directory,
        cname=value["cname"],
        dependencies=value.get("dependencies", ""),
        init=init if isinstance(init, str) else tuple(init),
        argv=tuple(shlex.split(init) if isinstance(init, str) else init),
        env=value.get("env", {}),
        user=_user(value.get("user", 0)),
        inputs=None if inputs is None else tuple(sorted(set(inputs))),
        progs=progs,
    )


def _user(value: int | str) -> tuple[int, int]:
    """Return (uid, gid) of ``user:``, a number or two with ":" between; one alone is both."""
    uid, _, gid = str(value).partition(":")
    return int(uid), int(gid or uid)


def _cross_check(value: dict[str, Any], progs: dict[str, ProgFile]) -> Iterator[validate.Problem]:
    script = value.get("dependencies", "").removeprefix("/home/")
    if script and (script not in progs or progs[script].kind != "file"):
        yield ("dependencies",), f"{printable(script)} is not a file of {PROGS}/, must be /home/ and its path there"
    for index, path in enumerate(value.get("inputs", ())):
        if path not in progs:
            yield ("inputs", index), f"{printable(path)} is not in {PROGS}/"


# progs/


def _read_progs(root: int, found: _Problems) -> Iterator[ProgFile]:
    try:
        descriptor = syscalls.openat2(root, PROGS, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, resolve=_BENEATH)
    except FileNotFoundError:
        return
    except OSError as error:
        found.add(PROGS, f"can't be opened: {error.strerror}, must be a directory")
        found.partial = True
        return
    walk = _Walk(found)
    try:
        yield from sorted(walk.read(descriptor, "", 1), key=lambda prog: prog.path)
    finally:
        os.close(descriptor)


class _Walk:
    """One walk of a progs/, with what it has counted."""

    def __init__(self, found: _Problems) -> None:
        self._found = found
        self._entries = 0
        self._bytes = 0
        self._over = False

    def read(self, directory: int, prefix: str, depth: int) -> Iterator[ProgFile]:
        for name in sorted(os.listdir(directory)):
            if self._over:
                return
            path = f"{prefix}{name}"
            where = f"{PROGS}/{path}"
            self._entries += 1
            if self._entries > MAX_ENTRIES:
                self._stop(PROGS, f"holds more than {MAX_ENTRIES} files")
            elif printable(name) != name:
                self._found.add(where, "its name holds control or invisible characters, or is not UTF-8")
            else:
                yield from self._entry(directory, name, path, depth)

    def _stop(self, where: str, what: str) -> None:
        self._found.add(where, what)
        self._over = self._found.partial = True

    def _entry(self, directory: int, name: str, path: str, depth: int) -> Iterator[ProgFile]:
        where = f"{PROGS}/{path}"
        try:
            descriptor, status = _open_settled(
                lambda: os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            )
        except OSError as error:
            self._found.add(where, f"can't be opened: {error.strerror}")
            return
        try:
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            kind = stat.S_IFMT(status.st_mode)
            if kind == stat.S_IFREG:
                self._bytes += status.st_size
                if status.st_nlink != 1:
                    self._found.add(where, "has another hard link, which could be a file of the host: copy it")
                elif self._bytes > MAX_BYTES:
                    self._stop(PROGS, f"holds more than {MAX_BYTES} bytes")
                else:
                    yield ProgFile(path, "file", bool(status.st_mode & 0o111), status.st_size, identity)
            elif kind == stat.S_IFDIR:
                yield ProgFile(path, "directory", False, 0, identity)
                yield from self._below(descriptor, path, depth)
            else:
                self._found.add(where, f"is {_KINDS.get(kind, 'something odd')}, must be a regular file or a directory")
        finally:
            os.close(descriptor)

    def _below(self, descriptor: int, path: str, depth: int) -> Iterator[ProgFile]:
        if depth >= MAX_DEPTH:
            self._stop(f"{PROGS}/{path}", f"is deeper than {MAX_DEPTH} directories")
            return
        below = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=descriptor)
        try:
            yield from self.read(below, f"{path}/", depth + 1)
        finally:
            os.close(below)


def open_prog(package: Package, prog: ProgFile) -> int:
    """Open a file of progs/ for reading and return its descriptor; raises IsochamberError.

    What was opened must be what the walk saw: same inode, size and times. A tenant
    that swaps it in between gets an error, never another file read.
    """
    path = package.directory / PROGS / prog.path
    try:
        root = os.open(package.directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            descriptor = syscalls.openat2(root, f"{PROGS}/{prog.path}", _READ, resolve=_BENEATH)
        finally:
            os.close(root)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="package", path=path, hint="it changed: run ./doit again") from error
    status = os.fstat(descriptor)
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if identity != prog.identity or not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise IsochamberError("changed while it was read", stage="package", path=path, hint="run ./doit again")
    return descriptor


_BLANK = {
    CONFIG: '{{"tid": "", "cname": "{name}", "dependencies": "/home/install_deps.sh", "init": "/home/{name}"}}\n',
    f"{PROGS}/install_deps.sh": "#!/bin/sh\nset -e\n"
    "# Runs once, in a sandbox with network; what it adds becomes this tenant's layer.\n"
    "# apt-get update\n# apt-get install -y --no-install-recommends ...\n",
    f"{PROGS}/{{name}}": '#!/bin/sh\necho "hello from $(hostname), process $$"\n',
}


def create(directory: Path, name: str) -> None:
    """Make a blank package that runs as it is; raises IsochamberError when there is something already."""
    if not is_name(name):
        raise IsochamberError(f"is no name for a tenant, must match {NAME.pattern}", stage="init", tenant=name)
    try:
        directory.mkdir(parents=True)
        (directory / PROGS).mkdir()
        for path, text in _BLANK.items():
            file = directory / path.format(name=name)
            file.write_text(text.format(name=name))
            file.chmod(0o644 if file.name == CONFIG else 0o755)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="init", tenant=name, path=directory) from error
