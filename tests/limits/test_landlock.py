"""Landlock: the best level that the kernel has, each level by itself, and none where there is none."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from isochamber.launch import landlock
from tests.launch import tenants
from tests.launch.tenants import Tenant
from tests.launch.test_verify import _launch

OFF = "start.landlock.apply = lambda **more: None"


def _needs(abi: int) -> None:
    if landlock.abi() < abi:
        pytest.skip(f"Landlock ABI {abi}: this kernel has {landlock.abi()}")


def _run(tenant: Tenant, script: str, sabotage: str = "") -> tenants.Done:
    """Run a script as the tenant, by a launcher that was tampered with."""
    return _launch(tenant, sabotage, argv=["/bin/sh", "-c", script])


def test_no_device_node_is_made_not_even_a_whiteout(tenant: Tenant) -> None:
    _needs(3)  # seen on Linux 6.1 (ABI 2): other nodes are refused, and 0:0 is not
    attempt = "mknod /home/whiteout c 0 0"  # free to everybody since Linux 5.8
    assert _run(tenant, attempt, OFF).returncode == 0, "the control: without Landlock"
    assert _run(tenant, attempt.replace("whiteout", "other")).returncode != 0
    assert not (tenant.home / "other").exists()


CONNECT = (
    "perl -MSocket -e 'socket(my $s, AF_UNIX, SOCK_STREAM, 0) or die; "
    'connect($s, pack_sockaddr_un(qq(\\0{name}))) or die $!; print "connected"\''
)


def test_an_abstract_socket_of_the_host_is_out_of_reach_on_its_own_network(tenant: Tenant) -> None:
    _needs(6)
    name = f"isochamber-test-{os.getpid()}"
    tenant.change(network="host")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        attempt = CONNECT.replace("{name}", name)
        control = _run(tenant, attempt, OFF)
        assert control.stdout == "connected", control.stderr
        done = _run(tenant, attempt)
    assert "connected" not in done.stdout
    assert "not permitted" in done.stderr


@pytest.mark.guest
def test_abstract_sockets_and_signals_among_its_own_processes_work(tenant: Tenant) -> None:
    script = (
        "use Socket; socket(my $l, AF_UNIX, SOCK_STREAM, 0); bind($l, pack_sockaddr_un(qq(\\0own))) or die; "
        "listen($l, 1); my $p = fork; if (!$p) { sleep 1000 } "
        "socket(my $s, AF_UNIX, SOCK_STREAM, 0); connect($s, pack_sockaddr_un(qq(\\0own))) or die; "
        "kill(9, $p) or die; waitpid($p, 0); print $? & 127"
    )
    assert tenant.perl(script) == str(int(signal.SIGKILL))


KILL = "echo ready; read pid; kill -0 $pid 2>/dev/null && echo reached || echo refused; read end"


def test_a_process_that_joined_can_not_be_signalled(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put there by the host, under the tenant's own id: nothing but the domain stands between the two."""
    _needs(6)
    assert _signal_a_neighbour(tenant) == "refused"
    monkeypatch.setattr(tenant, "words", lambda *words, options=(): _tampered(tenant, list(words)))
    assert _signal_a_neighbour(tenant) == "reached", "the control: without Landlock"


def _tampered(tenant: Tenant, words: list[str]) -> list[str]:
    from tests.launch.test_verify import words_of

    tenant.change(argv=words)
    return words_of(tenant, OFF)


def _signal_a_neighbour(tenant: Tenant) -> str:
    with tenant.started(KILL) as started:
        pid = str(started.record.pid)
        words = ["nsenter", "-t", pid, "-p", "-U", "-S", "0", "-G", "0", "sh", "-c", "echo joined; exec sleep 1000"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as joined:
            try:
                assert joined.stdout is not None
                assert joined.stdout.readline() == "joined\n"
                (inside,) = [
                    line.split()[-1]
                    for child in Path(f"/proc/{joined.pid}/task/{joined.pid}/children").read_text().split()
                    for line in Path(f"/proc/{child}/status").read_text().splitlines()
                    if line.startswith("NSpid:")
                ]
                started.say(inside)
                return started.line()
            finally:
                for child in tenant.processes():
                    if child != started.record.pid:
                        os.kill(child, signal.SIGKILL)
                joined.wait(tenants.DEADLINE)


MOVES = (
    "mkdir /home/a /home/b /tmp/a /tmp/b && for d in /home /tmp; do echo x > $d/a/f && ln $d/a/f $d/b/g && "
    "mv $d/a/f $d/b/f && mv $d/b $d/a/; done && mv /etc/hostname /var/ && : > /dev/null && echo moved"
)


@pytest.mark.parametrize("level", range(8))
def test_at_every_level_of_the_kernel_a_tenant_starts_and_moves_files(tenant: Tenant, level: int) -> None:
    """Forced down: each is what another kernel has."""
    if level:
        _needs(level)
    (tenant.upper / "etc").mkdir()
    (tenant.upper / "etc" / "hostname").touch()
    for path in (tenant.upper / "etc", tenant.upper / "etc" / "hostname"):
        os.chown(path, tenant.uid_base, tenant.uid_base)
    done = _run(tenant, MOVES, f"start.landlock.abi = lambda: {level}")
    assert done.stdout == "moved\n", done.stderr


@pytest.mark.guest
def test_what_the_kernel_has_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = {0: "none", 1: "too old", 2: "no device nodes", 5: "ioctls", 6: "signals", 9: "ABI 9"}
    for level, part in levels.items():
        monkeypatch.setattr(landlock, "abi", lambda level=level: level)
        assert part in landlock.described()
