"""The network of one run of an install script: made by a process of its own, and removed by it at the run's end.

That process, ``isochamber net hold``, removes the network when its standard input
ends. So it does too when the builder is killed.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from isochamber.build.state import State
from isochamber.errors import IsochamberError

_HOST = "install_network: host in tenants.yaml gives the script the host's network, its own services included"


@contextlib.contextmanager
def network(state: State, entry: Mapping[str, Any], tenant: str) -> Iterator[list[str]]:
    """Hold the network of ``entry`` for the block; yields lines that the operator should see. Raises IsochamberError.

    What can't be made fails the build: the host's own network is no substitute that
    nobody asked for.
    """
    words = [sys.executable, "-I", "-m", "isochamber", "--root", str(state.root), "net", "hold"]
    # A session of its own: an interrupt from the terminal is for the builder, whose end ends this too.
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", start_new_session=True)
    try:
        yield _answer(holder, entry, tenant)
    finally:
        holder.communicate()


def _answer(holder: "subprocess.Popen[bytes]", entry: Mapping[str, Any], tenant: str) -> list[str]:
    assert holder.stdin is not None and holder.stdout is not None  # noqa: S101 - they are pipes
    with contextlib.suppress(BrokenPipeError):  # what it says tells why
        holder.stdin.write(json.dumps(entry).encode() + b"\n")
        holder.stdin.flush()
    try:
        answer = json.loads(holder.stdout.readline())
    except ValueError:
        answer = {"what": "its network could not be made"}
    if "resolvers" not in answer:
        hint = f"{answer['hint']}; or {_HOST}" if answer.get("hint") else _HOST
        raise IsochamberError(
            f"the install script's network: {answer['what']}", stage="layer", tenant=tenant,
            path=answer.get("path"), errno=answer.get("errno"), hint=hint,
        )  # fmt: skip
    if answer["resolvers"]:
        return []
    return [f"no resolver of this host is off its loopback, so the script can't look up names: {_HOST}"]
