"""Going into tenants through the supervisor: run, exec and attach, with and without a terminal."""

import _socket
import os
import signal
import subprocess
from collections.abc import Callable

import pytest

from isochamber.launch import records
from isochamber.launch.records import catches
from tests.launch.tenants import Tenant
from tests.serve.world import DEADLINE, FOREVER, Terminal, World, eventually, gone

Add = Callable[..., Tenant]

# What may not differ between the tenant's own process and a command beside it.
CONFINEMENT = (
    "for f in uid_map gid_map; do cat /proc/$P/$f; done;"
    " grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp)' /proc/$P/status;"
    " for n in cgroup ipc mnt net pid user uts; do readlink /proc/$P/ns/$n; done;"
    " cat /proc/$P/cgroup /proc/$P/limits"
)


def test_run_goes_through_the_supervisor_with_our_descriptors_and_gives_the_tenants_status(
    world: World, add: Add
) -> None:
    tenant = add(argv=["/bin/sh", "-c", "read x; echo out $x; echo err >&2; exit 6"])
    world.begin()
    done = world.cli("run", tenant.name, input="word\n", stdin=None)
    assert (done.returncode, done.stdout, done.stderr) == (6, "out word\n", "err\n")
    assert any(event["event"] == "died" for event in world.stream("events", stream=False))
    assert gone(tenant)
    done = world.cli("run", tenant.name, "/bin/sh", "-c", "kill -9 $$ || true; kill -TERM -1; exit 7")
    assert done.returncode == 7
    done = world.cli("run", tenant.name, "/nowhere")
    assert (done.returncode, len(done.stderr.splitlines())) == (127, 1)


def test_what_runs_under_the_supervisor_is_refused_to_run_again(world: World, add: Add) -> None:
    tenant = add()
    world.begin()
    world.ask("start", tenant.name)
    done = world.cli("run", tenant.name)
    assert done.returncode == 125
    assert "runs already" in done.stderr
    assert world.row(tenant)["state"] == "running"


def test_a_launcher_that_dies_takes_along_what_it_started_through_the_supervisor(world: World, add: Add) -> None:
    tenant = add(argv=FOREVER)
    world.begin()
    launcher = subprocess.Popen(world.command("run", tenant.name), stdout=subprocess.PIPE, text=True)
    with launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "up\n"
        launcher.kill()
    world.ask("wait", tenant.name)
    assert gone(tenant)


def test_signals_to_the_launcher_reach_the_tenant(world: World, add: Add) -> None:
    tenant = add(argv=FOREVER)
    world.begin()
    launcher = subprocess.Popen(world.command("run", tenant.name), stdout=subprocess.PIPE, text=True)
    with launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "up\n"
        # The tenant may say so while the launcher still hears of the start: until then a signal ends both.
        eventually(lambda: catches(launcher.pid, signal.SIGTERM), "the launcher takes signals")
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(DEADLINE) == 3


def test_run_on_a_terminal_gives_the_tenant_one_of_its_own(world: World, add: Add) -> None:
    tenant = add(argv=["/bin/sh", "-c", "tty; read x; echo got $x; exit 5"])
    world.begin()
    screen = Terminal(world.command("run", tenant.name))
    screen.expect(b"/dev/pts/0")
    screen.type(b"word\n")
    screen.expect(b"got word")
    assert screen.end() == 5


def test_exec_runs_beside_the_tenant_confined_as_it_is(world: World, add: Add) -> None:
    # Its own word in a file: with Landlock each is in a domain of its own and can't look into the other.
    tenant = add(argv=["/bin/sh", "-c", f"{{ P=self; {CONFINEMENT}; }} > /home/own; echo up; sleep 1000"])
    world.begin()
    world.ask("start", tenant.name)
    world.said(tenant, "up")
    own = (tenant.home / "own").read_text()
    beside = world.output("exec", tenant.name, "/bin/sh", "-c", f"P=self; {CONFINEMENT}")
    assert own.splitlines() == beside.splitlines()
    assert "CapBnd:\t0000000000000000" in beside
    assert world.output("exec", tenant.name, "/bin/hostname") == f"{tenant.tid}\n"
    # The control: from the host's side that is another world.
    assert os.readlink("/proc/self/ns/mnt") not in beside


def test_exec_gives_status_input_environment_ids_and_directory(world: World, add: Add) -> None:
    tenant = add()
    world.begin()
    world.ask("start", tenant.name)
    done = world.cli("exec", tenant.name, "/bin/sh", "-c", "echo out; echo err >&2; exit 9")
    assert (done.returncode, done.stdout, done.stderr) == (9, "out\n", "err\n")
    assert world.cli("exec", "-i", tenant.name, "/bin/cat", input="through", stdin=None).stdout == "through"
    assert world.cli("exec", tenant.name, "/bin/cat", input="not", stdin=None).stdout == ""
    words = ["exec", "-e", "A=b", "-u", "33:34", "-w", "/tmp", tenant.name, "/bin/sh", "-c"]
    assert world.output(*words, "echo $A $(id -u) $(id -g) $(pwd)") == "b 33 34 /tmp\n"
    assert world.cli("exec", tenant.name, "/nowhere").returncode == 127
    assert world.cli("exec", "-u", "root", tenant.name, "/bin/true").returncode == 2
    world.ask("stop", tenant.name)
    done = world.cli("exec", tenant.name, "/bin/true")
    assert done.returncode == 125
    assert "does not run" in done.stderr


def test_exec_with_a_terminal_is_a_shell_to_type_into(world: World, add: Add) -> None:
    tenant = add()
    world.begin()
    world.ask("start", tenant.name)
    screen = Terminal(world.command("exec", "-it", tenant.name, "/bin/sh"))
    screen.type(b"tty; test -t 0 && echo is''-terminal; echo $TERM\n")
    screen.expect(b"/dev/pts/")
    screen.expect(b"is-terminal")
    screen.expect(b"xterm")
    screen.type(b"sleep 1234\n")
    screen.expect(b"sleep 1234")
    # A shell that is still about to start what was typed keeps the signal; the tenant's own program sleeps 1000.
    eventually(lambda: b"sleep\x001234\0" in _command_lines(tenant), "sleep runs")
    screen.type(b"\x03")  # Ctrl-C ends the command and not the shell
    screen.expect(b"# ")
    screen.type(b"echo still''-here; exit 4\n")
    screen.expect(b"still-here")
    assert screen.end() == 4
    assert world.row(tenant)["state"] == "running"


def _command_lines(tenant: Tenant) -> list[bytes]:
    found = []
    for pid in tenant.processes():
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                found.append(file.read())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_a_client_of_exec_that_dies_takes_its_command_along_and_the_tenants_end_ends_it(world: World, add: Add) -> None:
    tenant = add()
    world.begin()
    world.ask("start", tenant.name)
    words = world.command("exec", tenant.name, "/bin/sh", "-c", "echo in; sleep 1000")
    client = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    with client:
        assert client.stdout is not None
        assert client.stdout.readline() == "in\n"
        client.kill()
    eventually(lambda: not any(b"echo in" in line for line in _command_lines(tenant)), "the command is gone")
    client = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    with client:
        assert client.stdout is not None
        assert client.stdout.readline() == "in\n"
        world.ask("stop", tenant.name, time=0)
        assert client.wait(DEADLINE) == 128 + signal.SIGKILL
    assert gone(tenant)


def test_attach_shows_what_comes_and_lets_go_at_its_keys(world: World, add: Add) -> None:
    tenant = add(argv=["/bin/sh", "-c", "stty -echo; echo ready; while read x; do echo got $x; done"])
    world.begin()
    screen = Terminal(world.command("start", "-it", tenant.name))
    eventually(lambda: records.running(tenant.tid) is not None, "it runs")
    world.said(tenant, "ready")
    screen.type(b"first\n")
    screen.expect(b"got first")
    screen.type(b"\x10\x11")
    assert screen.end() == 0
    assert world.row(tenant)["state"] == "running"
    screen = Terminal(world.command("attach", tenant.name))
    eventually(lambda: sum(e["event"] == "attach" for e in world.stream("events", stream=False)) == 2, "attached")
    screen.type(b"second\n")
    screen.expect(b"got second")
    screen.type(b"\x04")  # the end of its input, which is its end
    assert screen.end() == 0
    assert [line["text"].rstrip("\r") for line in world.stream("logs", tenant=tenant.name)][-1] == "got second"


def test_attach_without_a_terminal_copies_both_streams_and_gives_the_status(world: World, add: Add) -> None:
    tenant = add(argv=["/bin/sh", "-c", "until [ -e /home/go ]; do sleep 0.02; done; echo out; echo err >&2; exit 8"])
    world.begin()
    world.ask("start", tenant.name)
    with subprocess.Popen(
        world.command("attach", tenant.name), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as client:
        world.event("attach", tenant, 0)
        (tenant.home / "go").touch()
        out, err = client.communicate(timeout=DEADLINE)
    assert (client.returncode, out, err) == (8, "out\n", "err\n")


def test_stats_and_top_show_the_tenants_that_run(world: World, add: Add) -> None:
    tenant = add(argv=["/bin/sh", "-c", "while :; do :; done"])
    world.begin()
    world.ask("start", tenant.name)
    head, line = world.output("stats", "--no-stream").splitlines()
    assert head.startswith("NAME")
    assert line.split()[0] == tenant.name
    (first,) = world.stream("stats", stream=False)
    assert first["rows"][0]["cpu_usec"] > 0
    assert first["rows"][0]["memory"] > 0
    screen = Terminal(world.command("top", "-i", "0.1"))
    screen.expect(tenant.name.encode())
    screen.type(b"q")
    assert screen.end() == 0
    assert world.cli("top").returncode == 2


def test_a_directory_is_no_descriptor_for_a_tenant(world: World, add: Add) -> None:
    tenant = add(argv=["/bin/sh", "-c", "cat /dev/fd/0"])
    world.begin()
    directory = os.open("/etc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        with pytest.raises(Exception, match="directory"):
            world.ask("run", tenant=tenant.name, descriptors=(theirs.fileno(), directory, 1, 2))
        ours.close()
        theirs.close()
    finally:
        os.close(directory)
    assert gone(tenant)
