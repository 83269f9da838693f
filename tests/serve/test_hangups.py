"""Who talks to the nursery and dies, stops or lies: that ends what is its own, and nothing of anybody else."""

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isochamber.errors import IsochamberError
from isochamber.launch import messages, records, syscalls
from isochamber.serve.held import Held
from isochamber.serve.loop import Loop
from tests.launch.tenants import Tenant
from tests.serve.world import DEADLINE, World, eventually, gone, nursery_of

Add = Callable[..., Tenant]
Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def other(world: World, add: Add) -> Iterator[Tenant]:
    """A tenant that runs all the while, with the same pid, and beside which another one can be started after all."""
    tenant, next_one = add(), add(argv=["/bin/true"])
    world.begin()
    world.ask("start", tenant.name)
    pid, nursery = world.row(tenant)["pid"], nursery_of(tenant)
    yield tenant
    world.ask("start", next_one.name)
    assert (world.row(tenant)["state"], world.row(tenant)["pid"]) == ("running", pid)
    assert nursery_of(tenant) == nursery


@pytest.fixture
def ends() -> Iterator[Ends]:
    """A client's end of the channel of a run, and the nursery's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(DEADLINE)
        yield ours, theirs


def _run(world: World, tenant: Tenant, theirs: socket.socket, verb: str = "run", **more: object) -> None:
    """Order a run as a client does; it may be refused."""
    with open(os.devnull, "rb+", buffering=0) as nothing, contextlib.suppress(IsochamberError):
        world.ask(verb, descriptors=(theirs.fileno(), *[nothing.fileno()] * 3), tenant=tenant.name, **more)


def _until(ours: socket.socket, word: bytes) -> bytes:
    """Return the packet that begins with ``word``."""
    while True:
        packet = ours.recv(messages.MAXIMUM)
        assert packet, f"the end came before {word!r}"
        if packet[:1] == word:
            return packet


def _descriptor_in(ours: socket.socket, word: bytes) -> int:
    """Return the descriptor that comes with the packet that begins with ``word``, the next one."""
    packet, descriptors, _, _ = socket.recv_fds(ours, messages.MAXIMUM, 1)
    assert packet[:1] == word
    return descriptors[0]


def test_a_client_that_is_gone_before_its_order_costs_nobody_else_anything(
    world: World, other: Tenant, add: Add
) -> None:
    tenants = [add() for _ in range(4)]
    for tenant in tenants:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.close()
        with theirs:
            _run(world, tenant, theirs)
        eventually(lambda: gone(tenant), "what it started has ended")  # noqa: B023


def test_a_client_that_goes_with_the_nurserys_words_unread_ends_its_own_tenant_alone(
    world: World, other: Tenant, add: Add, ends: Ends
) -> None:
    ours, theirs = ends
    tenant = add()
    _run(world, tenant, theirs)
    theirs.close()
    assert select.select([ours], [], [], DEADLINE)[0], "STARTED is there"
    ours.close()
    eventually(lambda: gone(tenant), "what it started has ended")


def test_a_client_that_goes_while_a_start_fails_is_missed_by_nobody(world: World, other: Tenant, add: Add) -> None:
    tenants = [add(argv=["/nowhere"]) for _ in range(4)]
    for number, tenant in enumerate(tenants):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            if number % 2:
                ours.shutdown(socket.SHUT_RD)
            else:
                ours.close()
            _run(world, tenant, theirs)
        eventually(lambda: gone(tenant), "it is cleaned up")  # noqa: B023
        ours.close()


def test_a_client_that_only_stops_reading_is_as_good_as_gone(world: World, other: Tenant, add: Add, ends: Ends) -> None:
    ours, theirs = ends
    tenant = add()
    ours.shutdown(socket.SHUT_RD)
    _run(world, tenant, theirs)
    eventually(lambda: gone(tenant), "what it started has ended: nobody could hear its end")


def test_a_client_whose_channel_takes_nothing_does_not_make_the_nursery_wait(
    world: World, other: Tenant, add: Add, ends: Ends
) -> None:
    ours, theirs = ends
    tenant = add()
    theirs.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            theirs.send(bytes(1000))  # it has the nursery's end too
    theirs.setblocking(True)
    _run(world, tenant, theirs)
    assert world.row(other)["state"] == "running"
    ours.close()
    eventually(lambda: gone(tenant), "what it started has ended")


@pytest.mark.parametrize("digits", [1, 3, 5000])
def test_a_client_may_ask_for_nonsense(world: World, other: Tenant, add: Add, ends: Ends, digits: int) -> None:
    ours, theirs = ends
    tenant = add()
    _run(world, tenant, theirs)
    _until(ours, b"S")
    for packet in (b"K" + b"7" * digits + b"x", b"K" + b"7" * digits, b"K", b"Z", b"Zx", b"?", b"G", b"F"):
        ours.send(packet)
    ours.send(b"K9")
    assert _until(ours, b"E") == b"E9", "what came after was heard"


def test_no_more_than_one_descriptor_is_taken_from_a_client_and_none_is_kept(
    world: World, other: Tenant, add: Add, ends: Ends
) -> None:
    ours, theirs = ends
    tenant = add()
    _run(world, tenant, theirs)
    theirs.close()
    _until(ours, b"S")
    read, write = os.pipe()
    for number in (1, 2, 3):
        socket.send_fds(ours, [b"?"], [write] * number)
    os.close(write)
    assert select.select([read], [], [], DEADLINE)[0], "every copy of it was closed"
    assert os.read(read, 1) == b""
    os.close(read)


def test_credentials_that_a_client_has_passed_are_taken_for_no_descriptor(
    world: World, other: Tenant, add: Add, ends: Ends
) -> None:
    ours, theirs = ends
    tenant = add()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # of the nursery's end, which is one with this
    _run(world, tenant, theirs)
    _until(ours, b"S")
    descriptors = f"/proc/{nursery_of(other)}/fd"
    assert os.readlink(f"{descriptors}/0") == os.devnull
    ours.send(b"?")
    ours.send(b"K9")
    _until(ours, b"E")
    assert os.readlink(f"{descriptors}/0") == os.devnull, (
        "its own pid counts as 0 there: nothing of that number was closed"
    )


@pytest.mark.parametrize("kind", ["a file", "a stream", "datagrams"])
def test_a_channel_that_is_none_is_refused(world: World, other: Tenant, add: Add, kind: str, tmp_path: Path) -> None:
    tenant = add()
    with contextlib.ExitStack() as held:
        if kind == "a file":
            descriptor = held.enter_context(open(tmp_path / "file", "w")).fileno()
        else:
            kinds = {"a stream": socket.SOCK_STREAM, "datagrams": socket.SOCK_DGRAM}
            ours, theirs = socket.socketpair(socket.AF_UNIX, kinds[kind])
            held.enter_context(ours)
            descriptor = held.enter_context(theirs).fileno()
        for verb, what, count in (("run", tenant, 4), ("exec", other, 4), ("attach", other, 1)):
            with pytest.raises(IsochamberError, match="SOCK_SEQPACKET"):
                world.ask(verb, descriptors=(descriptor,) * count, tenant=what.name, argv=["/bin/true"])
    assert gone(tenant)


def test_a_client_that_is_stopped_holds_up_nobody_and_hears_everything_when_it_goes_on(
    world: World, other: Tenant, add: Add
) -> None:
    tenant = add(argv=["/bin/sh", "-c", "echo up; read x; exit 6"])
    words = world.command("run", tenant.name)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        assert run.stdout.readline() == "up\n"
        run.send_signal(signal.SIGSTOP)
        for _ in range(3):
            assert world.cli("exec", other.name, "/bin/echo", "in").stdout == "in\n"
        run.stdin.write("word\n")
        run.stdin.flush()
        world.ask("wait", tenant.name)
        run.send_signal(signal.SIGCONT)
        assert run.wait(DEADLINE) == 6


CHATTY = [
    "/usr/bin/perl", "-e", "use Socket; socket(S, AF_UNIX, SOCK_DGRAM, 0) or die $!;"
    "my $to = pack_sockaddr_un($ENV{NOTIFY_SOCKET}); for (my $n = 0; ; $n++) {"
    " send(S, qq(STATUS=$n) . q(.) x 190, 0, $to); select(undef, undef, undef, .05) }",
]  # fmt: skip


@pytest.fixture
def stopped(world: World, other: Tenant) -> Iterator[Callable[[], int]]:
    """Stop the supervisor when called, which returns its pid; it goes on with the test's end at the latest."""
    assert world.process is not None
    process = world.process

    def stop() -> int:
        process.send_signal(signal.SIGSTOP)
        return process.pid

    yield stop
    process.send_signal(signal.SIGCONT)


def _unread(pid: int) -> int:
    """Return the bytes that wait in the socket of a process that has most of them."""
    most, pidfd = 0, os.pidfd_open(pid)
    for name in os.listdir(f"/proc/{pid}/fd"):
        if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
            copy = syscalls.pidfd_getfd(pidfd, int(name))
            with contextlib.suppress(OSError):  # of one that listens
                most = max(most, *struct.unpack("=i", fcntl.ioctl(copy, termios.FIONREAD, bytes(4))))
            os.close(copy)
    os.close(pidfd)
    return most


def test_a_supervisor_that_is_stopped_does_not_stop_the_nursery_and_knows_everything_when_it_goes_on(
    world: World, other: Tenant, add: Add, stopped: Callable[[], int]
) -> None:
    many = [add(argv=CHATTY, service={"ready": "notify"}) for _ in range(10)]
    brief = add(argv=["/bin/sh", "-c", "echo up; read x < /home/go; exit 4"], service={"restart": "on-failure"})
    os.mkfifo(brief.home / "go")
    world.ask("start", brief.name, *(tenant.name for tenant in many))
    world.said(brief, "up")
    pid, begun = world.row(brief)["pid"], time.time()
    supervisor = stopped()
    seen: list[int] = []

    def is_full() -> bool:
        """Say whether it is as long as it was some 50 datagrams of every tenant before."""
        seen.append(_unread(supervisor))
        select.select([], [], [], 0.1)
        return len(seen) > 50 and seen[-1] == seen[-50]

    eventually(is_full, "its queue is full")
    (brief.home / "go").write_text("x\n")
    eventually(lambda: not Path(f"/proc/{pid}").exists(), "the nursery goes on: it has reaped it")
    os.kill(supervisor, signal.SIGCONT)
    world.event("died", brief, begun)
    world.event("start", brief, begun)
    assert all(world.row(tenant)["state"] == "running" for tenant in many)


# The child seizes its parent (PTRACE_SEIZE), which then ends: a zombie that its tracer does not let go of.
TRACED = [
    "/usr/bin/perl", "-e", "pipe(R, W); if (fork) { close(W); sysread(R, my $x, 1); exit 5 }"
    " syscall(101, 0x4206, getppid(), 0, 0) and die $!; close(W); close(R); sleep 1000",
]  # fmt: skip


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the number of ptrace(2) is of x86-64")
def test_a_command_beside_a_tenant_that_somebody_traces_ends_when_it_is_let_go_of_and_nobody_waits_for_that(
    world: World, other: Tenant, add: Add, ends: Ends
) -> None:
    ours, theirs = ends
    tenant = add()
    world.ask("start", tenant.name)
    _run(world, tenant, theirs, "exec", argv=TRACED)
    theirs.close()
    pidfd = _descriptor_in(ours, b"S")
    pid = records.pid_of(pidfd)
    os.close(pidfd)
    eventually(lambda: " Z " in Path(f"/proc/{pid}/stat").read_text(), "it has ended")
    assert world.output("exec", other.name, "/bin/echo", "in") == "in\n"
    assert Path(f"/proc/{pid}").exists(), "the control: nobody could reap it"
    world.ask("stop", tenant.name, time=0)
    assert _until(ours, b"E") == b"E1280"


def test_what_others_write_into_a_tenants_output_does_not_keep_it_from_ending(
    world: World, other: Tenant, add: Add, tmp_path: Path
) -> None:
    """A process of the test stands for a second tenant that was passed the first one's pipe."""
    tenant = add(argv=["/bin/sh", "-c", "echo up; read x < /home/go"])
    os.mkfifo(tenant.home / "go")
    world.ask("start", tenant.name)
    world.said(tenant, "up")
    with contextlib.ExitStack() as stack:
        pipe = stack.enter_context(open(f"/proc/{world.row(tenant)['pid']}/fd/1", "wb", buffering=0))
        writers = [subprocess.Popen(["cat", "/dev/zero"], stdout=pipe, stderr=subprocess.DEVNULL) for _ in range(4)]
        for writer in writers:
            stack.enter_context(writer)
            stack.callback(writer.kill)
        (tenant.home / "go").write_text("x\n")
        world.ask("wait", tenant.name)
        assert [writer.wait(DEADLINE) for writer in writers] == [-signal.SIGPIPE] * 4
    assert gone(tenant)


def test_a_mistake_in_what_is_done_for_one_tenant_is_told_of_that_one_and_the_loop_goes_on() -> None:
    told: list[tuple[Held | None, str]] = []
    loop = Loop(lambda held, error: told.append((held, str(error))))
    first, second = Held("first", "service", "first", "first"), Held("second", "service", "second", "second")
    ends = [os.pipe() for _ in range(3)]

    def fail(descriptor: int, held: Held | None) -> None:
        loop.unwatch(descriptor, held)
        raise KeyError(held.key if held else "nobody")

    def over() -> None:
        loop.over = True

    for (read, write), held in zip(ends, (first, None, second), strict=True):
        os.write(write, b"x")
        loop.watch(read, lambda _happened, read=read, held=held: fail(read, held), held)  # type: ignore[misc]
    loop.later(0, lambda: struct.unpack("=i", b""), first)  # type: ignore[arg-type]
    loop.run(lambda: over() if len(told) == 4 else None)
    assert {(held, error.strip("'")) for held, error in told if "unpack" not in error} == {
        (first, "first"), (second, "second"), (None, "nobody"),
    }  # fmt: skip
    assert [held for held, error in told if "unpack" in error] == [first]
    for pair in ends:
        for descriptor in pair:
            os.close(descriptor)
