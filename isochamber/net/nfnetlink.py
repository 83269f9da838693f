"""Single questions to nf_tables over netlink: does this table, rule or element exist, how much is a quota used.

nft(8) answers such questions too, but reads whole tables first (1.0.6), so that what
is asked of one tenant costs as much as there are tenants. Here each costs the same.

linux/netfilter/nf_tables.h, linux/netfilter/nfnetlink.h, netlink(7).
"""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Self

_NETLINK_NETFILTER, _SUBSYS_NFTABLES = 12, 10
_ERROR, _DONE = 2, 3  # NLMSG_ERROR, NLMSG_DONE
_REQUEST, _DUMP = 1, 0x300  # NLM_F_REQUEST, NLM_F_DUMP
_GETTABLE, _GETRULE, _GETSETELEM, _GETOBJ = 1, 7, 13, 19
_NESTED, _TYPE = 0x8000, 0x3FFF
_OBJECT_QUOTA = 2  # NFT_OBJECT_QUOTA
FAMILIES = {"inet": 1, "bridge": 7}

Attributes = dict[int, bytes]


class Questions:
    """A socket for questions in this thread's network namespace. Close it, or use it as a context; raises OSError."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def has_table(self, family: str, name: str) -> bool:
        """Say whether a table is there; raises OSError."""
        return bool(self._ask(_GETTABLE, family, _text(1, name)))

    def comments(self, family: str, table: str, chain: str) -> list[str]:
        """Return the comments of a chain's rules; none when it is not there. Raises OSError."""
        rules = self._ask(_GETRULE, family, _text(1, table) + _text(2, chain), dump=True)
        return [text for rule in rules for text in _comments(rule.get(7, b""))]

    def has_element(self, family: str, table: str, name: str, key: bytes) -> bool:
        """Say whether a set or a map has this key, as the kernel holds it; raises OSError."""
        element = _nested(1, _nested(1, _attribute(1, key)))
        return bool(self._ask(_GETSETELEM, family, _text(1, table) + _text(2, name) + _nested(3, element)))

    def used(self, family: str, table: str, quota: str) -> int | None:
        """Return the bytes counted by a named quota, or None when it is not there; raises OSError."""
        asked = _text(1, table) + _text(2, quota) + _attribute(3, struct.pack(">I", _OBJECT_QUOTA))
        for answer in self._ask(_GETOBJ, family, asked):
            return int.from_bytes(_attributes(answer[4]).get(4, b""), "big")
        return None

    def _ask(self, kind: int, family: str, attributes: bytes, *, dump: bool = False) -> list[Attributes]:
        """Return the answers' attributes; none for what does not exist. Raises OSError."""
        self._number += 1
        flags = _REQUEST | (_DUMP if dump else 0)
        body = struct.pack(">BBH", FAMILIES[family], 0, 0) + attributes
        head = struct.pack("=IHHII", 16 + len(body), _SUBSYS_NFTABLES << 8 | kind, flags, self._number, 0)
        self._socket.send(head + body)
        found: list[Attributes] = []
        while True:
            for answer_kind, content in self._messages():
                if answer_kind == _DONE:
                    return found
                if answer_kind == _ERROR:
                    (code,) = struct.unpack_from("=i", content)
                    if -code == errno.ENOENT:
                        return []
                    raise OSError(-code, os.strerror(-code))
                found.append(_attributes(content[4:]))
                if not dump:
                    return found

    def _messages(self) -> Iterator[tuple[int, bytes]]:
        data = self._socket.recv(1 << 20)
        while len(data) >= 16:
            length, kind, _, number, _ = struct.unpack_from("=IHHII", data)
            if number == self._number:  # an interrupted dump's rest is no answer
                yield kind, data[16:length]
            data = data[length + 3 & ~3 :]


def _attribute(kind: int, content: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(content), kind) + content + bytes(-len(content) % 4)


def _nested(kind: int, content: bytes) -> bytes:
    return _attribute(kind | _NESTED, content)


def _text(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")


def _attributes(data: bytes) -> Attributes:
    found: Attributes = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        found[kind & _TYPE] = data[4:length]
        data = data[max(length, 4) + 3 & ~3 :]
    return found


def _comments(userdata: bytes) -> Iterable[str]:
    """Yield the comment that libnftables put beside a rule: type, length, text (NFTNL_UDATA_RULE_COMMENT is 0)."""
    with contextlib.suppress(IndexError, UnicodeDecodeError):
        while userdata:
            kind, length = userdata[0], userdata[1]
            if kind == 0:
                yield userdata[2 : 2 + length].rstrip(b"\0").decode()
            userdata = userdata[2 + length :]
