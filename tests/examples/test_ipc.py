"""/tmp/tenant_ipc, the real path: nng over it, sockets and FIFOs both ways, later arrivals, and nothing back.

The host's side is ipc_host.py, in a mount namespace whose /tmp is a shared mount of its own.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pynng
import pytest

from tests.conftest import PROJECT
from tests.examples.ipc_host import REFUSED
from tests.tasks.world import World, write_package

ASKER = """\
#!/usr/bin/python3
import socket, sys
sys.path.insert(0, "/home/lib")
import pynng
with pynng.Req0(dial="ipc:///tmp/tenant_ipc/nng.sock", send_timeout=60000, recv_timeout=60000) as asker:
    for number in range(3):
        asker.send(f"question {number} of {socket.gethostname()}".encode())
        print(asker.recv().decode())
try:
    pynng.Rep0(listen="ipc:///tmp/tenant_ipc/own.sock")
except pynng.NNGException as error:
    print("listen refused:", error)
"""

# The interpreter and the two libraries that pynng needs come from Debian; pynng itself is this environment's own.
INSTALL = """\
#!/bin/sh
set -e
apt-get update
apt-get install -y --no-install-recommends python3-cffi-backend python3-sniffio
"""


@pytest.fixture
def world(root: Path) -> World:
    """Tenants with the default, ``ipc: required``; not below /tmp, which the host's side replaces."""
    directory = root / "world"
    directory.mkdir()
    made = World(directory, root)
    made.tenants.write_text("defaults: {install_network: host}\nbases: {default: {packages: []}}\n")
    return made


def _scenario(world: World, name: str) -> dict[str, Any]:
    inner = 'mount -t tmpfs tmpfs /tmp && mount --make-shared /tmp && mkdir /tmp/run && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", inner, "sh",
         sys.executable, "-m", "tests.examples.ipc_host", name, str(world.root)],
        env={**world.environment, "ISOCHAMBER_RUN": "/tmp/run"}, cwd=PROJECT, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_tenant_asks_a_service_of_the_host_over_nng(world: World) -> None:
    package = world.root / "new_tenants/asker"
    write_package(package, {"dependencies": "/home/install.sh"}, {"main": ASKER, "install.sh": INSTALL})
    source = Path(pynng.__file__).parent
    shutil.copytree(source, package / "progs/lib/pynng", ignore=shutil.ignore_patterns("__pycache__"))
    configured = world.doit("configure:asker")
    assert configured.returncode == 0, configured.stdout + configured.stderr
    tid = world.entry("asker")["tid"]
    found = _scenario(world, "nng")
    questions = [f"question {number} of {tid}" for number in range(3)]
    assert found["heard"] == questions
    assert found["out"][:3] == [f"answer to {question}" for question in questions]
    assert found["out"][3].startswith("listen refused:"), found["out"]
    assert found["status"] == 0
    assert found["there"] == ["nng.sock"]


def _shell(world: World) -> None:
    write_package(world.root / "new_tenants/shell", {"init": "/bin/sh"}, {})
    configured = world.doit("configure:shell")
    assert configured.returncode == 0, configured.stdout + configured.stderr


def test_a_file_and_a_mount_made_later_appear_inside_and_nothing_propagates_back(world: World) -> None:
    _shell(world)
    found = _scenario(world, "later")
    assert found["before"] == [0, "mnt\nsub"]
    assert found["file"] == [0, "a file made later"]
    assert found["mount"] == [0, "a mount made later"]
    assert found["write"] != 0
    assert found["write where all may"] == 0, "the documentation says otherwise"
    assert found["unmounted"] == [0, ""]
    assert found["removed"] == [0, "mnt\nsub"]
    options = found["mountinfo"].split(" - ")[0].split()
    assert any(field.startswith("master:") for field in options), "not a slave"
    assert not any(field.startswith("shared:") for field in options), "a peer of the host's"
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(options[5].split(","))
    assert found["mounted inside"] == "1"
    assert found["propagated back"] == []
    assert found["a peer propagates"] == ["/tmp/tenant_ipc/sub"]


def test_a_fifo_and_a_socket_work_both_ways_and_the_directory_can_not_be_changed(world: World) -> None:
    _shell(world)
    found = _scenario(world, "speak")
    assert found["fifo in"] == [0, "over a FIFO"]
    assert found["fifo out"] == ["back over a FIFO\n"]
    assert found["socket"] == ["heard you", "hello"]
    assert found["refused"] == dict.fromkeys(REFUSED, True)
    assert found["unchanged"]


def test_what_is_refused_in_there_works_where_it_is_allowed(tmp_path: Path) -> None:
    """The control: the same commands over a directory that may be written to."""
    import socket

    for what, text in REFUSED.items():
        directory = tmp_path / what
        (directory / "empty").mkdir(parents=True)
        (directory / "file").write_text("x")
        (directory / "program").write_text("#!/bin/sh\n")
        (directory / "program").chmod(0o777)
        with socket.socket(socket.AF_UNIX) as service:
            service.bind(str(directory / "service.sock"))
        done = subprocess.run(
            ["sh", "-c", text.format(ipc=f"'{directory}'" if "perl" not in text else directory)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{what}: {done.stderr}"
