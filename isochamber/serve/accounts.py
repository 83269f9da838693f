"""Allowances and granted names while the supervisor runs: `isochamber net account`, again and again.

In a process of its own: netlink and nft take long, and nobody who asks the supervisor waits for them.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from isochamber.errors import printable

if TYPE_CHECKING:
    from isochamber.serve.supervisor import Supervisor


async def keep(supervisor: Supervisor, interval: float) -> None:
    """Account every ``interval`` seconds, as long as a tenant has a network of its own."""
    while True:
        if any(raw.get("network") == "bridge" for raw in supervisor.containers.by_tid().values()):
            await once(supervisor)
        await asyncio.sleep(interval)


async def once(supervisor: Supervisor) -> None:
    """Account now; what it says becomes events."""
    words = [sys.executable, "-I", "-m", "isochamber", "--root", supervisor.root, "net", "account"]
    process = await asyncio.create_subprocess_exec(
        *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        _, said = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    for line in said.decode("utf-8", "replace").splitlines():
        text = printable(line.removeprefix("isochamber: "))
        supervisor.event("network" if process.returncode == 0 else "error", None, text=text)
