"""The supervisor does `isochamber net account` by itself: no timer is needed for an allowance to count."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from isochamber.cli.common import supervised
from isochamber.serve import client
from tests.conftest import PROJECT
from tests.net import world as w
from tests.net.test_metered import _send
from tests.net.test_whole import _grant, tasks  # noqa: F401 - a fixture
from tests.net.world import World
from tests.serve.world import end_nursery, eventually
from tests.tasks.world import World as Tasks

# A service that sends some kilobytes, asks the internet, says what it heard, and so on.
TALK = """\
#!/usr/bin/perl
use IO::Socket::INET;
$| = 1;
my $udp = IO::Socket::INET->new(PeerAddr => $ENV{OUTSIDE}, PeerPort => 9, Proto => "udp") or die;
while (1) {
    $udp->send("x" x 972) for 1 .. 20;
    my $s = IO::Socket::INET->new(PeerAddr => $ENV{OUTSIDE}, PeerPort => 7777, Timeout => 1);
    print "heard: ", $s ? scalar <$s> : "nothing", "\\n";
    select(undef, undef, undef, 0.1);
}
"""


@contextlib.contextmanager
def _serving(root: Path) -> Iterator[None]:
    words = [sys.executable, "-m", "isochamber", "--root", str(root), "serve", "--account-interval", "0.2"]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, cwd=PROJECT) as serving:
        try:
            eventually(supervised, "the supervisor answers")
            yield
        finally:
            os.kill(serving.pid, signal.SIGTERM)
            serving.wait(w.DEADLINE)
            end_nursery()


def _event(text: str) -> str:
    """Wait for what the accounting says that contains ``text``."""
    end = client.need()
    end.settimeout(w.DEADLINE)
    with contextlib.closing(end):
        items = (answer.get("item", {}) for answer in client.stream(end, {"verb": "events", "since": 0}))
        return next(
            str(item["text"]) for item in items if item.get("event") == "network" and text in item.get("text", "")
        )


def test_an_allowance_is_warned_of_with_nobody_but_the_supervisor_there(world: World) -> None:
    world.tenant("a", egress="all", allowance={"bytes": 200_000, "then": "cut"})
    world.apply()
    with _serving(world.state.root):
        _send(world, "a", 165_000)
        assert _event("a: ").startswith("a: has used 8")


def test_a_used_up_allowance_cuts_and_slows_with_nobody_but_the_supervisor_there(world: World) -> None:
    world.tenant("cut", egress="all", allowance={"bytes": 100_000, "then": "cut"})
    world.tenant("slow", egress="all", allowance={"bytes": 100_000, "then": "slow 64kbit"})
    world.tenant("free", egress="all")
    world.apply()
    with _serving(world.state.root):
        for name in ("cut", "slow"):
            assert world.inside(name, lambda: w.udp(w.OUTSIDE4)).startswith("outside"), "the control"
            _send(world, name, 120_000)
        assert _event("cut: has used 100").endswith("and is cut until the next")
        assert "and is slowed to 64 kbit/s" in _event("slow: has used 100")
        assert world.inside("cut", lambda: w.tcp(w.OUTSIDE4, wait=w.SILENCE)) == "silence"
        assert world.inside("slow", lambda: w.udp(w.OUTSIDE4)).startswith("outside")
        got = {}
        for name in ("slow", "free"):
            with w.frames_of(world.outside, "up1") as came:
                _send(world, name, 2_000_000)
                got[name] = sum(len(frame) for frame in came(0.2))
        assert 0 < got["slow"] < 1_000_000 < got["free"]


def test_a_service_talks_through_its_network_until_its_allowance_is_used_up(tasks: Tasks) -> None:  # noqa: F811
    tasks.prog("looks", "main").write_text(TALK)
    _grant(tasks, "    network: {egress: [198.51.100.0/24], allowance: {bytes: 300K, then: cut}}")
    done = tasks.doit("configure:looks")
    assert done.returncode == 0, done.stdout + done.stderr

    def said() -> str:
        return tasks.cli("logs", "looks").stdout

    with _serving(tasks.root):
        assert tasks.cli("start", "looks").returncode == 0
        eventually(lambda: f"heard: outside {w.HOST4}" in said(), "it reaches the internet")
        assert _event("looks: has used 100").endswith("and is cut until the next")
        eventually(lambda: said().endswith("heard: nothing\n"), "it is cut")
        found = re.search(
            r'^isochamber_network_transmit_bytes_total\{tenant="looks"\} (\d+)$',
            tasks.cli("metrics").stdout, re.MULTILINE,
        )  # fmt: skip
        assert found is not None and int(found[1]) > 300_000
        # A restart gives nothing back.
        assert tasks.cli("restart", "-t", "0", "looks").returncode == 0
        eventually(lambda: said().endswith("heard: nothing\n"), "it is still cut")
        assert tasks.cli("stop", "-t", "0", "looks").returncode == 0
    done = tasks.cli("delete", "--yes", "looks")
    assert done.returncode == 0, done.stderr
