"""Tenants' networks, measured: time to make them, rates, throughput, and what a start pays.

    .venv/bin/python -m benchmarks.network [--quick] [--json FILE]

Everything happens in network namespaces that it makes; the host's network is not
touched. Compare only figures of one run: they depend on the machine.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("ISOCHAMBER_RUN", tempfile.mkdtemp(prefix="isochamber-bench-", dir="/run"))

from isochamber.launch import pins
from isochamber.net import host
from isochamber.net.network import Network
from tests.launch.tenants import Tenant
from tests.net import world as w

RATES = (256_000, 2_000_000, 10_000_000, 100_000_000, 400_000_000)

Row = dict[str, Any]


def timed(function: Callable[[], object]) -> float:
    """Return milliseconds."""
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1000


@contextlib.contextmanager
def fresh(**grants: dict[str, Any]) -> Iterator[w.World]:
    """Give a host with these tenants, their networks made."""
    with tempfile.TemporaryDirectory() as directory, w.fresh_host(Path(directory) / "state") as world:
        for name, grant in grants.items():
            world.tenant(name, **grant)
        world.apply()
        yield world


# How long making takes.


def _apply_all(net: Network, tids: list[str]) -> None:
    for tid in tids:
        net.apply(tid)


def making(count: int, few: int) -> Iterator[Row]:
    """Yield the time a tenant of ``count``: made, done again, repaired; and of one more."""
    adding = {}
    for size in (few, count):
        with fresh() as world:
            for number in range(size):
                world.tenant(f"t{number}", egress=["10.0.0.0/8:5432/tcp", "dns"], ports=[f"{10000 + number}:80"])
            tids = [entry["tid"] for entry in world.entries.values()]
            with Network(world.state) as net:
                whole = timed(net.repair)
                again = timed(partial(_apply_all, net, tids[:20]))
                checked = timed(net.differences)
                adding[size] = statistics.median(_add(world, net, number) for number in range(9))
                w.nft("flush", "ruleset")
                repaired = timed(net.repair)
            yield {"row": f"{size} networks made at once, a tenant", "ms": whole / size}
            yield {"row": f"of {size}: made again, nothing to do, a tenant", "ms": again / len(tids[:20])}
            yield {"row": f"of {size}: check of all, a tenant", "ms": checked / size}
            yield {"row": f"of {size}: repair after a flush of nftables, a tenant", "ms": repaired / size}
            yield {"row": f"one more added to {size}", "ms": adding[size]}
    yield {"row": f"adding to {count} over adding to {few} (at most 1.5)", "factor": adding[count] / adding[few]}


def _add(world: w.World, net: Network, number: int) -> float:
    entry = world.tenant(f"added{number}", egress="all")
    return timed(lambda: net.apply(entry["tid"]))


# What passes.


@contextlib.contextmanager
def iperf(namespace: int, address: str, port: int = 5201) -> Iterator[None]:
    """Serve iperf3 there."""
    with host.namespace(namespace):
        words = ["iperf3", "-s", "--forceflush", "-B", address, "-p", str(port)]
        server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    with server:
        next(line for line in server.stdout or () if "listening" in line)
        yield
        server.kill()


def client(address: str, seconds: int, *, down: bool, port: int = 5201) -> float:
    """Return bits a second of payload, as the receiver counts them, the first two seconds left out."""
    words = ["iperf3", "-c", address, "-t", str(seconds), "-O", "2", "-J", "-p", str(port), *(["-R"] if down else [])]
    report = json.loads(subprocess.run(words, capture_output=True, text=True, check=False, timeout=300).stdout)
    return float(report["end"]["sum_received"]["bits_per_second"])


def rates(seconds: int) -> Iterator[Row]:
    """Yield what comes through of each rate, each way; payload, so headers (4.5 %) are missing from it."""
    for rate in RATES:
        text = f"{rate // 1000}kbit"
        with fresh(a={"egress": "all", "rate": {"up": text, "down": text}}) as world, iperf(world.outside, w.OUTSIDE4):
            for down in (False, True):
                got = world.inside("a", lambda: client(w.OUTSIDE4, seconds, down=down))  # noqa: B023
                yield {
                    "row": f"rate {text} {'down' if down else 'up'}: of it, payload",
                    "percent": got * 100 / rate, "with headers": got * 100 / rate * 1514 / 1448,
                }  # fmt: skip


def sharing(seconds: int) -> Iterator[Row]:
    """Yield how two tenants with the same rate, busy at once, come off."""
    grant = {"egress": "all", "rate": {"up": "10mbit", "down": "10mbit"}}
    with fresh(a=grant, b=grant) as world, iperf(world.outside, w.OUTSIDE4), iperf(world.outside, w.OUTSIDE4, 5202):
        for down in (False, True):
            got = _both(world, seconds, down=down)
            yield {"row": f"two tenants at once {'down' if down else 'up'}: the lesser over the greater",
                   "percent": min(got) * 100 / max(got)}  # fmt: skip


def _both(world: w.World, seconds: int, *, down: bool) -> list[float]:
    got: dict[str, float] = {}

    def run(name: str, port: int) -> None:
        got[name] = world.inside(name, lambda: client(w.OUTSIDE4, seconds, down=down, port=port))

    threads = [threading.Thread(target=run, args=(name, port)) for name, port in (("a", 5201), ("b", 5202))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return list(got.values())


def throughput(seconds: int, rounds: int) -> Iterator[Row]:
    """Yield throughput without a rate, beside veth pairs on a bridge made by hand; taken in turn, medians."""
    ours: dict[bool, list[float]] = {False: [], True: []}
    plain: dict[bool, list[float]] = {False: [], True: []}
    routed: dict[bool, list[float]] = {False: [], True: []}
    with (
        fresh(a={"egress": "all"}) as world, _by_hand() as (inside, outside), _by_hand_routed(world) as third,
        iperf(world.outside, w.OUTSIDE4), iperf(outside, "192.0.2.2"),
    ):  # fmt: skip
        for down in (False, True) * rounds:
            ours[down].append(world.inside("a", partial(client, w.OUTSIDE4, seconds, down=down)))
            plain[down].append(w.run_in(inside, None, partial(client, "192.0.2.2", seconds, down=down)))
            routed[down].append(w.run_in(third, None, partial(client, w.OUTSIDE4, seconds, down=down)))
    for down in (False, True):
        way = "down" if down else "up"
        mine, theirs, middle = (statistics.median(values[down]) for values in (ours, plain, routed))
        yield {"row": f"unshaped {way}: ours", "gbit/s": mine / 1e9}
        yield {"row": f"unshaped {way}: veth and bridge by hand, not routed", "gbit/s": theirs / 1e9}
        yield {"row": f"unshaped {way}: veth and bridge by hand, routed and masqueraded", "gbit/s": middle / 1e9}
        yield {"row": f"unshaped {way}: ours over bridged by hand (at least 90)", "percent": mine * 100 / theirs}
        yield {"row": f"unshaped {way}: ours over routed by hand", "percent": mine * 100 / middle}


@contextlib.contextmanager
def _by_hand() -> Iterator[tuple[int, int]]:
    """Give two namespaces on one plain bridge, as ip(8) makes them."""
    namespaces = (w.new_namespace(), w.new_namespace())
    w.ip("link", "add", "plain", "type", "bridge")
    w.ip("link", "set", "plain", "up")
    for number, namespace in enumerate(namespaces, 1):
        w.ip("link", "add", f"plain{number}", "type", "veth", "peer", "name", "inner", "netns",
             f"/proc/{os.getpid()}/fd/{namespace}")  # fmt: skip
        w.ip("link", "set", f"plain{number}", "master", "plain", "up")
        w.ip("addr", "add", f"192.0.2.{number}/24", "dev", "inner", namespace=namespace)
        w.ip("link", "set", "inner", "up", namespace=namespace)
    yield namespaces[0], namespaces[1]
    for namespace in namespaces:
        os.close(namespace)


@contextlib.contextmanager
def _by_hand_routed(world: w.World) -> Iterator[int]:
    """Give a namespace on a plain bridge that the host routes and masquerades, with one rule."""
    namespace = w.new_namespace()
    w.ip("link", "add", "routed", "type", "bridge")
    w.ip(
        "link",
        "add",
        "routed1",
        "type",
        "veth",
        "peer",
        "name",
        "inner",
        "netns",
        f"/proc/{os.getpid()}/fd/{namespace}",
    )
    w.ip("link", "set", "routed1", "master", "routed", "up")
    w.ip("addr", "add", "10.78.0.1/24", "dev", "routed")
    w.ip("link", "set", "routed", "up")
    w.ip("addr", "add", "10.78.0.2/24", "dev", "inner", namespace=namespace)
    w.ip("link", "set", "inner", "up", namespace=namespace)
    w.ip("route", "add", "default", "via", "10.78.0.1", namespace=namespace)
    w.nft("add", "table", "ip", "plain")
    w.nft("add", "chain", "ip", "plain", "out", "{ type nat hook postrouting priority srcnat; }")
    w.nft("add", "rule", "ip", "plain", "out", "ip", "saddr", "10.78.0.0/24", "masquerade")
    # What did not forward before us stays apart; this one is to be compared with, so it is let through.
    w.nft("flush", "set", "inet", w.site_of(world).table, "between")
    yield namespace
    os.close(namespace)


# What a start pays.


def starts(rounds: int) -> Iterator[Row]:
    """Yield the time of a whole start of /bin/true, without a network, with one, and with one to be made first."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        root = Path(directory) / "state"
        base = _base(root, Path(directory))
        with w.fresh_host(root) as world:
            without, joined = Tenant(root, base, 1), Tenant(root, base, 2)
            entry = world.tenant("joined", egress="all")
            net = {**entry["net"]}
            joined.change(name="joined", tid=entry["tid"], network="bridge", net=net, uid_base=entry["uid_base"])
            for path in (joined.upper, joined.directory / "workdir"):
                os.chown(path, entry["uid_base"], entry["uid_base"])
            joined.name = "joined"
            world.apply()
            times: dict[str, list[float]] = {"without": [], "with": [], "unpinned": []}
            for _ in range(rounds):
                for name, tenant in (("without", without), ("with", joined)):
                    times[name].append(timed(lambda: _check(tenant.run("/bin/true"))))  # noqa: B023
            for _ in range(max(3, rounds // 5)):
                pins.remove(entry["tid"])
                times["unpinned"].append(timed(lambda: _check(joined.run("/bin/true"))))
            pins.remove(without.tid)
    middle = {name: statistics.median(values) for name, values in times.items()}
    yield {"row": "start without a network", "ms": middle["without"]}
    yield {"row": "start with one, made ahead", "ms": middle["with"]}
    yield {"row": "start with one that is made first (after a reboot)", "ms": middle["unpinned"]}
    yield {
        "row": "a start with a network over one without (at most 110)",
        "percent": middle["with"] * 100 / middle["without"],
    }


def _check(done: "subprocess.CompletedProcess[str]") -> None:
    if done.returncode:
        raise SystemExit(done.stderr)


def _base(root: Path, directory: Path) -> str:
    tenants = directory / "tenants.yaml"
    tenants.write_text(f"root: {root}\nbases:\n  default: {{packages: []}}\ntenants: {{}}\n")
    environment = {**os.environ, "ISOCHAMBER_TENANTS": str(tenants)}
    words = [sys.executable, "-m", "isochamber.tasks", "base_fs:default"]
    _check(subprocess.run(words, env=environment, capture_output=True, text=True, check=False))
    (product,) = (root / "base_fs").iterdir()
    return f"base_fs/{product.name}/rootfs"


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    lines = ["| what | figure |", "| --- | --- |"]
    for row in rows:
        figures = ", ".join(
            f"{value:.{1 if value >= 10 else 2}f} {unit}" for unit, value in row.items() if unit != "row"
        )
        lines.append(f"| {row['row']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs, to see that it works")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--only", nargs="*", help="making, rates, sharing, throughput, starts")
    options = parser.parse_args()
    quick = options.quick
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "starts": lambda: starts(5 if quick else 40),
        "making": lambda: making(20 if quick else 200, 10),
        "rates": lambda: rates(4 if quick else 12),
        "sharing": lambda: sharing(4 if quick else 12),
        "throughput": lambda: throughput(3 if quick else 5, 1 if quick else 5),
    }
    rows: list[Row] = []
    for name, part in parts.items():
        if not options.only or name in options.only:
            for row in part():
                rows.append({"part": name, **row})
                sys.stderr.write(f"{row}\n")
    machine = {"kernel": platform.release(), "cores": os.cpu_count(), "python": platform.python_version(),
               "load": os.getloadavg()[0]}  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    sys.stdout.write(table([{key: value for key, value in row.items() if key != "part"} for row in rows]) + "\n")


if __name__ == "__main__":
    main()
