"""The supervisor's socket: who may speak, and what becomes of nonsense; its service manager; its metrics."""

import contextlib
import json
import os
import re
import select
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.serve import wire
from tests.launch.tenants import Tenant
from tests.serve.world import DEADLINE, World, eventually

Add = Callable[..., Tenant]

CLIENT = """
import json, os, socket, sys
gid, groups, path = int(sys.argv[1]), [int(group) for group in sys.argv[2].split(",") if group], sys.argv[3]
os.setgroups(groups); os.setgid(gid); os.setuid(12345)
end = socket.socket(socket.AF_UNIX)
try:
    end.connect(path)
    end.sendall(b'{"version": 1, "verb": "version"}\\n')
    print(end.makefile().readline())
except PermissionError:
    print("refused")
"""


def _as_user(gid: int, groups: str) -> str:
    words = [sys.executable, "-c", CLIENT, str(gid), groups, paths.control_socket()]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=DEADLINE)
    return done.stdout + done.stderr


def test_root_alone_may_connect_and_with_a_group_its_members_too(world: World, add: Add) -> None:
    add()
    world.begin()
    assert world.ask("version")["root"] == str(world.root)
    assert _as_user(54321, "54321").strip() == "refused"
    world.end()
    world.begin("--group", "54321")
    assert '"ok": true' in _as_user(54321, "")
    assert '"ok": true' in _as_user(1111, "54321")
    assert _as_user(1111, "1111").strip() == "refused"
    # The mode of the socket is one guard, the kernel's word on the peer another.
    os.chmod(paths.control_socket(), 0o666)
    assert "you may not talk" in _as_user(1111, "1111")
    os.chmod(paths.run_directory(), 0o700)


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense\n", b"[]\n", b"{}\n", b'{"version": 99, "verb": "ps"}\n', b'{"version": 1, "verb": "fly"}\n',
        b'{"version": 1, "verb": "start"}\n', b'{"version": 1, "verb": "start", "tenants": 7}\n',
        b'{"version": 1, "verb": "run", "tenant": "x"}\n', b'{"version": 1, "verb": "logs"}\n',
        b'{"version": 1, "verb": "exec", "tenant": {}}\n', b"\xff\xfe\n", b"{" * 100000 + b"\n",
    ],
)  # fmt: skip
def test_nonsense_gets_an_error_or_a_hang_up_and_harms_nobody(nonsense_world: World, line: bytes) -> None:
    end = socket.socket(socket.AF_UNIX)
    end.settimeout(DEADLINE)
    with end:
        end.connect(paths.control_socket())
        end.sendall(line)
        answer = end.makefile("rb").readline()
    assert answer == b"" or "error" in json.loads(answer)
    assert nonsense_world.ask("version")["ok"]


@pytest.fixture
def nonsense_world(world: World) -> World:
    world.begin()
    return world


def test_a_client_that_neither_reads_nor_ends_makes_nobody_wait(world: World, add: Add) -> None:
    tenant = add(argv=["/bin/sh", "-c", "yes | head -n 200000; echo over; sleep 1000"])
    world.begin()
    world.ask("start", tenant.name)
    deaf = socket.socket(socket.AF_UNIX)
    with deaf:
        deaf.connect(paths.control_socket())
        deaf.sendall(json.dumps({"version": 1, "verb": "logs", "tenant": tenant.name, "follow": True}).encode() + b"\n")
        world.said(tenant, "over")
        assert world.row(tenant)["state"] == "running"
    long = socket.socket(socket.AF_UNIX)
    long.settimeout(DEADLINE)
    with long:
        long.connect(paths.control_socket())
        with pytest.raises(BrokenPipeError):  # a request without end is hung up on
            for _ in range(1000):
                long.sendall(b"x" * 65536)


def test_descriptors_that_nobody_asked_for_are_closed(world: World, add: Add) -> None:
    add()
    world.begin()
    assert world.process is not None
    directory = Path(f"/proc/{world.process.pid}/fd")
    before = len(os.listdir(directory))
    for _ in range(20):
        with pytest.raises(IsochamberError):
            world.ask("start", tenant="x", descriptors=(0, 1, 2))
    eventually(lambda: len(os.listdir(directory)) <= before, "they are closed")


def test_what_nursery_and_supervisor_say_arrives_as_it_was_however_long(tmp_path: Path) -> None:
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with first, second:
        for message in ({"a": [1, 2.5, None, True, "\u00e9\n\x00"]}, {"long text": "x" * 300000}):
            wire.send(first, message, (first.fileno(),))
            received, descriptors = wire.receive(second)
            assert received == message
            assert len(descriptors) == 1
            wire.close_all(descriptors)
        first.close()
        assert wire.receive(second) == (None, [])


def test_the_watchdog_hears_of_it_and_a_listening_socket_can_be_handed_to_it(world: World, add: Add) -> None:
    add()
    path = f"{world.directory}/activated"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        # What systemd does: the socket as descriptor 3, and our pid in the environment, known only after the fork.
        shim = f"import os,sys; os.dup2({listener.fileno()}, 3); os.environ['LISTEN_PID']=str(os.getpid());"
        shim += " os.execv(sys.argv[1], sys.argv[1:])"
        os.set_inheritable(listener.fileno(), True)
        words = (sys.executable, "-c", shim)
        with contextlib.ExitStack() as stack:
            original = subprocess.Popen

            def with_listener(*arguments: object, **options: object) -> object:
                return original(*arguments, **{**options, "close_fds": False})  # type: ignore[call-overload] # as given

            monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
            monkeypatch.setattr(subprocess, "Popen", with_listener)
            world.begin(prefix=words, LISTEN_FDS="1", WATCHDOG_USEC="50000")
        for _ in range(3):
            assert world.hear() == "WATCHDOG=1"
        with socket.socket(socket.AF_UNIX) as end:
            end.settimeout(DEADLINE)
            end.connect(path)
            end.sendall(b'{"version": 1, "verb": "version"}\n')
            assert json.loads(end.makefile().readline())["ok"]


SAMPLE = re.compile(r'isochamber_[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.e+-]+')


def test_metrics_are_openmetrics_and_count_what_happens(world: World, add: Add) -> None:
    tenant, waiting = add(service={"restart": "always"}), add(service={"warm": 1})
    file = Path(world.directory, "metrics.prom")
    world.begin("--metrics-file", str(file), "--metrics-interval", "0.1")
    world.ask("wait", tenant.name, condition="running")
    world.ask("wait", waiting.name, condition="warm")
    os.kill(world.row(tenant)["pid"], 9)
    world.event("restart-in", tenant, 0)
    eventually(lambda: world.row(tenant)["restarts"] == 1, "it is back")
    text = world.output("metrics")
    *lines, last = text.splitlines()
    assert last == "# EOF"
    families = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(families) == len(set(families))
    for line in lines:
        assert line.startswith(("# TYPE ", "# HELP ")) or SAMPLE.fullmatch(line), line
    assert f'isochamber_restarts_total{{tenant="{tenant.name}"}} 1' in lines
    assert f'isochamber_state{{tenant="{waiting.name}",state="warm"}} 1' in lines
    assert any(line.startswith("isochamber_memory_bytes{") for line in lines)
    eventually(file.exists, "the file for node_exporter")
    assert "# EOF" not in file.read_text()


def test_events_that_nobody_reads_are_not_kept_for_ever(world: World, add: Add) -> None:
    add()
    world.begin()
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(paths.control_socket())
        end.sendall(b'{"version": 1, "verb": "events"}\n')
        assert select.select([end], [], [], DEADLINE)[0]
    assert world.ask("version")["ok"]
