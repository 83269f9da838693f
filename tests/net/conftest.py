"""A network namespace of its own for all of these tests: the machine's network is never touched."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from isochamber.launch import syscalls
from tests.net.world import World, fresh_host


def _lacking() -> str | None:
    """Return what this kernel lacks for these tests, or None."""
    if shutil.which("nft") is None:
        return "nft is not installed"
    trial = "add table inet trial\nadd chain inet trial c { type nat hook postrouting priority 0; }\n"
    trial += "add rule inet trial c fib daddr type local masquerade\nadd table bridge trial\n"
    for words, text, what in (
        (["ip", "link", "add", "trial0", "type", "bridge"], "", "bridge (CONFIG_BRIDGE)"),
        (["ip", "link", "add", "trial1", "type", "veth", "peer", "name", "trial2"], "", "veth (CONFIG_VETH)"),
        (["nft", "-f", "-"], trial, "nftables with nat and the bridge family (CONFIG_NF_TABLES_BRIDGE)"),
    ):
        if subprocess.run(
            ["unshare", "-n", *words], input=text, text=True, capture_output=True, check=False
        ).returncode:
            return f"this kernel lacks {what}"
    return None


@pytest.fixture(scope="module", autouse=True)
def outer() -> Iterator[None]:
    """This thread's network namespace: an empty one, while a module of these tests runs."""
    lacking = _lacking()
    if lacking is not None:
        pytest.skip(lacking)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    syscalls.unshare(syscalls.CLONE_NEWNET)
    try:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        yield
    finally:
        syscalls.setns(home, syscalls.CLONE_NEWNET)
        os.close(home)


@pytest.fixture
def world(outer: None) -> Iterator[World]:
    """A host and an internet in a namespace of their own, without tenants."""
    directory = Path(tempfile.mkdtemp(prefix="isochamber-net-"))
    with fresh_host(directory / "state") as made:
        yield made
    shutil.rmtree(directory)
