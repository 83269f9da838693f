"""Forged archives: the meta data and members that somebody else writes."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import zstandard

from isochamber.build import backup

Member = tuple[tarfile.TarInfo, bytes]


def member_of(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **more: Any) -> Member:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.mode = kind, len(content), 0o644
    for key, value in more.items():
        setattr(member, key, value)
    return member, content


def forge(file: Path, members: list[Member], **meta: Any) -> None:
    wanted = {"format": 1, "name": "sensor", "size": 1 << 20, "names": 100, **meta}
    begin = [member_of("isochamber.json", content=json.dumps(wanted).encode()), member_of("home", tarfile.DIRTYPE)]
    with (
        zstandard.ZstdCompressor().stream_writer(file.open("wb")) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for member, content in [*begin, *members]:
            archive.addfile(member, io.BytesIO(content))


_D, _S, _L = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
HOSTILE: dict[str, list[Member]] = {
    "dot dot": [member_of("home/../../escaped", content=b"x")],
    "absolute": [member_of("/escaped", content=b"x")],
    "through a symlink": [member_of("home/out", _S, linkname="{outside}"), member_of("home/out/escaped", content=b"x")],
    "over a symlink": [member_of("home/out", _S, linkname="{outside}/escaped"), member_of("home/out", content=b"x")],
    "a hard link out": [member_of("home/h", _L, linkname="../../../../etc/passwd")],
    "a hard link through a symlink": [
        member_of("home/out", _S, linkname="{outside}"), member_of("home/h", _L, linkname="home/out/secret"),
    ],
    "a hard link to a symlink": [
        member_of("home/out", _S, linkname="{outside}/secret"), member_of("home/h", _L, linkname="home/out"),
    ],
    "a device": [member_of("home/null", tarfile.CHRTYPE, devmajor=1, devminor=3)],
    "the host's ids": [member_of("home/f", content=b"x", uid=70000)],
    "a negative id": [member_of("home/f", content=b"x", uid=-1)],
    "a trusted attribute": [
        member_of("home/f", content=b"x", pax_headers={backup.XATTRS: '{"trusted.overlay.opaque": "eQ=="}'})
    ],
    "an attribute that is none": [member_of("home/f", content=b"x", pax_headers={backup.XATTRS: "[[[["})],
    "more than it says": [member_of("home/f", content=b"x" * (2 << 20))],
    "more names than it says": [member_of(f"home/{number}", _D) for number in range(101)],
    "too deep": [member_of("home/" + "/".join(["d"] * count), _D) for count in range(1, 300)],
    "an endless file": [member_of("home/f", content=b"5\n", pax_headers={
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "home/f",
        "GNU.sparse.realsize": str(1 << 62),
    })],
    "a name beside": [member_of("beside/name", content=b"another")],
    "a path beside": [member_of("beside/../x", content=b"x")],
    "nothing of ours": [member_of("etc/passwd", content=b"x")],
    "no list": [],
    "a wrong list": [member_of("home/f", content=b"x"), member_of("files.list", content=b"")],
    "more after the list": [member_of("files.list", content=b""), member_of("home/f", content=b"x")],
}  # fmt: skip


def members(form: str, outside: Path) -> list[Member]:
    """Return the members of one form of HOSTILE, links to ``outside`` filled in."""
    return [(_with_outside(member, outside), content) for member, content in HOSTILE[form]]


def _with_outside(member: tarfile.TarInfo, outside: Path) -> tarfile.TarInfo:
    copied = tarfile.TarInfo(member.name)
    for key in ("type", "size", "mode", "uid", "gid", "devmajor", "devminor", "pax_headers"):
        setattr(copied, key, getattr(member, key))
    copied.linkname = member.linkname.replace("{outside}", str(outside))
    return copied
