"""The supervisor does `isochamber net account` by itself: no timer is needed for an allowance to count."""

import contextlib
import os
import signal
import subprocess
import sys

from isochamber.cli.common import supervised
from isochamber.serve import client
from tests.conftest import PROJECT
from tests.net import world as w
from tests.net.test_metered import _send
from tests.net.world import World
from tests.serve.world import end_nursery, eventually


def test_an_allowance_is_warned_of_with_nobody_but_the_supervisor_there(world: World) -> None:
    world.tenant("a", egress="all", allowance={"bytes": 200_000, "then": "cut"})
    world.apply()
    words = [sys.executable, "-m", "isochamber", "--root", str(world.state.root), "serve", "--account-interval", "0.2"]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, cwd=PROJECT) as serving:
        try:
            eventually(supervised, "the supervisor answers")
            _send(world, "a", 165_000)
            end = client.need()
            end.settimeout(w.DEADLINE)
            with contextlib.closing(end):
                items = (answer.get("item", {}) for answer in client.stream(end, {"verb": "events", "since": 0}))
                event = next(item for item in items if item.get("event") == "network")
            assert event["text"].startswith("a: has used 8")
        finally:
            os.kill(serving.pid, signal.SIGTERM)
            serving.wait(w.DEADLINE)
            end_nursery()
