"""Tenants' networks over real namespaces: a host and an internet of our own, and probes that run as the tenant.

Nothing leaves the outer namespace that the tests make: what they call the host is a
namespace too, and the internet is another one behind it.
"""

import contextlib
import errno
import ipaddress
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from isochamber import paths
from isochamber.build import network, ranges, registry
from isochamber.build.state import State
from isochamber.launch import pins, syscalls
from isochamber.net import host, plan
from isochamber.net.network import Network
from isochamber.net.plan import Member, Site
from isochamber.spec import network as spec_network
from isochamber.spec.model import Subnets

DEADLINE = 60.0  # seconds for what must come; only a failing test waits that long
SILENCE = 0.4  # seconds for what must not come

HOST4, OUTSIDE4 = "198.51.100.1", "198.51.100.2"
ELSEWHERE4 = "203.0.113.9"  # on the internet too, and in nobody's list
HOST6, OUTSIDE6 = "2001:db8:1::1", "2001:db8:1::2"
ELSEWHERE6 = "2001:db8:9::9"
METADATA4, METADATA6 = "169.254.169.254", "fd00:ec2::254"
PORT = 7777  # every echo server's
SUBNETS = Subnets("10.77.0.0/16", "fd77:7777:7777::/64")


def ip(*words: str, namespace: int | None = None) -> None:
    """Run ip(8), in ``namespace``."""
    with host.namespace(namespace) if namespace is not None else contextlib.nullcontext():
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=60)


def nft(*words: str) -> str:
    """Run nft(8) and return what it prints."""
    return subprocess.run(["nft", *words], check=True, capture_output=True, text=True, timeout=60).stdout


def new_namespace() -> int:
    """Return a descriptor of a fresh network namespace with its loopback up."""
    with host.namespace(None):
        descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    return descriptor


class Servers:
    """Echo servers in any namespaces, TCP and UDP, answered by one thread; what came is remembered."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._sockets: list[socket.socket] = []
        self.seen: list[tuple[str, str]] = []  # (server's name, peer's address)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def add(self, name: str, namespace: int | None, address: str, port: int = PORT) -> None:
        """Serve TCP and UDP echo on ``address`` in ``namespace`` (None: this one)."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with host.namespace(namespace) if namespace is not None else contextlib.nullcontext():
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                server = socket.socket(family, kind)
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                server.setsockopt(socket.SOL_IP, 15, 1)  # IP_FREEBIND: whether the address is there yet or not
                server.bind((address, port))
                if kind == socket.SOCK_STREAM:
                    server.listen(16)
                server.setblocking(False)
                self._sockets.append(server)
                self._selector.register(server, selectors.EVENT_READ, (name, kind))
        self._wake.send(b"x")

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    if self._woken.recv(64) == b"":
                        return
                    continue
                with contextlib.suppress(OSError):
                    self._answer(key.fileobj, *key.data)

    def _answer(self, server: Any, name: str, kind: int) -> None:
        if kind == socket.SOCK_STREAM:
            connection, peer = server.accept()
            self.seen.append((name, peer[0]))
            with connection:
                connection.sendall(f"{name} {peer[0]}".encode())
        else:
            _, peer = server.recvfrom(2048)
            self.seen.append((name, peer[0]))
            server.sendto(f"{name} {peer[0]}".encode(), peer)

    def close(self) -> None:
        self._wake.close()
        self._thread.join(DEADLINE)
        for server in [*self._sockets, self._woken]:
            server.close()
        self._selector.close()


class World:
    """A host with an internet behind it, a state directory, and tenants in it that are networks only."""

    def __init__(self, directory: Path) -> None:
        self.state = State(directory)
        self.state.create()
        self.servers = Servers()
        self.outside = new_namespace()
        self.entries: dict[str, dict[str, Any]] = {}
        self._make_internet()

    def _make_internet(self) -> None:
        ip("link", "add", "up0", "type", "veth", "peer", "name", "up1")
        ip("link", "set", "up1", "netns", f"/proc/{os.getpid()}/fd/{self.outside}")
        for address in (f"{HOST4}/24", f"{HOST6}/64"):
            ip("addr", "add", address, "dev", "up0", *(["nodad"] if ":" in address else []))
        ip("link", "set", "up0", "up")
        for address in (f"{OUTSIDE4}/24", f"{OUTSIDE6}/64"):
            ip("addr", "add", address, "dev", "up1", *(["nodad"] if ":" in address else []), namespace=self.outside)
        ip("link", "set", "up1", "up", namespace=self.outside)
        for address in (ELSEWHERE4, ELSEWHERE6, METADATA4, METADATA6):
            length = 128 if ":" in address else 32
            ip("addr", "add", f"{address}/{length}", "dev", "lo", namespace=self.outside)
        ip("route", "add", "default", "via", OUTSIDE4)
        ip("-6", "route", "add", "default", "via", OUTSIDE6)
        for name, address in (
            ("outside", OUTSIDE4), ("outside", OUTSIDE6), ("elsewhere", ELSEWHERE4), ("elsewhere", ELSEWHERE6),
            ("metadata", METADATA4), ("metadata", METADATA6),
        ):  # fmt: skip
            self.servers.add(name, self.outside, address)
        gateways = [str(next(ipaddress.ip_network(block).hosts())) for block in (SUBNETS.ipv4, SUBNETS.ipv6) if block]
        for address in (HOST4, HOST6, "127.0.0.1", "::1", *gateways):
            self.servers.add("host", None, address)

    def tenant(self, name: str, **grant: Any) -> dict[str, Any]:
        """Write the entry of a tenant with that ``network:`` mapping; its network is made by :meth:`apply`."""
        wanted, problems = spec_network.parse(grant)
        assert not problems, problems
        former = self.entries.get(name)
        tid = self.state.tid(name)
        uid_base = former["uid_base"] if former else self._uid_base()
        net = network.make(self.state.identifier, tid, uid_base, wanted, SUBNETS)
        entry = {
            "tid": tid, "name": name, "version": registry.VERSION, "uid_base": uid_base,
            "uid_count": ranges.UID_COUNT, "network": "bridge", "net": net,
        }  # fmt: skip
        self.entries[name] = entry
        registry.put(self.state, entry)
        self.state.tenant_persist(tid).mkdir(parents=True, exist_ok=True)
        return entry

    def _uid_base(self) -> int:
        return ranges.FIRST + ranges.UID_COUNT * (len(self.entries) + 1 + os.getpid() % 1000)

    def apply(self, *names: str) -> None:
        """Make the networks of these tenants, or of all."""
        with Network(self.state) as net:
            for name in names or self.entries:
                net.apply(self.state.tid(name))

    def differences(self) -> dict[str, str]:
        with Network(self.state) as net:
            return net.differences()

    def member(self, name: str) -> Member:
        with Network(self.state) as net:
            return net.plan().members[self.state.tid(name)]

    @contextlib.contextmanager
    def namespace_of(self, name: str) -> Iterator[int]:
        """Give a descriptor of the tenant's network namespace."""
        descriptor = os.open(paths.namespace_pin(self.state.tid(name), "net"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def serve(self, name: str, port: int = PORT) -> None:
        """Run an echo server in the tenant's namespace, named after it."""
        with self.namespace_of(name) as namespace:
            for address in ("0.0.0.0", "::"):
                self.servers.add(name, namespace, address, port)

    def inside(self, name: str, function: Callable[[], Any], *, powers: bool = False) -> Any:
        """Return what ``function`` returns as the tenant's root; with ``powers`` as the host's root."""
        tid = self.state.tid(name)
        with self.namespace_of(name) as net:
            user = os.open(paths.namespace_pin(tid, "user"), os.O_RDONLY | os.O_CLOEXEC)
            try:
                return run_in(net, None if powers else user, function)
            finally:
                os.close(user)

    def remove(self, name: str) -> None:
        entry = self.entries.pop(name)
        registry.remove(self.state, entry["tid"])
        with Network(self.state) as net:
            net.remove(entry)
        pins.remove(entry["tid"])

    def close(self) -> None:
        self.servers.close()
        for entry in self.entries.values():
            pins.remove(entry["tid"])
        os.close(self.outside)


@contextlib.contextmanager
def fresh_host(directory: Path) -> Iterator[World]:
    """Give a host with an internet; this thread is in the host's namespace meanwhile, and back only at the end."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    syscalls.unshare(syscalls.CLONE_NEWNET)
    try:
        # A fresh namespace inherits these from the machine, which may be anything.
        Path("/proc/sys/net/ipv4/ip_forward").write_text("0")
        ip("link", "set", "lo", "up")
        world = World(directory)
        try:
            yield world
        finally:
            world.close()
    finally:
        syscalls.setns(home, syscalls.CLONE_NEWNET)
        os.close(home)


def run_in(net: int, user: int | None, function: Callable[[], Any]) -> Any:
    """Return what ``function`` returns in a child in these namespaces; its exception becomes an AssertionError."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            signal.alarm(int(DEADLINE) * 2)
            syscalls.setns(net, syscalls.CLONE_NEWNET)
            if user is not None:
                syscalls.setns(user, syscalls.CLONE_NEWUSER)
                os.setgroups([])
                os.setresgid(0, 0, 0)
                os.setresuid(0, 0, 0)
            answer = {"value": function()}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        content = file.read()
    os.waitpid(child, 0)
    answer = json.loads(content or b'{"error": "it died"}')
    assert "error" not in answer, answer["error"]
    return answer["value"]


# Probes, for run_in: each returns what the server said, or the name of what went wrong.


def problem(error: OSError) -> str:
    return "silence" if isinstance(error, TimeoutError) else errno.errorcode.get(error.errno or 0, str(error))


def _socket(address: str, kind: int, protocol: int, device: str | None, source: str | None) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind, protocol)
    if device is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    if source is not None:
        made.bind((source, 0))
    return made


def tcp(
    address: str, port: int = PORT, *, wait: float = DEADLINE, device: str | None = None, source: str | None = None
) -> str:
    """Connect and return what the server says."""
    try:
        with _socket(address, socket.SOCK_STREAM, 0, device, source) as client:
            client.settimeout(wait)
            client.connect((address, port))
            return client.recv(2048).decode()
    except OSError as error:
        return problem(error)


def udp(
    address: str, port: int = PORT, *, wait: float = DEADLINE, device: str | None = None, source: str | None = None
) -> str:
    """Send a datagram and return the answer; sent again each second, for a datagram may be lost."""
    try:
        with _socket(address, socket.SOCK_DGRAM, 0, device, source) as client:
            client.connect((address, port))
            for _ in range(max(1, int(wait))):
                client.send(b"hello")
                client.settimeout(min(wait, 1.0))
                with contextlib.suppress(TimeoutError):
                    return client.recv(2048).decode()
            return "silence"
    except OSError as error:
        return problem(error)


def ping(
    address: str, port: int = 0, *, wait: float = DEADLINE, device: str | None = None, source: str | None = None
) -> str:
    """Send an echo request by a ping socket, which needs no capability, and return "pong"."""
    six = ":" in address
    protocol = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
    try:
        with _socket(address, socket.SOCK_DGRAM, protocol, device, source) as client:
            client.connect((address, 0))
            for number in range(max(1, int(wait))):
                client.send(struct.pack(">BBHHH", 128 if six else 8, 0, 0, 0, number) + b"hello")
                client.settimeout(min(wait, 1.0))
                with contextlib.suppress(TimeoutError):
                    return "pong" if client.recv(2048) else "nothing"
            return "silence"
    except OSError as error:
        return problem(error)


PROBES: dict[str, Callable[..., str]] = {"tcp": tcp, "udp": udp, "icmp": ping}


def sniff(namespace: int, device: str) -> socket.socket:
    """Return a socket that sees every frame of ``device`` in ``namespace``."""
    with host.namespace(namespace):
        watching = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        watching.bind((device, 0))
    watching.setblocking(False)
    return watching


def frames(watching: socket.socket, wait: float) -> Iterator[bytes]:
    """Yield the frames that come within ``wait`` seconds of each other."""
    watching.settimeout(wait)
    with contextlib.suppress(TimeoutError):
        while True:
            yield watching.recv(65535)


@contextlib.contextmanager
def frames_of(namespace: int, device: str) -> Iterator[Callable[[float], Iterator[bytes]]]:
    """Give a function that yields what came in on a device since then, until it was silent for so many seconds."""
    watching = sniff(namespace, device)
    watching.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
    try:
        yield lambda seconds: frames(watching, seconds)
    finally:
        watching.close()


def words(done: "subprocess.CompletedProcess[str]") -> Sequence[str]:
    return (done.stdout + done.stderr).split()


def open_the_door(world: World, *names: str) -> None:
    """Have these tenants send to the bridge itself, as no rule makes it for them: for controls without rules."""
    site = site_of(world)
    for name in names:
        with world.namespace_of(name) as net:
            for gateway in (site.gateway4.ip, site.gateway6.ip):
                ip("neigh", "replace", str(gateway), "lladdr", site.mac, "dev", "eth0", "nud", "permanent",
                   namespace=net)  # fmt: skip


def site_of(world: World) -> Site:
    """Return the shared part of the world's plan."""
    return plan.site(next(iter(world.entries.values()))["net"])
