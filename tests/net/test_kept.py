"""Twice is once; what was cut off, flushed or removed is made again; deleting leaves nothing."""

import json
import os
import socket
import subprocess
from collections.abc import Callable

import pytest

from isochamber import paths
from isochamber.build import registry
from isochamber.cli import fsck
from isochamber.errors import IsochamberError
from isochamber.launch import pins
from isochamber.net import firewall, host, links, names, nfnetlink, rules
from isochamber.net.network import Network
from tests.net import world as w
from tests.net.world import World


def _kernel(world: World) -> str:
    """Return all that the kernel has for us, without counters and times."""
    links_now = json.loads(subprocess.run(["ip", "-j", "-d", "addr"], check=True, capture_output=True).stdout)
    kept = [(link["ifindex"], link["ifname"], link.get("ifalias"), link["address"]) for link in links_now]
    rules = json.loads(w.nft("-j", "list", "ruleset"))["nftables"]
    for item in rules:
        for thing in item.values():
            for key in ("handle", "used"):
                thing.pop(key, None)
    return json.dumps([sorted(kept), sorted(json.dumps(rule, sort_keys=True) for rule in rules)])


def _reaches(world: World, name: str) -> bool:
    return bool(world.inside(name, lambda: w.tcp(w.OUTSIDE4)).startswith("outside"))


@pytest.fixture
def two(world: World) -> World:
    world.tenant("a", egress="all", ports=["8080:80"], peers=["b"], rate={"up": "1gbit"}, allowance={"bytes": "1G"})
    world.tenant("b", egress=["198.51.100.0/24", "dns"], peers=["a"])
    world.apply()
    return world


@pytest.mark.guest
def test_applying_twice_changes_nothing(two: World) -> None:
    before = _kernel(two)
    two.apply()
    assert _kernel(two) == before
    with Network(two.state) as net:
        assert net.repair() == []
    assert _kernel(two) == before


def test_deleting_a_tenant_removes_all_of_it_and_the_last_one_the_rest(two: World) -> None:
    port, tid = two.member("a").port, two.entries["a"]["tid"]
    two.remove("a")
    left = _kernel(two)
    for trace in (port, port.rpartition("-")[2] + '"', str(two.entries["b"]["net"]["bridge"]) + "-x"):
        assert trace not in left
    assert not os.path.exists(paths.network_file(tid, "network"))
    assert two.differences() == {}
    assert _reaches(two, "b")
    two.remove("b")
    assert "isochamber" not in w.nft("list", "ruleset")
    assert "ic" + two.state.identifier[:7] not in _kernel(two)


def test_fsck_names_a_network_that_is_not_whole_and_repairs_it(two: World) -> None:
    assert fsck._networks(two.state) == []
    subprocess.run(["ip", "link", "del", two.member("a").port], check=True)
    (finding,) = fsck._networks(two.state)
    assert finding.line() == (
        f"network a: its link {two.member('a').port} is gone: made as planned, as isochamber net repair does"
    )
    assert fsck._networks(two.state, repair=True) == []
    assert _reaches(two, "a")


def test_a_second_apply_asks_the_kernel_only_of_what_is_the_tenants_and_starts_no_nft(
    two: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    whole = firewall._nft

    def noted(*words: str, text: str = "") -> "subprocess.CompletedProcess[str]":
        asked.append(words)
        return whole(*words, text=text)

    monkeypatch.setattr(firewall, "_nft", noted)
    two.apply()
    assert asked == []
    for element in ("via6", "hairpin4", "meter4", "published4"):
        key = {"hairpin4": "{0} . {0}", "published4": "tcp . 8080"}.get(element, "{0}")
        address = two.entries["a"]["net"]["ipv6" if element.endswith("6") else "ipv4"]
        w.nft("delete", "element", "inet", w.site_of(two).table, element, "{", key.format(address), "}")
        assert two.differences() != {}
        two.apply("a")  # which finds a single element that is missing
        assert two.differences() == {}
    assert asked != []


def test_single_questions_are_answered_as_nft_answers_them(two: World) -> None:
    site, member = w.site_of(two), two.member("a")
    with nfnetlink.Questions() as ask:
        assert ask.has_table("inet", site.table) and not ask.has_table("bridge", "nobodys")
        (comment,) = ask.comments("inet", site.table, f"out-{member.number}")
        assert f'comment "{comment}"' in w.nft("list", "chain", "inet", site.table, f"out-{member.number}")
        assert ask.comments("inet", site.table, "from_tenant") == ask.comments("inet", "nobodys", "x") == []
        assert all(ask.has_element(family, site.table, name, key) for family, name, key in rules.keys(member))
        assert not ask.has_element("inet", site.table, "out4", bytes([192, 0, 2, 1]))
        _reaches(two, "a")
        used = ask.used("inet", site.table, f"allowance-{member.number}")
        assert used and used == firewall.quotas(site)[member.number]
        assert ask.used("inet", site.table, "allowance-0") is None
        with pytest.raises(OSError, match="Invalid argument"):
            ask.has_element("inet", site.table, "out4", bytes(3))


DAMAGE: dict[str, Callable[[World], object]] = {
    "flushed nftables": lambda world: w.nft("flush", "ruleset"),
    "a deleted table": lambda world: w.nft("delete", "table", "bridge", w.site_of(world).table),
    "a flushed chain": lambda world: w.nft("flush", "chain", "inet", w.site_of(world).table, "from_tenant"),
    "a rule of somebody's": lambda world: w.nft(
        "insert", "rule", "inet", w.site_of(world).table, "from_tenant", "accept"
    ),
    "a tenant's flushed chain": lambda world: w.nft(
        "flush", "chain", "inet", w.site_of(world).table, f"out-{world.member('a').number}"
    ),
    "a removed element": lambda world: w.nft(
        "delete", "element", "inet", w.site_of(world).table, "out4", "{", str(world.member("a").ipv4), "}"
    ),
    "an element of somebody's": lambda world: w.nft(
        "add", "element", "inet", w.site_of(world).table, "hairpin4", "{", "10.9.9.9 . 10.9.9.9", "}"
    ),
    "a removed link": lambda world: w.ip("link", "del", world.member("a").port),
    "a link that is down": lambda world: w.ip("link", "set", world.member("a").port, "down"),
    "another neighbour inside": lambda world: w.open_the_door(world, "a"),
    "a removed bridge": lambda world: w.ip("link", "del", world.entries["a"]["net"]["bridge"]),
    "a link of nobody's": lambda world: w.ip(
        "link", "add", f"{world.entries['a']['net']['bridge']}-9", "type", "veth", "peer", "name", "nobodys"
    ),
    "no forwarding": lambda world: subprocess.run(["sysctl", "-q", "net.ipv4.ip_forward=0"], check=True),
    "a lost address inside": lambda world: world.inside(
        "a", lambda: subprocess.run(["ip", "addr", "flush", "dev", "eth0"], check=True).returncode, powers=True
    ),
    "a lost namespace (a reboot)": lambda world: pins.remove(world.entries["a"]["tid"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_and_repaired(two: World, damage: str) -> None:
    w.nft("add", "table", "inet", "somebodys")
    DAMAGE[damage](two)
    assert two.differences() != {}
    with Network(two.state) as net:
        assert net.repair() != []
    assert two.differences() == {}
    for name in ("a", "b"):
        assert _reaches(two, name)
    assert damage == "flushed nftables" or "somebodys" in w.nft("list", "tables")


CLOSES: dict[str, Callable[[World], object]] = {
    "a flush of all": lambda _: w.nft("flush", "ruleset"),
    "the bridge family flushed": lambda _: w.nft("flush", "ruleset", "bridge"),
    "the bridge table deleted": lambda world: w.nft("delete", "table", "bridge", w.site_of(world).table),
}


@pytest.mark.parametrize("damage", CLOSES)
def test_without_our_rules_a_tenant_that_runs_reaches_nothing_until_they_are_back(two: World, damage: str) -> None:
    two.serve("b")
    own = two.entries["a"]["net"]
    targets = {
        "host": (w.HOST4, w.HOST6, str(w.site_of(two).gateway4.ip)),
        "outside": (w.OUTSIDE4, w.OUTSIDE6),
        "b": (two.entries["b"]["net"]["ipv4"],),
    }
    w.ip("route", "add", "10.77.0.0/16", "via", w.HOST4, namespace=two.outside)  # the way back that masquerade was

    def reached() -> list[tuple[str, str, str]]:
        return [
            (name, address, kind)
            for name, addresses in targets.items()
            for address in addresses
            for kind, probe in w.PROBES.items()
            if probe(address, wait=w.SILENCE / 2) not in ("silence", "EHOSTUNREACH", "EACCES", "ENETUNREACH")
        ]

    with two.namespace_of("a") as net, host.namespace(net):
        talk = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with talk:
        talk.connect((w.OUTSIDE4, w.PORT))
        talk.settimeout(w.DEADLINE)
        talk.send(b"hello")
        assert talk.recv(2048)
        CLOSES[damage](two)
        talk.settimeout(w.SILENCE)
        talk.send(b"hello")
        with pytest.raises(TimeoutError):  # what was open is closed too
            talk.recv(2048)
    assert two.inside("a", reached) == []
    before = len(two.servers.seen)
    two.inside("a", lambda: [w.udp(at, wait=w.SILENCE / 2) for at in (w.HOST4, w.HOST6)])
    assert not [peer for _, peer in two.servers.seen[before:] if peer in (own["ipv4"], own["ipv6"])]
    w.open_the_door(two, "a")  # the control: this is what closed it
    assert _reaches(two, "a")
    with Network(two.state) as net_of:
        (said,) = net_of.account()  # as the timer calls it
        assert "were gone" in said
        assert net_of.account() == []
        assert net_of.repair() == ["a"]  # the door that was opened
    assert two.differences() == {}
    assert _reaches(two, "a")
    assert two.inside("a", lambda: w.tcp(w.HOST4, wait=w.SILENCE)) in ("EHOSTUNREACH", "EACCES", "silence")


@pytest.mark.parametrize(
    "damage", ["flushed nftables", "a removed link", "a removed bridge", "a lost namespace (a reboot)"]
)
def test_the_next_apply_of_a_tenant_repairs_it_too(two: World, damage: str) -> None:
    DAMAGE[damage](two)
    two.apply()
    assert two.differences() == {}
    assert _reaches(two, "a")


STEPS = [
    (firewall, "put"), (firewall, "rebuild"), (links, "ensure_bridge"), (links, "ensure_port"), (links, "finish_port"),
    (links, "_fill"), (names, "write"),
]  # fmt: skip


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("module", "step"), STEPS, ids=[step for _, step in STEPS])
def test_a_cut_at_any_step_is_repaired_by_the_next_apply(
    world: World, monkeypatch: pytest.MonkeyPatch, module: object, step: str, after: bool
) -> None:
    class CutError(Exception):
        """The power is gone."""

    whole = getattr(module, step)

    def cut(*words: object, **keywords: object) -> None:
        if after:
            whole(*words, **keywords)
        raise CutError

    world.tenant("a", egress="all")
    if step == "put":
        world.tenant("first")
        world.apply("first")
    with monkeypatch.context() as patch:
        patch.setattr(module, step, cut)
        with pytest.raises(CutError):
            world.apply("a")
    # No link without its rules: whatever was made, nothing passes that was not granted.
    world.apply()
    assert world.differences() == {}
    assert _reaches(world, "a")


def test_a_subnet_that_the_host_has_a_route_to_is_one_line_that_names_both(world: World) -> None:
    w.ip("route", "add", "10.77.3.0/24", "via", w.OUTSIDE4)
    world.tenant("a")
    with pytest.raises(
        IsochamberError, match=r"10\.77\.0\.0/16 collide with the host's route to 10\.77\.3\.0/24 by up0"
    ):
        world.apply()
    assert "isochamber" not in w.nft("list", "tables")


def test_the_same_name_keeps_its_addresses_through_a_lost_containers_json_and_a_reboot(two: World) -> None:
    before = two.member("a")
    entry = two.entries["a"]
    registry.remove(two.state, entry["tid"])
    pins.remove(entry["tid"])
    two.tenant("a", egress="all")
    two.apply()
    after = two.member("a")
    assert (before.ipv4, before.ipv6, before.mac, before.port) == (after.ipv4, after.ipv6, after.mac, after.port)


def test_two_hosts_interfaces_that_nobody_forwarded_between_stay_apart(world: World) -> None:
    other = w.new_namespace()
    w.ip("link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
    w.ip("link", "set", "lan1", "netns", f"/proc/{os.getpid()}/fd/{other}")
    w.ip("addr", "add", "192.0.2.1/24", "dev", "lan0")
    w.ip("link", "set", "lan0", "up")
    w.ip("addr", "add", "192.0.2.2/24", "dev", "lan1", namespace=other)
    w.ip("link", "set", "lan1", "up", namespace=other)
    w.ip("route", "add", "default", "via", "192.0.2.1", namespace=other)
    w.ip("route", "add", "192.0.2.0/24", "via", w.HOST4, namespace=world.outside)
    assert w.run_in(other, None, lambda: w.tcp(w.OUTSIDE4, wait=w.SILENCE)) in (
        "silence",
        "EHOSTUNREACH",
        "ENETUNREACH",
    )
    world.tenant("a", egress="all")
    world.apply()
    assert _reaches(world, "a")
    assert w.run_in(other, None, lambda: w.tcp(w.OUTSIDE4, wait=w.SILENCE)) == "silence"
    w.nft("flush", "set", "inet", w.site_of(world).table, "between")  # the control
    assert w.run_in(other, None, lambda: w.tcp(w.OUTSIDE4)).startswith("outside")
    os.close(other)


def test_a_grant_taken_back_ends_the_connections_it_opened_and_no_other(world: World) -> None:
    world.tenant("a", egress=[f"{w.OUTSIDE4}:{w.PORT}/udp", f"{w.ELSEWHERE4}:{w.PORT}/udp"])
    world.apply()
    with world.namespace_of("a") as net, host.namespace(net):
        talks = {address: socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for address in (w.OUTSIDE4, w.ELSEWHERE4)}
        for address, talk in talks.items():
            talk.connect((address, w.PORT))

    def answers(address: str, wait: float) -> bool:
        talks[address].settimeout(wait)
        try:
            talks[address].send(b"hello")
            return bool(talks[address].recv(2048))
        except OSError:
            return False

    assert all(answers(address, w.DEADLINE) for address in talks)
    world.tenant("a", egress=[f"{w.OUTSIDE4}:{w.PORT}/udp"])
    world.apply()
    assert answers(w.OUTSIDE4, w.DEADLINE)
    assert not answers(w.ELSEWHERE4, w.SILENCE)
    world.tenant("a", egress="all")  # the control: granted again, the same socket goes on
    world.apply()
    assert answers(w.ELSEWHERE4, w.DEADLINE) or answers(w.ELSEWHERE4, w.DEADLINE)  # the first may tell of a refusal
    for talk in talks.values():
        talk.close()


def test_one_tenant_can_not_use_up_the_hosts_connections(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "CONNECTIONS", 8)
    world.tenant("a", egress="all")
    world.tenant("b", egress="all")
    world.apply()

    def flood() -> int:
        made = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(40)]
        for one in made:
            one.connect((w.OUTSIDE4, w.PORT))
            one.send(b"hello")
        answered = 0
        for number, one in enumerate(made):
            one.settimeout(w.DEADLINE if number < 8 else w.SILENCE / 10)
            try:
                answered += bool(one.recv(2048))
            except OSError:
                continue
        return answered

    assert world.inside("a", flood) == 8
    assert world.inside("b", lambda: w.udp(w.OUTSIDE4)).startswith("outside")
    assert w.run_in(world.outside, None, lambda: w.tcp(w.HOST4)).startswith("host")


def test_a_host_without_ipv6_gives_its_tenants_none(world: World) -> None:
    subprocess.run(["sysctl", "-q", "net.ipv6.conf.all.disable_ipv6=1"], check=True)
    world.tenant("a", egress="all")
    world.apply()

    def addresses() -> str:
        return subprocess.run(["ip", "-6", "addr"], capture_output=True, text=True, check=True).stdout

    assert world.inside("a", addresses) == ""
    assert _reaches(world, "a")
    assert world.differences() == {}
