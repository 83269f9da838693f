"""Packages made by hand, and what the reader says of them."""

import json
import os
import unicodedata
from pathlib import Path

import pytest

from isochamber.errors import SpecError
from isochamber.spec import package
from isochamber.spec.model import Package

CONFIG: dict[str, object] = {"tid": "", "cname": "probe", "dependencies": "/home/install.sh", "init": "/home/main -v"}


def make(directory: Path) -> Path:
    """Make a package that is accepted; every test changes one thing of it."""
    (directory / "progs/conf").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    for path, text in {"main": "#!/bin/sh\n", "install.sh": "#!/bin/sh\n", "conf/a": "own\n"}.items():
        (directory / "progs" / path).write_text(text)
    (directory / "progs/main").chmod(0o755)
    return directory


def configure(directory: Path, content: bytes | str | dict[str, object]) -> None:
    """Write config.json: bytes, a text, or keys that are changed."""
    if isinstance(content, dict):
        content = json.dumps({**CONFIG, **content})
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    (directory / "config.json").write_bytes(data)


def accepted(directory: Path) -> Package:
    return package.read(directory)


def refused(directory: Path) -> list[str]:
    """Return the lines of a refusal; each is one printable line that begins with the package's directory."""
    before = snapshot(directory.parent)
    with pytest.raises(SpecError) as caught:
        package.read(directory)
    lines = caught.value.lines()
    assert lines
    for line in lines:
        assert line.startswith(f"{directory}"), line
        assert harmless(line), line
        assert f": {directory.name}: " in line, line
    assert caught.value.exit_code == 2
    assert snapshot(directory.parent) == before, "reading changed something"
    return lines


def harmless(text: str) -> bool:
    """Say whether no character of ``text`` steers a terminal: no control, no half of one, nothing bidirectional."""
    bidi = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
    return not any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or ord(char) in bidi for char in text)


def snapshot(directory: Path) -> dict[bytes, tuple[int, ...]]:
    """Return every entry below ``directory`` with what would tell a change; nothing is followed."""
    found: dict[bytes, tuple[int, ...]] = {}
    for at, directories, files in os.walk(os.fsencode(directory)):
        for name in (*directories, *files):
            status = os.lstat(os.path.join(at, name))
            found[os.path.join(at, name)] = (
                status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_nlink, status.st_uid,
            )  # fmt: skip
    return found
