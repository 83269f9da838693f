"""What a tenant says of itself to $NOTIFY_SOCKET: much of it, and with descriptors."""

import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from isochamber.serve import link, wire
from tests.launch.tenants import Tenant
from tests.serve.world import DEADLINE, World, eventually, gone, nursery_of

Add = Callable[..., Tenant]
NOTIFY: dict[str, Any] = {"ready": "notify"}
MANY = 600
PERL = (
    "use Socket; $| = 1; socket(S, AF_UNIX, SOCK_DGRAM, 0) or die $!;"
    " connect(S, pack_sockaddr_un($ENV{NOTIFY_SOCKET})) or die $!; sub inform { send(S, $_[0], 0) // die $! }"
    " print qq(waiting\\n); open(F, q(<), q(/home/go)) or die $!;"
)
FLOOD = (
    f"{PERL} inform(qq(STATUS=$_\\nREADY=1)) for 1 .. {MANY}; inform(qq(STATUS=last)) for 1 .. 20;"
    " print qq(flooded\\n); sleep 1000;"
)
# SCM_RIGHTS by sendmsg(2), which perl has no word for; struct msghdr and cmsghdr of a 64-bit machine.
PASS = (
    " sub pass { my ($text, $fd) = @_; my $control = pack(q(Qiiii), 20, 1, 1, $fd, 0); my $iov = pack(q(PQ), $text,"
    " length $text); my $message = pack(q(QQPQPQQ), 0, 0, $iov, 1, $control, 24, 0);"
    " syscall(46, fileno(S), $message, 0) >= 0 or die $! }"
)
# A connection whose other end reads nothing: its last close waits for a thousand seconds.
LINGER = (
    " socket(L, AF_INET, SOCK_STREAM, 0) or die $!; bind(L, sockaddr_in(0, INADDR_LOOPBACK)) or die $!; listen(L, 1);"
    " socket(C, AF_INET, SOCK_STREAM, 0) or die $!; connect(C, getsockname(L)) or die $!; accept(A, L) or die $!;"
    " setsockopt(C, SOL_SOCKET, SO_LINGER, pack(q(ii), 1, 1000)) or die $!; fcntl(C, 4, 2048) or die $!;"
    " 1 while defined syswrite(C, q(x) x 65536);"
)


def _perl(script: str) -> list[str]:
    return ["/usr/bin/perl", "-e", script]


def test_a_flood_is_a_few_reports_with_the_last_text_and_readiness_is_told_once(world: World, add: Add) -> None:
    tenant = add(argv=_perl(FLOOD), service=NOTIFY)
    os.mkfifo(tenant.home / "go")
    world.begin()
    world.ask("start", tenant.name)
    world.said(tenant, "waiting")
    world.kill()
    end = link.connect()  # the test stands for the supervisor: it hears every report
    assert end is not None
    with end:
        end.settimeout(DEADLINE)
        (tenant.home / "go").write_text("")
        heard: list[dict[str, Any]] = []
        while not heard or heard[-1].get("text") != "last":
            report, _ = wire.receive(end)
            assert report is not None
            heard.append(report)
    texts = [report["text"] for report in heard if report["on"] == "status"]
    assert [report["on"] for report in heard].count("ready") == 1
    assert all(one != two for one, two in itertools.pairwise(texts))
    assert len(heard) < MANY / 2, "not one a message"


def test_a_flood_costs_no_other_tenant_an_event_and_the_supervisor_keeps_its_nursery(world: World, add: Add) -> None:
    floods = [add(argv=_perl(FLOOD), service=NOTIFY) for _ in range(3)]
    others = [add(argv=["/bin/sh", "-c", "exit 4"]) for _ in range(5)]
    for tenant in floods:
        os.mkfifo(tenant.home / "go")
    world.begin()
    world.ask("start", *(tenant.name for tenant in floods))
    for tenant in floods:
        world.said(tenant, "waiting")
        (tenant.home / "go").write_text("")
    begun = time.time()
    for tenant in others:
        world.ask("start", tenant.name)
        assert world.ask("wait", tenant.name)["codes"] == [4]
        world.event("died", tenant, begun)
    for tenant in floods:
        world.said(tenant, "flooded")
        eventually(lambda: world.row(tenant)["status_text"] == "last", "its last text is known")  # noqa: B023
        assert world.row(tenant)["ready"]
    events = [event for event in world.stream("events", stream=False) if event["event"] == "ready"]
    assert len(events) == len(floods)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the number of sendmsg(2) is of x86-64")
@pytest.mark.parametrize("seen", ["while it runs", "at its end"])
def test_a_tenant_can_not_make_the_nursery_wait_for_a_descriptor_that_it_passes(
    world: World, add: Add, seen: str
) -> None:
    before = " inform(qq(STATUS=fine)) for 1 .. 30; " if seen == "at its end" else ""  # it is not heard until then
    after = " close(C); print qq(passed\\n); " + ("sleep 1000;" if not before else "exit 3;")
    script = f"{PERL}{PASS}{LINGER}{before} pass(q(READY=1), fileno(C)); {after}"
    tenant, other = add(argv=_perl(script), service=NOTIFY), add()
    os.mkfifo(tenant.home / "go")
    world.begin()
    world.ask("start", tenant.name, other.name)
    nursery = nursery_of(other)
    world.said(tenant, "waiting")
    begun = time.time()
    (tenant.home / "go").write_text("")
    world.said(tenant, "passed")
    if not before:
        line = "notify: passed descriptors to its $NOTIFY_SOCKET: it is not listened to any more"
        eventually(lambda: line in world.cli("logs", tenant.name).stderr, "it is told")
        assert any(line in event.get("error", "") for event in world.stream("events", stream=False, since=begun))
    else:
        world.ask("wait", tenant.name)
    for _ in range(2):
        assert world.output("exec", other.name, "/bin/echo", "in") == "in\n"
    assert not world.row(tenant)["ready"]
    world.ask("stop", tenant.name, time=0)
    assert gone(tenant)
    assert nursery_of(other) == nursery


def test_a_tenant_can_not_put_another_file_in_the_place_of_its_notify_socket(world: World, add: Add) -> None:
    tenant = add(service=NOTIFY)
    world.begin()
    world.ask("start", tenant.name)
    world.said(tenant, "up")
    for words in (("rm", "-f", "/dev/notify"), ("mv", "/dev/notify", "/dev/other"), ("mv", "/dev", "/other")):
        assert world.cli("exec", tenant.name, *words).returncode != 0
    assert world.cli("exec", tenant.name, "/usr/bin/test", "-S", "/dev/notify").returncode == 0
