"""The whole way, from tenants.yaml to a tenant that runs in its network, through the real command line."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isochamber import paths
from isochamber.launch import pins
from isochamber.net import host
from tests.build.products import eventually
from tests.net import world as w
from tests.tasks.world import World as Tasks
from tests.tasks.world import write_package

# What a tenant sees: it prints what the internet says, its files, and what it can't reach.
LOOK = """\
#!/usr/bin/perl
use IO::Socket::INET;
sub ask {
    my $s = IO::Socket::INET->new(PeerAddr => $_[0], PeerPort => $_[1], Timeout => 60) or return "no";
    return <$s>;
}
print "outside: ", ask($ENV{OUTSIDE}, 7777), "\\n";
print "host: ", ask($ENV{HOST}, 7777), "\\n";
for my $file ("resolv.conf", "hosts") { open my $f, "<", "/etc/$file"; print "$file: $_" while <$f>; }
open(my $f, ">>", "/etc/hosts") and print "hosts can be written\\n";
print "interfaces: ", join(" ", sort map { s|.*/||r } glob("/sys/class/net/*")), "\\n";
"""

GRANT = """\
    network:
      egress: [198.51.100.0/24]
      ports: ["8080:80"]
      dns: [198.51.100.2]
"""


@pytest.fixture
def tasks(make_root: object, root: Path, tmp_path: Path, outer: None) -> Iterator[Tasks]:
    """A tenant "looks" on a host with an internet."""
    directory = tmp_path / "world"
    directory.mkdir()
    made = Tasks(directory, root)
    environment = {"OUTSIDE": w.OUTSIDE4, "HOST": w.HOST4}
    write_package(directory / "packages/looks", {"env": environment}, {"main": LOOK})
    _grant(made, GRANT)
    with w.fresh_host(root):
        yield made


def _grant(tasks: Tasks, *grants: str) -> None:
    lines = ["defaults: {ipc: none}", "subnets: {ipv4: 10.77.0.0/16}", "bases: {default: {packages: []}}", "tenants:"]
    for number, grant in enumerate(grants):
        lines += [f"  {'looks' if not number else f'other{number}'}:", "    package: packages/looks", grant]
    tasks.tenants.write_text("\n".join(lines) + "\n")


def _forget(tid: str) -> None:
    pins.remove(tid)


def test_a_tenant_runs_in_its_network_again_after_a_reboot_and_is_deleted_with_it(tasks: Tasks) -> None:
    done = tasks.doit("run:looks")
    assert done.returncode == 0, done.stderr
    seen = done.stdout.splitlines()
    assert f"outside: outside {w.HOST4}" in seen
    assert "host: no" in seen
    assert f"resolv.conf: nameserver {w.OUTSIDE4}" in seen
    assert "hosts can be written" not in seen
    (interfaces,) = [line for line in seen if line.startswith("interfaces: ")]
    assert {"eth0", "lo"} <= set(interfaces.split()[1:])
    entry = tasks.entry("looks")
    assert any(line == f"hosts: {entry['net']['ipv4']}\tlooks" for line in seen)
    # Nothing to do the second time, whether doit remembers or not.
    for remembers in (True, False):
        if not remembers:
            for database in Path(paths.run_directory()).rglob("*.db*"):
                database.unlink()
        report = tasks.directory / "report.json"
        done = tasks.doit("run", "--reporter", "json", "--output-file", str(report), "net:looks")
        assert done.returncode == 0, done.stderr
        (task,) = [task for task in json.loads(report.read_text())["tasks"] if task["name"] == "net:looks"]
        assert task["result"] == "up-to-date"
    # A reboot forgets the namespace and all the rest; a start makes it again.
    _forget(entry["tid"])
    w.nft("flush", "ruleset")
    w.ip("link", "del", entry["net"]["bridge"])
    done = tasks.cli("run", "looks")
    assert f"outside: outside {w.HOST4}" in done.stdout, done.stdout + done.stderr
    # Without nft that start is refused, in a line, and nothing runs.
    _forget(entry["tid"])
    os.environ["PATH"], former = "/nonexistent", os.environ["PATH"]
    try:
        done = tasks.cli("run", "looks")
    finally:
        os.environ["PATH"] = former
    assert (done.returncode, done.stdout) == (125, "")
    assert "nft is not installed" in done.stderr and "Traceback" not in done.stderr
    _commands(tasks)
    # Deleted, nothing is left.
    done = tasks.cli("delete", "--yes", "looks")
    assert done.returncode == 0, done.stderr
    assert "isochamber" not in w.nft("list", "ruleset")
    assert entry["net"]["bridge"] not in {name for _, name in socket.if_nameindex()}


def _commands(tasks: Tasks) -> None:
    """ls, show, check and repair, as a person and as a program reads them."""
    assert tasks.cli("net", "check").returncode == 125  # its namespace is another one
    done = tasks.cli("net", "repair")
    assert (done.returncode, done.stdout) == (0, "looks: repaired\n"), done.stderr
    assert tasks.cli("net", "check").stdout == "every network is as planned\n"
    assert json.loads(tasks.cli("net", "check", "--json").stdout) == []
    (row,) = json.loads(tasks.cli("net", "ls", "--json").stdout)
    assert (row["name"], row["ports"], row["state"]) == ("looks", "8080:80/tcp", "in force")
    assert "in force" in tasks.cli("net", "ls").stdout
    shown = json.loads(tasks.cli("net", "show", "looks", "--json").stdout)
    assert shown["ipv4"] == row["ipv4"] and any("granted4" in rule for rule in shown["rules"])
    assert "10.77." in tasks.cli("net", "show", "looks").stdout
    done = tasks.cli("net", "show", "nobody")
    assert done.returncode == 125
    assert done.stderr.startswith("isochamber: nobody: net: has no network of its own")
    w.nft("flush", "ruleset")
    done = tasks.cli("net", "check")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr == "isochamber: the shared part: net: its nftables tables are gone\n"
    assert tasks.cli("net", "repair").returncode == 0
    assert tasks.cli("net", "account").returncode == 0


def test_mistakes_are_a_line_each_with_their_place_and_nothing_is_changed(tasks: Tasks) -> None:
    _grant(
        tasks,
        '    network: {ports: ["8080:80", "x"], egress: ["10.0.0.1/8:1"], rate: {up: 1mbit, queue: cake}}',
        '    network: {ports: ["8080:81"], peers: [nobody], allowance: {then: slow}}',
    )
    done = tasks.doit("net")
    assert done.returncode == 2
    assert [line.split(": ", 3)[2:] for line in done.stderr.splitlines()] == [
        [
            "looks",
            "x: is no published port, must be [ADDRESS:]HOST:INSIDE[/tcp|/udp], such as 8080:80/tcp",
        ],
        ["looks", "10.0.0.1/8:1: 10.0.0.1/8 has host bits set, such as 10.0.0.0/8"],
        ["looks", "queue: cake is no discipline, allowed: fq_codel, fq, sfq, fifo"],
        ["other1", "the port 8080/tcp of the host is published by looks too"],
        ["other1", "peers: there is no other tenant nobody"],
        ["other1", "the key bytes is missing"],
        ["other1", "slow: must be cut, or slow and a rate, such as slow 32kbit"],
    ]
    assert all(line.startswith(f"isochamber: {tasks.tenants}:") for line in done.stderr.splitlines())
    assert "isochamber" not in w.nft("list", "ruleset")


def test_a_port_that_is_taken_stops_configuring_and_nothing_is_changed(tasks: Tasks) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 8080))
        taken.listen()
        done = tasks.doit("net")
    assert done.returncode != 0
    assert "looks: net: the port 8080/tcp is taken on this host by another program" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tasks.root / "containers.json").exists()
    assert "isochamber" not in w.nft("list", "ruleset")


INSTALL = f"""\
#!/bin/bash
ask() {{
    (exec 3<>"/dev/tcp/$1/7777" && read -r -u 3 line; echo "$2: $line") >> /etc/asked
}}
ask {w.OUTSIDE4} outside
ask {w.ELSEWHERE4} elsewhere
ask {w.HOST4} host
ask 127.0.0.1 loopback
ask {w.METADATA4} metadata
ls /sys/class/net >> /etc/asked
cp /etc/resolv.conf /etc/resolvers
"""


def _installs(tasks: Tasks, script: str, network: str | None) -> None:
    """Add a tenant that installs something, with ``install_network`` or without a word about it."""
    package = tasks.directory / "packages/installs"
    write_package(package, {"dependencies": "/home/install.sh"}, {"main": "#!/bin/sh\n", "install.sh": script})
    _grant(tasks, "")
    given = "" if network is None else f", install_network: {network}"
    tasks.tenants.write_text(f"{tasks.tenants.read_text()}  installs: {{package: packages/installs{given}}}\n")


@pytest.mark.parametrize("network", [None, "bridge", "none", "host"])
def test_an_install_script_has_the_network_it_was_granted_and_leaves_nothing_of_it(
    tasks: Tasks, network: str | None
) -> None:
    _installs(tasks, INSTALL, network)
    done = tasks.doit("install_deps:installs")
    assert done.returncode == 0, done.stdout + done.stderr
    (layer,) = tasks.layers()
    etc = tasks.root / "layers" / layer / "rootfs/etc"
    asked = (etc / "asked").read_text().splitlines()
    assert ("outside: outside " + w.HOST4 in asked) == (network != "none"), asked
    assert (f"elsewhere: elsewhere {w.HOST4}" in asked) == (network != "none"), asked
    for name, server in (("host", "host"), ("loopback", "host"), ("metadata", "metadata")):
        answered = any(line.startswith(f"{name}: {server} ") for line in asked)
        assert answered == (network == "host"), asked  # with the host's network: the control
    assert ("eth0" in asked) == (network in (None, "bridge")), asked
    if network is None:
        servers = [line.split()[1] for line in (etc / "resolvers").read_text().splitlines() if "nameserver" in line]
        assert servers == list(host.resolvers())
    assert "isochamber" not in w.nft("list", "ruleset")
    assert not any(name.startswith("ic") for _, name in socket.if_nameindex())


def test_the_network_of_an_install_script_goes_with_a_builder_that_is_killed(tasks: Tasks) -> None:
    _installs(tasks, "#!/bin/sh\nsleep 600\n", None)
    words = [sys.executable, "-m", "isochamber.tasks", "install_deps:installs"]
    with subprocess.Popen(words, env=tasks.environment, cwd=tasks.directory, stdout=subprocess.DEVNULL) as building:
        assert eventually(lambda: any(name.startswith("ic") for _, name in socket.if_nameindex()))
        building.kill()
    assert eventually(lambda: not any(name.startswith("ic") for _, name in socket.if_nameindex()))
    assert eventually(lambda: "isochamber" not in w.nft("list", "ruleset"))


def test_what_is_made_anew_keeps_the_network_of_an_install_script_that_runs(tasks: Tasks) -> None:
    asks = f'exec 3<>/dev/tcp/{w.OUTSIDE4}/7777; read -r -u 3 line; [ -n "$line" ]'
    script = f"#!/bin/bash\ntouch /home/begun\nwhile [ ! -e /home/go ]; do sleep 0.05; done\n{asks}\n"
    _installs(tasks, script, None)
    tasks.tenants.write_text(tasks.tenants.read_text() + "  peer: {package: packages/looks, network: bridge}\n")
    assert tasks.doit("configure:peer").returncode == 0
    words = [sys.executable, "-m", "isochamber.tasks", "install_deps:installs"]
    with subprocess.Popen(
        words, env=tasks.environment, cwd=tasks.directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as building:
        if not eventually(lambda: any((tasks.root / "staging").glob("*layer-installs-*/home/begun"))):
            building.kill()
        w.nft("flush", "ruleset")
        assert tasks.cli("net", "repair").returncode == 0
        (home,) = (tasks.root / "staging").glob("*layer-installs-*/home")
        (home / "go").touch()
        output = building.communicate(timeout=120)[0]
    assert building.returncode == 0, output


def test_an_install_script_whose_network_can_not_be_made_does_not_run_with_the_hosts(tasks: Tasks) -> None:
    _installs(tasks, "#!/bin/sh\nexit 0\n", None)
    subprocess.run(["ip", "route", "add", "10.77.0.0/16", "via", w.OUTSIDE4], check=True)
    done = tasks.doit("install_deps:installs")
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "installs: layer: the install script's network: " in said
    assert "install_network: host in tenants.yaml" in said
    assert "Traceback" not in said
    assert not tasks.layers()
