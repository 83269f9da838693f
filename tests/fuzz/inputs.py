"""Hostile inputs: the seeds of this directory, mutated, and values made from nothing.

Each is made from one number, which hypothesis chooses: its own strategies for nested
values take twenty times as long as what is tested here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

SEEDS = Path(__file__).with_name("seeds")

# What a mutation puts in: where parsers, schemas and printers have been wrong before.
_PIECES = (
    b"", b"\0", b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\\ud800", b"\x1b[2J", "\u202e".encode(), b"\r", b"\n", b"\t",
    b"[", b"]", b"{", b"}", b'"', b"'", b":", b",", b"- ", b"? ", b"&a ", b"*a", b"<<: ", b"!!python/name:os.system ",
    b"!!binary ", b"!!set ", b"| \n", b"> \n", b"# ", b"---\n", b"...\n", b"%TAG ! !\n", b"~", b"null", b"true", b"NaN",
    b"-Infinity", b"1e400", b"-0", b"0x10", b"010", b"1:30", b"2001-01-01", b"1_000", b"9" * 25, b"9" * 5000, b"..",
    b"/", b"../../etc/passwd", b"/home/", b"-rf", b"--", b"a" * 300, b"[" * 100, b"{x: " * 50, b"\xef\xbb\xbf",
)  # fmt: skip


@cache
def seeds(kind: str) -> list[bytes]:
    """Return the seeds of one kind, in order of their names."""
    return [path.read_bytes() for path in sorted((SEEDS / kind).iterdir())]


def _insert(content: bytearray, chance: random.Random) -> None:
    at = chance.randint(0, len(content))
    content[at:at] = chance.choice(_PIECES)


def _replace(content: bytearray, chance: random.Random) -> None:
    at, length = chance.randint(0, len(content)), chance.choice((1, 1, 2, 5, 20))
    content[at : at + length] = chance.choice(_PIECES)


def _flip(content: bytearray, chance: random.Random) -> None:
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def _repeat(content: bytearray, chance: random.Random) -> None:
    begin = chance.randint(0, len(content))
    piece = content[begin : begin + chance.choice((1, 3, 10, 40))]
    at = chance.randint(0, len(content))
    content[at:at] = bytes(piece) * chance.choice((1, 2, 10))


def _cut(content: bytearray, chance: random.Random) -> None:
    begin = chance.randint(0, len(content))
    del content[begin : begin + chance.choice((1, 3, 10, 1000))]


_MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (_insert, _replace, _flip, _repeat, _cut)


def mutation(kind: str, chance: random.Random) -> bytes:
    """Return a mutation of one of the seeds of ``kind``."""
    content = bytearray(chance.choice(seeds(kind)))
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        chance.choice(_MUTATIONS)(content, chance)
    return bytes(content[: 1 << 17])


_TEXTS = (
    "", ".", "..", "/", "/home/main", "none", "host", "bridge", "64M", "default", "hello", "\0", "\x1b", "\u202e",
    "a\n", "\ud800", "always", "1:2", "-1", "x" * 70, "required", "CHOWN", "~", "é",
)  # fmt: skip
_SCALARS: tuple[object, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    64,
    1 << 31,
    1 << 63,
    1 << 70,
    0.5,
    float("nan"),
    float("inf"),
    [],
    {},
)


def value(chance: random.Random, depth: int = 0) -> object:
    """Return any value that JSON can say, and some that it can't."""
    kind = chance.randrange(4 if depth < 4 else 2)
    if kind == 0:
        return chance.choice(_SCALARS)
    if kind == 1:
        return text(chance)
    if kind == 2:
        return [value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {text(chance): value(chance, depth + 1) for _ in range(chance.randrange(4))}


def text(chance: random.Random) -> str:
    """Return a text that has been trouble before, or any."""
    if chance.random() < 0.7:
        return chance.choice(_TEXTS)
    return "".join(
        chr(chance.choice((chance.randrange(128), chance.randrange(0x3000)))) for _ in range(chance.randrange(9))
    )


def mapping(keys: list[str], chance: random.Random) -> dict[str, object]:
    """Return an object with some of the keys that we know and some that we do not, and any values."""
    names = [chance.choice(keys) if chance.random() < 0.8 else text(chance) for _ in range(chance.randrange(9))]
    return {name: value(chance) for name in names}


def changed(raw: dict[str, object], chance: random.Random) -> dict[str, object]:
    """Return ``raw`` with a few values, also deep within, gone or replaced."""
    for _ in range(chance.randint(0, 3)):
        where = raw
        while where:
            key = chance.choice(list(where))
            below = where[key]
            if isinstance(below, dict) and below and chance.random() < 0.6:
                where = below
                continue
            if chance.random() < 0.2:
                del where[key]
            else:
                where[key] = value(chance)
            break
    return raw


def as_json(raw: object) -> bytes:
    """Return ``raw`` as JSON, NaN and lone surrogates too: what an attacker's own writer makes."""
    return json.dumps(raw, ensure_ascii=True).encode()


_NAMES = (
    b"main", b"data", b"sub", b"install_deps.sh", b"-rf", b"a b", b"\xff", b"\n", b"\x1b", b"x" * 255, b"..", b".",
    "\u202e".encode(), b"e\xcc\x81", b"\xc3\xa9",
)  # fmt: skip
_KINDS = ("file", "directory", "program", "link", "dangling", "fifo", "socket", "hard link", "set-uid", "hole")
Tree = list[tuple[bytes, str, int]]


def tree(chance: random.Random) -> Tree:
    """Return a progs/: name, kind and in which of the directories before it."""
    usual = ("file", "directory", "program")
    kinds = usual if chance.random() < 0.3 else _KINDS
    return [(_name(chance), chance.choice(kinds), chance.randrange(4)) for _ in range(chance.randrange(9))]


def _name(chance: random.Random) -> bytes:
    return chance.choice(_NAMES) if chance.random() < 0.8 else chance.randbytes(chance.randint(1, 8))
