"""A state directory's network: made, read back, repaired, counted and removed, tenant by tenant, under one lock.

The order of making keeps it closed at every moment: first the rules that refuse, then
the link. The file that a start looks for is written last. Each step finds out for
itself whether there is something to do, so that doing all of them again is harmless
and mends what a cut left half-made.
"""

import datetime
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from isochamber import paths
from isochamber.build import locks, registry
from isochamber.build.network import BUILDS
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import join, pins
from isochamber.net import allowance, firewall, host, links, names, plan, preflight, resolve, shaping
from isochamber.net.firewall import Facts
from isochamber.net.host import Host
from isochamber.net.plan import Member, Plan, Site
from isochamber.spec.model import Network as Grant

Say = Callable[[str], None]

_BUILD = "build"  # a file beside the pin of an install script: its entry


def _silent(_line: str) -> None:
    pass


class Network:
    """One state directory's network, looked at through one netlink socket. Close it, or use it as a context."""

    def __init__(self, state: State, say: Say = _silent) -> None:
        self._state, self._say = state, say
        self.netlink: Any = links.open_netlink()
        self._host: Host | None = None
        self._facts: dict[str, Facts] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.netlink.close()

    @property
    def host(self) -> Host:
        """What the host is like, looked at once."""
        if self._host is None:
            self._host = host.look(self.netlink)
        return self._host

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with locks.product_lock(self._state, "network", self._say):
            yield

    def plan(self, extra: Iterable[Mapping[str, Any]] = ()) -> Plan:
        """Return the plan of containers.json, and of ``extra`` entries in place of theirs or besides."""
        return plan.make(self._entries(extra).values())

    def _entries(self, extra: Iterable[Mapping[str, Any]] = ()) -> dict[str, Mapping[str, Any]]:
        return {**registry.read(self._state), **{entry["tid"]: entry for entry in extra}}

    def facts(self, member: Member) -> Facts:
        """Return what the rules of ``member`` depend on besides its grant: resolvers, addresses, bytes used."""
        if member.tid not in self._facts:
            resolvers = self.resolvers(member)
            wanted = [rule.host for rule in member.egress if rule.is_name]
            found = resolve.resolve(wanted, self.host.resolvers) if wanted else {}
            self._facts[member.tid] = Facts(resolvers, found, self._used(member).size)
        return self._facts[member.tid]

    def resolvers(self, member: Member) -> tuple[str, ...]:
        """Return the resolvers of ``member``: those it was granted, else the host's."""
        return member.dns or self.host.resolvers

    def _used(self, member: Member) -> allowance.Used:
        if member.allowance is None:
            return allowance.Used("", 0, 0)
        return allowance.read(self._state, member.tid, allowance.period(member.allowance, _now()))

    # Making.

    def apply(self, tid: str, extra: Iterable[Mapping[str, Any]] = (), *, rebuild: bool = False) -> None:
        """Make the network of one tenant, and the shared part if it is missing, or to ``rebuild``."""
        with self._locked():
            entries = self._entries(extra)
            wanted = plan.make(plan.around(entries, tid))
            member = wanted.members.get(tid)
            if member is None or wanted.site is None:
                return
            shaping.check(member.rate, member.name)
            links.check_collision(self.netlink, wanted.site)
            self._ensure_rules(entries, wanted, member, rebuild=rebuild)
            links.ensure_bridge(self.netlink, wanted.site, self.host)
            for peer in member.peers:
                if os.path.exists(paths.network_file(peer.tid, "hosts")):  # noqa: PTH110 - names are texts here
                    self._write_names(wanted.members[peer.tid])
            self._ensure_routing(entries, wanted.site)
            self._ensure_member(wanted.site, member)

    def _ensure_rules(
        self, entries: Mapping[str, Mapping[str, Any]], wanted: Plan, member: Member, *, rebuild: bool
    ) -> None:
        """Put in a tenant's rules and its peers'; where that fails (a flush, somebody's hand), all of them."""
        site = wanted.site
        if site is None:
            return
        known = links.find(self.netlink, member.port) is not None
        if not rebuild and (not known or firewall.shared_is_there(site)):
            try:
                firewall.put(site, member, self.facts(member), known=known)
                for peer in member.peers:
                    firewall.put(site, wanted.members[peer.tid], self.facts(wanted.members[peer.tid]))
                return
            except IsochamberError:
                pass  # the next line says what is still wrong
        everyone = plan.make([*self._builds(site), *entries.values()])
        firewall.rebuild(everyone, self._forwarding_is_new(site), self.facts)

    def _forwarding_is_new(self, site: Site) -> list[str]:
        """Return the interfaces between which this host forwarded nothing so far: forwarding is all or nothing."""
        if host.read_sysctl("net/ipv4/ip_forward") == "1":
            return []
        return [name for name in links.read(self.netlink) if name not in ("lo", site.bridge)]

    def _ensure_routing(self, entries: Mapping[str, Mapping[str, Any]], site: Site) -> None:
        """Switch forwarding on, and on the bridge routing to 127.0.0.1 only while a port is published there."""
        host.write_sysctl("net/ipv4/ip_forward", "1")
        if self.host.ipv6 and host.read_sysctl("net/ipv6/conf/all/forwarding") != "1":
            host.keep_router_advertisements()
            host.write_sysctl("net/ipv6/conf/all/forwarding", "1")
        granted = [entry["net"] for entry in entries.values() if entry.get("net") is not None]
        loopback = any((port[0] or "").startswith("127.") for net in granted for port in net["ports"])
        host.write_sysctl(f"net/ipv4/conf/{site.bridge}/route_localnet", "1" if loopback else "0")

    def _ensure_member(self, site: Site, member: Member) -> None:
        user, net = pins.ensure(member.tid, member.uid_base, member.uid_count)
        try:
            self._write_names(member)
            made = links.ensure_port(self.netlink, site, member, net, self.host)
            if made:
                shaping.ensure(self.netlink, member, net)
                links.finish_port(self.netlink, member)
            names.write(member.tid, "network", join.stamp(member.digest, net).decode())
        except OSError as error:
            raise IsochamberError.from_os(error, stage="net", tenant=member.name) from error
        finally:
            os.close(user)
            os.close(net)

    def _write_names(self, member: Member) -> None:
        facts = self.facts(member)
        names.write(member.tid, "resolv.conf", names.resolv_conf(facts.resolvers))
        names.write(member.tid, "hosts", names.hosts(member, facts.names, ipv6=self.host.ipv6))

    def repair(self) -> list[str]:
        """Make everything as planned again, and remove what no tenant has; returns the names that needed it."""
        with self._locked():
            wanted = self.plan()
            if wanted.site is None:
                return []
            wrong = self._wrong(wanted)
            if wrong:
                # What was made by hand in our tables or on our bridge goes with it.
                links.check_collision(self.netlink, wanted.site)
                everyone = self.plan(self._builds(wanted.site))
                firewall.rebuild(everyone, self._forwarding_is_new(wanted.site), self.facts)
                links.ensure_bridge(self.netlink, wanted.site, self.host)
                self._ensure_routing(self._entries(), wanted.site)
                for member in wanted.members.values():
                    if member.tid in wrong or "" in wrong:
                        self._ensure_member(wanted.site, member)
                self._remove_strays(wanted, wanted.site)
            return [wanted.members[tid].name if tid in wanted.members else "the shared part" for tid in wrong]

    def _remove_strays(self, wanted: Plan, site: Site) -> None:
        ours = {member.port for member in wanted.members.values()}
        for name in links.read(self.netlink):
            if _is_a_tenants(site, name) and name not in ours:
                links.remove_port(self.netlink, site, name)

    # Install scripts, which no entry of containers.json names.

    @contextmanager
    def held(self, entry: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
        """Have a network for an install script in the block, which gets the resolvers; raises IsochamberError."""
        tid = entry["tid"]
        preflight.check("", Grant(mode="bridge"))
        # Who removes the network of a run that was killed is waited for.
        with locks.product_lock(self._state, f"network-{tid}", self._say):
            try:
                self.apply(tid, [entry])
                names.write(tid, _BUILD, json.dumps(entry))
                yield self.host.resolvers
            finally:
                self.remove(entry)
                pins.remove(tid)

    def _builds(self, site: Site) -> list[Mapping[str, Any]]:
        """Return the entries of install scripts that run now: what is rebuilt keeps theirs."""
        running = []
        for path in Path(paths.run_directory(), "ns").glob(f"*/{_BUILD}"):
            with suppress(OSError, ValueError):
                entry = json.loads(path.read_text())
                if entry["net"]["bridge"] == site.bridge and links.find(self.netlink, entry["net"]["port"]) is not None:
                    running.append(entry)
        return running

    # Looking.

    def differences(self) -> dict[str, str]:
        """Return what is not as planned: tenant name, or "" for the shared part -> one line."""
        wanted = self.plan()
        wrong = self._wrong(wanted)
        return {wanted.members[tid].name if tid in wanted.members else tid: what for tid, what in wrong.items()}

    def _wrong(self, wanted: Plan) -> dict[str, str]:
        """Return tid, or "" for the shared part -> what is not as planned."""
        site = wanted.site
        if site is None:
            return {}
        found = firewall.differences(wanted, self.facts)
        devices = links.read(self.netlink)
        for name in devices:
            if _is_a_tenants(site, name) and name not in {member.port for member in wanted.members.values()}:
                found.setdefault("", f"{name} belongs to no tenant")
        bridge = devices.get(site.bridge)
        if bridge is None or not bridge.up or bridge.mac != site.mac:
            found.setdefault("", f"the bridge {site.bridge} is not as planned")
        elif host.read_sysctl("net/ipv4/ip_forward") != "1":
            found.setdefault("", "IPv4 forwarding is off (net.ipv4.ip_forward)")
        for member in wanted.members.values():
            what = self._wrong_link(site, member, devices, 0 if bridge is None else bridge.index)
            if what is not None:
                found.setdefault(member.tid, what)
        return found

    def _wrong_link(self, site: Site, member: Member, devices: Mapping[str, links.Link], bridge: int) -> str | None:
        link = devices.get(member.port)
        if link is None:
            return f"its link {member.port} is gone"
        if link.alias != member.digest or not link.up or link.master != bridge:
            return f"its link {member.port} is not as planned"
        try:
            net = os.open(paths.namespace_pin(member.tid, "net"), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return "its network namespace is not pinned"
        try:
            if not join.is_ready(member.tid, member.digest, net):
                return "its network namespace is another one"
            return (
                None if links.inside_matches(site, member, net, self.host) else "its end of the link is not as planned"
            )
        except OSError:
            return "its network namespace is no namespace"
        finally:
            os.close(net)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row a tenant that has a network: what it is granted, what it has used, what state it is in."""
        wanted = self.plan()
        wrong = self._wrong(wanted)
        counted = {} if wanted.site is None else firewall.quotas(wanted.site)
        return [
            {
                "name": member.name,
                "tid": member.tid,
                "ipv4": str(member.ipv4),
                "ipv6": str(member.ipv6),
                "ports": " ".join(f"{port.host}:{port.inside}/{port.protocol}" for port in member.ports) or "-",
                "egress": _egress(member),
                "rate": _rate(member),
                "bytes": counted.get(member.number, 0),
                "allowance": None if member.allowance is None else member.allowance.size,
                "state": wrong.get(member.tid) or wrong.get("") or "in force",
            }
            for member in sorted(wanted.members.values(), key=lambda member: member.name)
        ]

    def show(self, tenant: str) -> dict[str, Any]:
        """Return what is in force for ``tenant`` (name or tid), read back; raises IsochamberError without one."""
        rows = [row for row in self.rows() if tenant in (row["name"], row["tid"])]
        wanted = self.plan()
        if not rows or wanted.site is None:
            hint = "its network: in tenants.yaml is none or host, or it is not configured"
            raise IsochamberError("has no network of its own", stage="net", tenant=tenant, hint=hint)
        member = wanted.members[rows[0]["tid"]]
        link = links.find(self.netlink, member.port)
        rate = None if link is None else shaping.read(self.netlink, link.index)
        return {
            **rows[0],
            "bridge": wanted.site.bridge,
            "link": f"{member.port} {'is gone' if link is None else 'up' if link.up else 'down'}",
            "down now": "unshaped" if rate is None else f"{rate} bit/s",
            "queue": "-" if member.rate is None else shaping.queue_of(member.rate),
            "resolvers": list(self.resolvers(member)),
            "peers": [peer.name for peer in member.peers],
            "rules": firewall.show(wanted.site, member),
        }

    # Counting.

    def account(self) -> list[str]:
        """Write down what was used, begin new periods, resolve granted names anew; returns warnings.

        Rules that somebody flushed are put in again: without them no tenant reaches anything.
        """
        said: list[str] = []
        with self._locked():
            wanted = self.plan()
            if wanted.site is None:
                return said
            if links.find(self.netlink, wanted.site.bridge) and not firewall.shared_is_there(wanted.site):
                firewall.rebuild(wanted, self._forwarding_is_new(wanted.site), self.facts)
                said.append("net: the nftables tables were gone, and are there again")
            counted = firewall.quotas(wanted.site)
            for member in wanted.members.values():
                if member.allowance is not None and member.number in counted:
                    warning = self._account(wanted.site, member, counted[member.number])
                    said += [f"{member.name}: {warning}"] if warning else []
                if any(rule.is_name for rule in member.egress) and member.number in counted:
                    firewall.grant_names(wanted.site, member, self.facts(member))
                    self._write_names(member)
        return said

    def _account(self, site: Site, member: Member, counted: int) -> str | None:
        assert member.allowance is not None  # noqa: S101 - the caller asked
        current = allowance.period(member.allowance, _now())
        if allowance.is_of_another_period(self._state, member.tid, current):
            firewall.set_used(site, member, 0)
            counted = 0
        used, warning = allowance.count(member.allowance, allowance.read(self._state, member.tid, current), counted)
        allowance.write(self._state, member.tid, used)
        return warning

    # Removing.

    def remove(self, entry: Mapping[str, Any]) -> None:
        """Remove one tenant's part, and the shared one with the last; nothing there is fine. Raises IsochamberError."""
        with self._locked():
            alone = plan.make([entry])
            if alone.site is None:
                return
            member = alone.members[entry["tid"]]
            links.remove_port(self.netlink, alone.site, member.port, (str(member.ipv4), str(member.ipv6)))
            self._forget_ready(member.tid)
            others = [name for name in links.read(self.netlink) if name.startswith(alone.site.ports)]
            if others:
                firewall.remove(alone.site, member)
                for other in self.plan().members.values():
                    if other.name in entry["net"]["peers"] and other.port in others:
                        firewall.put(alone.site, other, self.facts(other))
                        self._write_names(other)
            else:
                links.remove_bridge(self.netlink, alone.site.bridge)
                firewall.remove_all(alone.site)

    def _forget_ready(self, tid: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(paths.network_file(tid, "network"))  # noqa: PTH108 - names are texts here


def _is_a_tenants(site: Site, device: str) -> bool:
    """Say whether a device is a port of a tenant; those of install scripts come and go with these."""
    number = device.removeprefix(site.ports)
    return number != device and not (number.isdecimal() and int(number) >= BUILDS)


def _egress(member: Member) -> str:
    if member.egress_all:
        return "all"
    return " ".join(["dns"] * member.egress_dns + [rule.host for rule in member.egress]) or "none"


def _rate(member: Member) -> str:
    if member.rate is None:
        return "-"
    return " ".join(
        f"{name} {rate // 1000}k" for name, rate in (("up", member.rate.up), ("down", member.rate.down)) if rate
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
