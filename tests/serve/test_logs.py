"""What tenants say is kept: bounded, whole, and readable while it grows."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from isochamber.serve import journal, logs
from isochamber.serve.ring import Ring
from isochamber.serve.supervisor import log_directory
from tests.launch.tenants import Tenant
from tests.serve.world import Terminal, World

Add = Callable[..., Tenant]


def _texts(directory: Path) -> list[str]:
    lines = []
    for path in logs.files(str(directory)):
        for record in Path(path).read_bytes().splitlines():
            line = logs.parse(record)
            assert line is not None
            lines.append(line["text"])
    return lines


def test_a_ring_turns_at_its_size_and_keeps_its_count_of_files(tmp_path: Path) -> None:
    ring = Ring(str(tmp_path), 1000, 3)
    for number in range(200):
        ring.write(b"stdout", b"line %04d\n" % number)
    ring.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    texts = _texts(tmp_path)
    assert texts[-1] == "line 0199"
    assert texts == sorted(texts)  # in order, and without a gap
    assert len(texts) == 200 - int(texts[0].split()[1])


def test_a_ring_goes_on_where_it_stopped(tmp_path: Path) -> None:
    for number in range(3):
        ring = Ring(str(tmp_path), 1000, 3)
        ring.write(b"stderr", b"%d\n" % number)
        ring.close()
    assert _texts(tmp_path) == ["0", "1", "2"]


def test_one_chunk_larger_than_the_ring_leaves_it_as_small_as_ever(tmp_path: Path) -> None:
    ring = Ring(str(tmp_path), 1000, 2)
    ring.write(b"stdout", b"x\n" * 50000)
    ring.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2000


def test_a_line_without_end_becomes_pieces_that_make_it_up_again(tmp_path: Path) -> None:
    ring = Ring(str(tmp_path), 1 << 20, 2)
    ring.write(b"stdout", b"a" * 40000)
    ring.write(b"stdout", b"b\nnext\r\n")
    ring.close()
    lines = [
        line
        for path in logs.files(str(tmp_path))
        for line in map(logs.parse, Path(path).read_bytes().split(b"\n"))
        if line
    ]
    assert "".join(line["text"] + ("" if line["partial"] else "\n") for line in lines) == "a" * 40000 + "b\nnext\r\n"


def test_a_full_disk_loses_output_and_says_how_much(tmp_path: Path) -> None:
    ring = Ring(str(tmp_path), 1 << 20, 2)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, ring._fd)
    os.close(full)
    ring.write(b"stdout", b"lost\n")
    ring.close()
    assert ring.failed > 0


def test_a_flood_fills_neither_the_disk_nor_anybodys_time(world: World, add: Add) -> None:
    tenant = add(
        argv=["/bin/sh", "-c", "yes 'a flood of output'"],
        service={"logs": {"size": 100_000, "count": 3, "journald": False}},
    )
    endless = add(argv=["/bin/cat", "/dev/zero"], service={"logs": {"size": 100_000, "count": 2, "journald": False}})
    quiet = add(argv=["/bin/echo", "heard"])
    world.begin()
    world.ask("start", tenant.name, endless.name)
    directory = Path(log_directory(str(world.root), tenant.tid))
    with contextlib.closing(world.stream("logs", tenant=tenant.name, follow=True)) as lines:
        for _ in range(20000):  # through many turns of the ring
            next(lines)
    world.ask("start", quiet.name)
    world.said(quiet, "heard")
    assert world.row(tenant)["state"] == "running"
    world.ask("stop", tenant.name, endless.name, time=0)
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 300_000


def test_logs_begin_with_the_last_lines_or_at_a_time_and_follow_to_the_end(world: World, add: Add) -> None:
    tenant = add(
        argv=["/bin/sh", "-c", "seq 1 100; echo wrong >&2; until [ -e /home/go ]; do sleep 0.02; done; echo over"]
    )
    world.begin()
    world.ask("start", tenant.name)
    world.said(tenant, "wrong")
    assert world.output("logs", "--tail", "3", tenant.name) == "99\n100\n"
    done = world.cli("logs", "-n", "1", tenant.name)
    assert (done.stdout, done.stderr) == ("", "wrong\n")
    between = time.time()
    with contextlib.closing(world.stream("logs", tenant=tenant.name, follow=True, since=between)) as lines:
        (tenant.home / "go").touch()
        assert [line["text"] for line in lines] == ["over"]  # and the stream ends with the tenant
    assert len(world.output("logs", tenant.name).splitlines()) == 101
    stamped = world.output("logs", "-t", "-n", "1", tenant.name)
    assert stamped.startswith("20")
    assert stamped.endswith("Z over\n")
    first = json.loads(world.output("logs", "--json", tenant.name).splitlines()[0])
    assert (first["stream"], first["text"], first["partial"]) == ("stdout", "1", False)


def test_what_a_tenant_says_can_not_steer_the_operators_terminal(world: World, add: Add) -> None:
    tenant = add(argv=["/usr/bin/printf", "\\033]0;owned\\007 plain\\n"])
    world.begin()
    world.ask("start", tenant.name)
    world.ask("wait", tenant.name)
    screen = Terminal(world.command("logs", tenant.name))
    assert screen.end() == 0
    assert b"\x1b" not in screen.seen
    assert b"\\x1b]0;owned\\x07 plain" in screen.seen
    screen = Terminal(world.command("logs", "--raw", tenant.name))
    assert screen.end() == 0
    assert b"\x1b]0;owned" in screen.seen  # the control: it would
    assert world.output("logs", tenant.name) == "\x1b]0;owned\x07 plain\n"


def test_a_tenants_last_words_are_kept(world: World, add: Add) -> None:
    tenant = add(argv=["/bin/sh", "-c", "head -c 60000 /dev/zero | tr '\\0' x; printf end"])
    world.begin()
    for _ in range(5):
        world.ask("start", tenant.name)
        world.ask("wait", tenant.name)
    text = "".join(line["text"] for line in world.stream("logs", tenant=tenant.name))
    assert text.count("end") == 5
    assert text.count("x") == 5 * 60000


def test_the_journal_gets_each_line_as_one_field_whatever_is_in_it(tmp_path: Path) -> None:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    end.bind(str(tmp_path / "socket"))
    with end:
        refused = journal.send("name", "0" * 32, 7, 2, b"one\nMESSAGE=forged\n", str(tmp_path / "socket"))
        assert refused == 0
        first, second = end.recv(65536), end.recv(65536)
    assert first.endswith(b"MESSAGE\n" + (3).to_bytes(8, "little") + b"one\n")
    assert b"\nMESSAGE\n" + (14).to_bytes(8, "little") + b"MESSAGE=forged\n" in second
    assert b"PRIORITY=3\n" in first
    assert b"CONTAINER_NAME=name\n" in first
    assert journal.send("name", "0" * 32, 7, 1, b"a\nb\n", str(tmp_path / "nobody")) == 2


@pytest.mark.parametrize("seconds", [0.0, 1.5, 1764021725.123456])
def test_times_compare_as_the_ring_writes_them(seconds: float) -> None:
    assert len(logs.timestamp(seconds)) == len("2026-11-24T22:02:05.123456Z")
