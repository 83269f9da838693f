"""Host names of ``egress`` to addresses with how long they may be used: A and AAAA by DNS (RFC 1035), UDP only.

getaddrinfo(3) does not tell the time to live, so the host's resolvers are asked here.
A name in the host's /etc/hosts is taken from there.
"""

import contextlib
import ipaddress
import secrets
import select
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

Answer = tuple[str, int]  # address, seconds

_TYPES = {1: 4, 28: 16}  # A, AAAA: bytes of an address
_SHORTEST, _LONGEST = 60, 86_400  # a rule lives at least as long as a refresh takes to come, at most a day
_STATIC = 86_400
_TIMEOUT = 2.0
_MAX_JUMPS = 64


def resolve(names: Iterable[str], resolvers: Iterable[str]) -> dict[str, tuple[Answer, ...]]:
    """Return what each name resolves to now; one that does not is left out. Never raises for a bad answer."""
    servers = list(resolvers)
    found: dict[str, tuple[Answer, ...]] = {}
    static = dict(_hosts())
    for name in dict.fromkeys(names):
        answers = static.get(name) or _ask(name, servers)
        if answers:
            found[name] = tuple(sorted(answers))
    return found


def _hosts() -> Iterator[tuple[str, list[Answer]]]:
    """Yield the names of /etc/hosts that are not the loopback's."""
    with contextlib.suppress(OSError):
        for line in Path("/etc/hosts").read_text(errors="replace").splitlines():
            words = line.partition("#")[0].split()
            with contextlib.suppress(ValueError, IndexError):
                if not ipaddress.ip_address(words[0]).is_loopback:
                    for name in words[1:]:
                        yield name.lower(), [(words[0], _STATIC)]


def _ask(name: str, servers: list[str]) -> list[Answer]:
    """Ask the servers in turn for both kinds; the first that answers the question decides."""
    for server in servers:
        answers: list[Answer] = []
        answered = False
        for kind in _TYPES:
            reply = _query(server, name, kind)
            if reply is not None:
                answered = True
                answers += reply
        if answered:
            return answers
    return []


def _query(server: str, name: str, kind: int) -> list[Answer] | None:
    """Return a server's answers, or None when it gives none in time, or one that is not to this question."""
    number = secrets.randbelow(1 << 16)
    question = _name(name) + struct.pack(">HH", kind, 1)
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with (
        contextlib.suppress(OSError, ValueError, IndexError, struct.error),
        socket.socket(family, socket.SOCK_DGRAM) as asked,
    ):
        asked.connect((server, 53))  # only its datagrams are taken then
        asked.send(struct.pack(">6H", number, 0x0100, 1, 0, 0, 0) + question)
        deadline = time.monotonic() + _TIMEOUT
        while (left := deadline - time.monotonic()) > 0 and select.select([asked], [], [], left)[0]:
            reply = asked.recv(4096)
            head = struct.unpack_from(">6H", reply)
            if head[0] == number and head[1] & 0x8000 and reply[12 : 12 + len(question)].lower() == question.lower():
                return list(_answers(reply, 12 + len(question), head[3], kind))
    return None


def _name(text: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode("ascii") for label in text.split(".")) + b"\0"


def _answers(reply: bytes, offset: int, count: int, kind: int) -> Iterator[Answer]:
    """Yield the addresses, with the least time to live of all records: an alias in between may end sooner."""
    found, least = [], _LONGEST
    for _ in range(count):
        offset = _skip_name(reply, offset)
        record, _, ttl, length = struct.unpack_from(">HHIH", reply, offset)
        offset += 10
        least = min(least, ttl)
        if record == kind and length == _TYPES[kind]:
            found.append(str(ipaddress.ip_address(reply[offset : offset + length])))
        offset += length
    for address in found:
        yield address, max(_SHORTEST, least)


def _skip_name(reply: bytes, offset: int) -> int:
    for _ in range(_MAX_JUMPS):
        length = reply[offset]
        if length & 0xC0:
            return offset + 2
        offset += 1 + length
        if not length:
            return offset
    raise ValueError("a name without end")
