"""`isochamber run` through the supervisor with no interpreter's start, and what makes it one after all."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isochamber import paths
from isochamber.launch import messages
from tests.conftest import PROJECT
from tests.launch.tenants import Done, Tenant
from tests.serve.world import DEADLINE, FOREVER, STUBBORN, Terminal, World, end_nursery, eventually, gone

Add = Callable[..., Tenant]

COMMAND = PROJECT / ".venv/bin/isochamber"
PROGRAM = PROJECT / "isochamber/serve/run.pl"
PERL, SHELL = "/usr/bin/perl", "/bin/sh"
PYTHON = str(PROJECT / ".venv/bin/python")
# Says which signals it got, each on its own, and ends at TERM.
TELLS = [
    "/usr/bin/perl", "-e", "$| = 1; for my $n (qw(HUP INT QUIT USR1 USR2 ALRM)) { $SIG{$n} = sub { print qq($n\\n) } }"
    " $SIG{TERM} = sub { print qq(TERM\\n); exit 3 }; print qq(up\\n); sleep 1000 while 1",
]  # fmt: skip


def _environment(world: World, **changes: str) -> dict[str, str]:
    return {**os.environ, "ISOCHAMBER_ROOT": str(world.root), **changes}


def _run(world: World, *words: str, prefix: tuple[str, ...] = (), changes: dict[str, str] | None = None, **more: Any
) -> Done:  # fmt: skip
    options = {"stdin": subprocess.DEVNULL, "command": COMMAND, **more}
    if "input" in options:
        del options["stdin"]
    command = options.pop("command")
    return subprocess.run(
        [*prefix, str(command), "run", *words], env=_environment(world, **(changes or {})),
        capture_output=True, text=True, timeout=DEADLINE, check=False, **options,
    )  # fmt: skip


@pytest.fixture
def executed(tmp_path: Path) -> Callable[..., tuple[Done, list[str]]]:
    """Run it and return with what it ended, and the programs that it became on the way."""
    trace = tmp_path / "trace"

    def run(world: World, *words: str, **more: Any) -> tuple[Done, list[str]]:
        # What it started itself is of the cold launcher: its own process alone is looked at.
        done = _run(world, *words, prefix=("strace", "-qq", "-e", "trace=execve", "-e", "signal=none",
                                           "-o", str(trace)), **more)  # fmt: skip
        found = re.findall(r'^execve\("([^"]*)".* = 0$', trace.read_text(), re.M)
        return done, found[1:]

    return run


@contextlib.contextmanager
def _running(world: World, *words: str, prefix: tuple[str, ...] = (), **more: Any) -> Iterator["subprocess.Popen[str]"]:
    """Run it until it has said `up`."""
    client = subprocess.Popen(
        [*prefix, str(COMMAND), "run", *words], env=_environment(world), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip
    with client:
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == "up\n"
            # The tenant may say so while its client still hears of the start: until then a signal ends both.
            eventually(lambda: _waits(client.pid), "it waits for signals")
            yield client
        finally:
            client.kill()


def _waits(pid: int) -> bool:
    """Say whether run.pl has come to wait: SIGTERM is blocked, and a descriptor tells of it."""
    status = Path(f"/proc/{pid}/status").read_text()
    blocked = re.search(r"^SigBlk:\s*(\w+)$", status, re.M)
    assert blocked is not None
    links = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    return bool(int(blocked[1], 16) >> signal.SIGTERM - 1 & 1) and "anon_inode:[signalfd]" in links


def _program(client: "subprocess.Popen[str]") -> str:
    return Path(os.readlink(f"/proc/{client.pid}/exe")).name


def _rest(client: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = client.communicate(timeout=DEADLINE)
    return client.returncode, out, err


def test_what_is_tested_is_what_is_here() -> None:
    assert COMMAND.read_bytes() == (PROJECT / "data/bin/isochamber").read_bytes(), "./doit brings it up to date"


def test_it_compiles_strictly() -> None:
    done = subprocess.run(
        [PERL, "-Mstrict", "-Mwarnings=FATAL,all", "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, f"{PROGRAM} syntax OK\n")


def test_it_loads_no_module(world: World, add: Add, tmp_path: Path) -> None:
    tenant, trace = add(), tmp_path / "opened"
    world.begin()
    done = _run(world, tenant.name, "/bin/true", prefix=("strace", "-f", "-e", "trace=openat", "-o", str(trace)))
    assert done.returncode == 0
    assert str(PROGRAM.name) in trace.read_text(), "the control"
    assert not re.search(r'\.pm"|\.py"', trace.read_text())


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 3", 3), ("exit 255", 255), ("kill -9 $$; exit 5", 5), ('echo \\"; exit 4', 4)],
)
def test_a_plain_run_starts_no_python_and_gives_the_exit_code(
    world: World, add: Add, executed: Callable[..., tuple[Done, list[str]]], script: str, code: int
) -> None:
    tenant = add(argv=["/bin/sh", "-c", script])
    world.begin()
    done, programs = executed(world, tenant.name)
    assert (done.returncode, done.stderr, programs) == (code, "", [PERL])
    assert world.row(tenant)["exit_code"] == code  # it was the supervisor's
    assert gone(tenant)
    done, programs = executed(world, tenant.name, "--", "/bin/sh", "-c", script)
    assert (done.returncode, programs) == (code, [PERL])


def test_a_tenant_that_is_killed_is_128_and_the_signal(world: World, add: Add) -> None:
    tenant = add(argv=STUBBORN)
    world.begin()
    with _running(world, tenant.name) as client:
        assert _program(client) == "perl"
        world.ask("kill", tenant.name)
        assert _rest(client)[0] == 128 + signal.SIGKILL


@pytest.mark.parametrize(("words", "code"), [(("/nowhere",), 127), (("/etc/hostname",), 126)])
def test_what_can_not_be_executed_is_one_line_and_its_code(
    world: World, add: Add, executed: Callable[..., tuple[Done, list[str]]], words: tuple[str, ...], code: int
) -> None:
    tenant = add()
    world.begin()
    done, programs = executed(world, tenant.name, *words)
    assert (done.returncode, done.stdout, programs) == (code, "", [PERL, PYTHON])
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"isochamber: {tenant.name}: ")
    assert words[0] in line


def test_the_descriptors_and_words_go_through_as_they_are(world: World, add: Add) -> None:
    tenant = add(argv=["/bin/sh", "-c", "read x; echo out $x; echo err >&2; exit 6"])
    world.begin()
    done = _run(world, tenant.name, input="word\n")
    assert (done.returncode, done.stdout, done.stderr) == (6, "out word\n", "err\n")
    words = ["", "a b", '"', "\\", '\\"', "'", "$HOME", "--", "-x", "{}", "%s", "@ARGV", "~", "x" * 20000]
    script = 'for word; do echo "<$word>"; done'
    done = _run(world, tenant.name, "/bin/sh", "-c", script, "sh", *words)
    assert done.stdout.splitlines() == [f"<{word}>" for word in words]
    assert _run(world, tenant.name, "--", "--", "x").returncode == 127  # a program of that name


@pytest.mark.parametrize("word", ["\xfc", "caf\xe9", "\t", "a\nb", "\x7f", os.fsdecode(b"\xff\xfe")], ids=ascii)
def test_other_words_than_printable_ascii_are_pythons_and_come_through(
    world: World, add: Add, executed: Callable[..., tuple[Done, list[str]]], word: str
) -> None:
    tenant = add()
    world.begin()
    done, programs = executed(world, tenant.name, "/usr/bin/perl", "-e", "print unpack('H*', $ARGV[0])", word)
    assert (done.stdout, programs) == (os.fsencode(word).hex(), [PERL, PYTHON])


def test_long_words_are_refused_or_run_and_never_half_of_each(world: World, add: Add) -> None:
    tenant = add()
    world.begin()
    words = ["x" * 100_000] * 8
    done = _run(world, tenant.name, "/bin/sh", "-c", "echo $#", "sh", *words)
    assert (done.returncode, done.stdout) == (0, "8\n")


def test_an_option_after_the_tenant_is_pythons(
    world: World, add: Add, executed: Callable[..., tuple[Done, list[str]]]
) -> None:
    tenant = add(argv=["/bin/sh", "-c", "exit 3"])
    world.begin()
    done, programs = executed(world, tenant.name, "--no-terminal")
    assert (done.returncode, programs) == (3, [PERL, PYTHON])
    done, programs = executed(world, tenant.name, "--no-such-option")
    assert (done.returncode, programs) == (2, [PERL, PYTHON])


def test_without_a_supervisor_it_is_the_launcher(
    world: World, add: Add, executed: Callable[..., tuple[Done, list[str]]]
) -> None:
    tenant = add(argv=["/bin/sh", "-c", "echo here; exit 3"])
    Path(paths.control_socket()).unlink(missing_ok=True)
    done, programs = executed(world, tenant.name)
    assert (done.returncode, done.stdout, programs) == (3, "here\n", [PYTHON])
    with socket.socket(socket.AF_UNIX) as former:
        former.bind(paths.control_socket())  # as a supervisor leaves it: nobody listens there
    done, programs = executed(world, tenant.name)
    assert (done.returncode, done.stdout, programs) == (3, "here\n", [PERL, PYTHON])


def test_under_a_supervisor_of_another_root_it_is_the_launcher(
    world: World, add: Add, executed: Callable[..., tuple[Done, list[str]]], tmp_path: Path
) -> None:
    tenant = add(argv=["/bin/sh", "-c", "echo here; exit 3"])
    world.begin()
    other = tmp_path / "other"
    other.symlink_to(world.root)  # the same tenants by another name would be no other root, but for what it is called
    done, programs = executed(world, tenant.name, changes={"ISOCHAMBER_ROOT": str(other)})
    assert (done.returncode, done.stdout, programs) == (3, "here\n", [PERL, PYTHON])


def test_a_refusal_is_one_line_and_125(world: World, add: Add, executed: Callable[..., tuple[Done, list[str]]]) -> None:
    tenant = add()
    world.begin()
    world.ask("start", tenant.name)
    for name, said in ((tenant.name, "runs already"), ("nobody", "nobody")):
        done, programs = executed(world, name)
        assert (done.returncode, done.stdout, programs) == (125, "", [PERL, PYTHON])
        (line,) = done.stderr.splitlines()
        assert said in line
    assert world.row(tenant)["state"] == "running"
    starts = [event for event in world.stream("events", stream=False) if event["event"] == "start"]
    assert len(starts) == 1, "asked once, and nobody was started by it"


def test_on_a_terminal_it_is_pythons_at_once(world: World, add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    tenant = add(argv=["/bin/sh", "-c", "tty; read x; echo got $x; exit 5"])
    world.begin()
    monkeypatch.setenv("ISOCHAMBER_ROOT", str(world.root))
    screen = Terminal([str(COMMAND), "run", tenant.name])
    screen.expect(b"/dev/pts/0")
    screen.type(b"word\n")
    screen.expect(b"got word")
    assert screen.end() == 5


def test_half_a_terminal_tells_the_tenant_its_kind(world: World, add: Add) -> None:
    tenant = add(argv=["/bin/sh", "-c", "echo $TERM; test -t 0"])
    world.begin()
    master, slave = os.openpty()
    try:
        done = _run(world, tenant.name, stdin=slave, changes={"TERM": "vt102"})
    finally:
        os.close(master)
        os.close(slave)
    assert (done.returncode, done.stdout) == (0, "vt102\n")


@pytest.mark.parametrize("name", ["HUP", "INT", "QUIT", "USR1", "USR2", "ALRM"])
def test_a_signal_reaches_the_tenant_once(world: World, add: Add, name: str) -> None:
    tenant = add(argv=TELLS)
    world.begin()
    with _running(world, tenant.name) as client:
        assert _program(client) == "perl"
        client.send_signal(signal.Signals[f"SIG{name}"])
        assert client.stdout is not None
        assert client.stdout.readline() == f"{name}\n"
        assert _program(client).startswith("python")
        client.terminate()
        assert _rest(client) == (3, "TERM\n", "")


def test_a_tenant_that_would_not_notice_a_signal_is_killed_by_it(world: World, add: Add) -> None:
    tenant = add(argv=["/usr/bin/perl", "-e", "$| = 1; print qq(up\\n); sleep 1000"])
    world.begin()
    with _running(world, tenant.name) as client:
        client.send_signal(signal.SIGINT)
        assert _rest(client) == (128 + signal.SIGINT, "", "")
    assert gone(tenant)


def test_two_quick_signals_are_both_heard_and_neither_ends_the_client_first(world: World, add: Add) -> None:
    tenant = add(argv=TELLS)
    world.begin()
    with _running(world, tenant.name) as client:
        for _ in range(50):  # while Python starts, each more would end a client that had not blocked it
            client.send_signal(signal.SIGINT)
            client.send_signal(signal.SIGHUP)
        assert client.stdout is not None
        heard: set[str] = set()
        while not heard >= {"INT\n", "HUP\n"}:
            line = client.stdout.readline()
            assert line, heard
            heard.add(line)
        client.terminate()
        code, out, err = _rest(client)
    assert (code, out.splitlines()[-1:], err) == (3, ["TERM"], "")


def test_ctrl_z_freezes_the_tenant_and_continuing_lets_both_go_on(world: World, add: Add) -> None:
    tenant = add(argv=["/bin/sh", "-c", "trap 'exit 3' TERM; echo up; while :; do sleep 0.01; done"])
    world.begin()
    with _running(world, tenant.name) as client:
        client.send_signal(signal.SIGTSTP)
        eventually(lambda: " T " in Path(f"/proc/{client.pid}/stat").read_text(), "it is stopped")
        assert _program(client).startswith("python")
        assert tenant.group is not None
        frozen = tenant.group / "cgroup.freeze"
        eventually(lambda: frozen.read_text() == "1\n", "the tenant is frozen")
        client.send_signal(signal.SIGCONT)
        eventually(lambda: frozen.read_text() == "0\n", "the tenant goes on")
        client.terminate()
        assert _rest(client)[0] == 3


def test_one_that_is_stopped_and_continued_by_others_just_goes_on(world: World, add: Add) -> None:
    tenant = add(argv=["/bin/sh", "-c", "echo up; read x < /home/go; exit 6"])
    os.mkfifo(tenant.home / "go")
    world.begin()
    with _running(world, tenant.name) as client:
        for _ in range(3):
            client.send_signal(signal.SIGSTOP)
            eventually(lambda: " T " in Path(f"/proc/{client.pid}/stat").read_text(), "it is stopped")
            client.send_signal(signal.SIGCONT)
        (tenant.home / "go").write_text("x\n")
        assert _rest(client)[0] == 6


def test_a_hangup_that_is_ignored_stays_ignored_in_perl_and_in_python(world: World, add: Add) -> None:
    tenant = add(argv=TELLS)
    world.begin()
    with _running(world, tenant.name, prefix=(SHELL, "-c", 'trap "" HUP; exec "$@"', "sh")) as client:
        client.send_signal(signal.SIGHUP)
        status = Path(f"/proc/{client.pid}/status").read_text()
        assert re.search(r"^ShdPnd:\s*0+$", status, re.M), "it does not wait either"
        client.send_signal(signal.SIGUSR1)
        assert client.stdout is not None
        assert client.stdout.readline() == "USR1\n"
        assert _program(client).startswith("python")
        client.send_signal(signal.SIGHUP)
        client.send_signal(signal.SIGUSR2)
        assert client.stdout.readline() == "USR2\n"
        client.terminate()
        assert _rest(client) == (3, "TERM\n", "")


def test_a_supervisor_that_is_killed_meanwhile_changes_nothing(world: World, add: Add) -> None:
    tenant = add(argv=TELLS)
    world.begin()
    with _running(world, tenant.name) as client:
        world.kill()
        client.send_signal(signal.SIGUSR1)
        assert client.stdout is not None
        assert client.stdout.readline() == "USR1\n"
        client.terminate()
        assert _rest(client) == (3, "TERM\n", "")


def test_a_nursery_that_ends_is_one_line_and_125(world: World, add: Add) -> None:
    tenant = add()
    world.begin()
    with _running(world, tenant.name) as client:
        world.kill()
        end_nursery()
        code, _, said = _rest(client)
    # It ends its tenants as it goes, so its client may hear of the end of the tenant first.
    assert code in {125, 128 + signal.SIGKILL}
    assert code == 128 + signal.SIGKILL or "nursery has ended" in said


def test_a_client_that_is_killed_takes_its_tenant_along(world: World, add: Add) -> None:
    tenant = add(argv=FOREVER)
    world.begin()
    with _running(world, tenant.name) as client:
        client.kill()
        world.ask("wait", tenant.name)
    assert gone(tenant)


# The test stands for the supervisor and its nursery where these would have to be caught at a moment.

StandIn = Callable[[], "tuple[subprocess.Popen[str], socket.socket]"]


@pytest.fixture
def stand_in(world: World, add: Add, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """Return a client that has asked, and the nursery's end of its channel; whoever asks again is heard at the end."""
    tenant = add()
    monkeypatch.setenv("ISOCHAMBER_RUN", str(tmp_path))
    with contextlib.ExitStack() as held, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(paths.control_socket())
        listener.listen()
        listener.settimeout(DEADLINE)

        def begin() -> "tuple[subprocess.Popen[str], socket.socket]":
            client = held.enter_context(subprocess.Popen(
                [COMMAND, "run", tenant.name], env=_environment(world), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            ))  # fmt: skip
            held.callback(client.kill)
            control = held.enter_context(listener.accept()[0])
            data, descriptors, _, _ = socket.recv_fds(control, 65536, 5)
            assert data.endswith(b"\n")
            channel, *rest = descriptors
            assert len(rest) == 3
            for descriptor in rest:
                os.close(descriptor)
            return client, held.enter_context(socket.socket(fileno=channel))

        yield begin
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def _start(channel: socket.socket) -> None:
    pidfd = os.pidfd_open(os.getpid())
    socket.send_fds(channel, [b"S"], [pidfd])
    os.close(pidfd)


def test_a_signal_before_it_was_there_ends_the_client_and_the_nursery_hears_of_it(stand_in: StandIn) -> None:
    client, channel = stand_in()
    client.terminate()
    assert client.wait(DEADLINE) == -signal.SIGTERM
    assert channel.recv(1) == b""


@pytest.mark.parametrize("status", [0, 3 << 8, 9, 11 | 0x80, 255 << 8])
def test_every_wait_status_is_its_exit_code(stand_in: StandIn, status: int) -> None:
    client, channel = stand_in()
    _start(channel)
    channel.send(b"E%d" % status)
    assert _rest(client) == (128 + (status & 0x7F) if status & 0x7F else status >> 8, "", "")


def test_an_end_that_comes_as_the_channel_does_is_heard(stand_in: StandIn) -> None:
    client, channel = stand_in()
    _start(channel)
    channel.send(b"E768")
    channel.close()
    assert _rest(client) == (3, "", "")


def test_the_end_of_the_channel_alone_is_one_line_and_125(stand_in: StandIn) -> None:
    client, channel = stand_in()
    _start(channel)
    channel.close()
    code, out, said = _rest(client)
    assert (code, out, len(said.splitlines())) == (125, "", 1)
    assert "nursery has ended" in said


def test_a_failure_and_a_line_for_the_operator_are_read_by_python_from_the_same_channel(stand_in: StandIn) -> None:
    client, channel = stand_in()
    _start(channel)
    channel.send(b"Ia line")
    channel.send(messages.encode_failure(b"F", messages.Failure("execute", "/x", 2, "no such file", None, 127)))
    channel.send(b"E32512")
    code, out, said = _rest(client)
    assert (code, out, len(said.splitlines())) == (127, "", 2)
    assert said.startswith("isochamber: a line\n")


def test_a_signal_is_said_once_over_the_channel_and_nothing_else_is(stand_in: StandIn) -> None:
    client, channel = stand_in()
    _start(channel)  # with the test's own pidfd: it catches SIGINT
    eventually(lambda: _waits(client.pid), "it waits")
    client.send_signal(signal.SIGINT)
    channel.settimeout(DEADLINE)
    assert channel.recv(100) == b"K2"
    channel.send(b"E768")
    assert _rest(client) == (3, "", "")
    assert channel.recv(100) == b"", "nothing more"


# How it is called.


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_closed_descriptor_is_pythons_and_the_tenant_gets_an_empty_one(world: World, add: Add, closed: str) -> None:
    # By its number (null(4)): of the host's node the tenant sees no path, or another one where we are in a chroot.
    script = 'got=$(stat -Lc %t:%T /proc/1/fd/0 /proc/1/fd/1 /proc/1/fd/2); echo "$got" > /home/got; exit 3'
    tenant = add(argv=["/bin/sh", "-c", script])
    world.begin()
    done = _run(world, tenant.name, prefix=(SHELL, "-c", f'exec "$@" {closed}', "sh"))
    assert done.returncode == 3
    found = (tenant.home / "got").read_text().splitlines()
    assert len(found) == 3
    for number, device in enumerate(found):
        assert (device == "1:3") == (f"{number}<" in closed or f"{number}>" in closed or number == 0), found


def test_it_works_through_a_link_to_a_link(world: World, add: Add, tmp_path: Path) -> None:
    tenant = add(argv=["/bin/sh", "-c", "exit 3"])
    world.begin()
    (tmp_path / "first").symlink_to(COMMAND)
    (tmp_path / "second").symlink_to("first")
    assert _run(world, tenant.name, command=tmp_path / "second").returncode == 3


def test_neither_the_working_directory_nor_the_callers_perl_matters(
    world: World, add: Add, executed: Callable[..., tuple[Done, list[str]]], tmp_path: Path
) -> None:
    tenant = add(argv=["/bin/sh", "-c", "exit 3"])
    world.begin()
    trap = tmp_path / "trap"
    for name in ("strict.pm", "Trap.pm", "Socket.pm", "Config.pm", "sitecustomize.pl", "isochamber/serve/run.pl"):
        (trap / name).parent.mkdir(parents=True, exist_ok=True)
        (trap / name).write_text('print STDERR "trapped\\n"; exit 99;')
    hostile = {"PERL5OPT": "-MTrap", "PERL5LIB": ".", "PERL_UNICODE": "SDA", "LC_ALL": "xx_XX.UTF-8", "PERL5DB": "x"}
    done, programs = executed(world, tenant.name, cwd=trap, changes=hostile)
    assert (done.returncode, done.stderr, programs) == (3, "", [PERL])
    control = subprocess.run([PERL, PROGRAM], env={**os.environ, **hostile}, cwd=trap, capture_output=True, check=False)
    assert (control.returncode, control.stderr.count(b"trapped")) == (99, 1)


@pytest.mark.parametrize("by", ["sh", "perl"])
@pytest.mark.parametrize(("text", "is_default"), [("tenants: {}\n", True), ("root: /x\n", False), ("# root\n", True),
                                                  ("a: 1 # b\n  root : /x\n", False), ("", True)])  # fmt: skip
def test_a_root_is_the_default_only_where_tenants_yaml_never_mentions_one(
    world: World, tmp_path: Path, text: str, is_default: bool, by: str
) -> None:
    (tmp_path / "tenants.yaml").write_text(text)
    if by == "perl":
        with socket.socket(socket.AF_UNIX) as listener:  # it is there, and nobody listens any more
            listener.bind(str(tmp_path / "control"))
    trace = tmp_path / "words"
    prefix = ("strace", "-qq", "-s", "999", "-v", "-e", "trace=execve", "-o", str(trace))
    for changes in ({}, {"ISOCHAMBER_TENANTS": str(tmp_path / "tenants.yaml")}):
        _run(world, "nobody", prefix=prefix, cwd=PROJECT if changes else tmp_path,
             changes={"ISOCHAMBER_ROOT": "", "ISOCHAMBER_RUN": str(tmp_path), **changes})  # fmt: skip
        assert ('execve("/usr/bin/perl"' in trace.read_text()) == (by == "perl")
        assert ('"--root", "/var/lib/isochamber", "nobody"' in trace.read_text()) == is_default
        assert ('"-m", "isochamber", "run", "nobody"' in trace.read_text()) != is_default


@pytest.mark.parametrize("locale", ["", "C.UTF-8", "xx_XX.UTF-8"])
def test_python_has_the_callers_locale(world: World, add: Add, monkeypatch: pytest.MonkeyPatch, locale: str) -> None:
    tenant = add(argv=TELLS)
    monkeypatch.delenv("LC_ALL", raising=False)
    if locale:
        monkeypatch.setenv("LC_ALL", locale)
    world.begin()
    with _running(world, tenant.name) as client:
        client.send_signal(signal.SIGUSR1)
        assert client.stdout is not None
        assert client.stdout.readline() == "USR1\n"
        environment = Path(f"/proc/{client.pid}/environ").read_text().split("\0")
        client.terminate()
        assert _rest(client) == (3, "TERM\n", "")
    assert [line for line in environment if line.startswith("LC_ALL=")] == ([f"LC_ALL={locale}"] if locale else [])


def test_a_file_of_tenants_that_can_be_read_once_is_left_to_yaml(world: World, tmp_path: Path) -> None:
    fifo = tmp_path / "tenants.yaml"
    os.mkfifo(fifo)
    world.begin()
    client = subprocess.Popen(
        [COMMAND, "run", "nobody"], env=_environment(world, ISOCHAMBER_ROOT="", ISOCHAMBER_TENANTS=str(fifo)),
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with client:
        fifo.write_text(f"root: {world.root}\nbases: {{}}\ntenants: {{}}\n")
        _, said = client.communicate(timeout=DEADLINE)
    assert client.returncode == 125
    assert "nobody" in said


def test_a_machine_that_it_does_not_know_is_pythons(
    world: World, add: Add, executed: Callable[..., tuple[Done, list[str]]], tmp_path: Path
) -> None:
    tenant = add(argv=["/bin/sh", "-c", "exit 3"])
    world.begin()
    text = PROGRAM.read_text()
    known = set(re.findall(r"^    '(\d \d \d+)' => ", text, re.M))
    assert len(known) == 5
    other = tmp_path / "run.pl"
    other.write_text(re.sub(r"^    '(\d \d) \d+' =>", r"    '\1 9999' =>", text, flags=re.M))
    words = [PERL, str(other), sys.executable, str(PROJECT / "isochamber"), "", "run", tenant.name]
    trace = tmp_path / "trace"
    done = subprocess.run(
        ["strace", "-qq", "-s", "999", "-e", "trace=execve,sendmsg", "-e", "signal=none", "-o", trace, *words],
        env=_environment(world), stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert trace.read_text().index("serve/__main__.py") < trace.read_text().index("sendmsg("), "Python asked"
