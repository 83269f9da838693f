"""What `isochamber run` through a supervisor costs before it has asked: an interpreter, and what a client needs."""

import re
import subprocess
import sys
from collections.abc import Callable

from isochamber.serve import run
from tests.launch.tenants import Tenant
from tests.launch.test_imports import SLOW
from tests.serve.world import World

Add = Callable[..., Tenant]

# Each costs a tenth of a millisecond or two, those with the launcher some 15 together.
NEEDED = {
    "isochamber", "isochamber.errors", "isochamber.launch", "isochamber.launch.channel",
    "isochamber.launch.foreground", "isochamber.launch.messages", "isochamber.launch.words", "isochamber.paths",
    "isochamber.serve", "isochamber.serve.client", "isochamber.serve.dump", "isochamber.serve.remote",
    "isochamber.serve.run",
}  # fmt: skip
COSTLY = SLOW | {"_ctypes", "_json", "_struct", "ctypes", "fcntl", "resource", "struct", "termios"}


def test_a_run_through_the_supervisor_imports_nothing_of_the_launcher(world: World, add: Add) -> None:
    tenant = add(argv=["/bin/sh", "-c", "exit 3"])
    world.begin()
    python, *words = run.argv("run", "--root", str(world.root), tenant.name)
    done = subprocess.run(
        [python, "-X", "importtime", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert world.row(tenant)["exit_code"] == 3  # it was the supervisor's
    imported = set(re.findall(r"^import time:.*\|\s+(\S+)$", done.stderr, re.M))
    assert {name for name in imported if name.startswith("isochamber")} == NEEDED
    assert imported & COSTLY == set()
    assert imported - NEEDED <= set(sys.stdlib_module_names) | {"encodings.aliases", "encodings.utf_8"}
