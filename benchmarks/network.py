"""Tenants' networks, measured: time to make them, rates, throughput, and what a start pays.

    .venv/bin/python -m benchmarks.network [--quick] [--json FILE] [--write] [--only PART ...]

Everything happens in network namespaces that it makes; the host's network is not
touched. Compare only figures of one run: they depend on the machine.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("ISOCHAMBER_RUN", tempfile.mkdtemp(prefix="isochamber-bench-", dir="/run"))

from benchmarks import harness, peers
from benchmarks.world import World
from isochamber.launch import pins
from isochamber.net import host
from isochamber.net.network import Network
from tests.launch.tenants import Tenant
from tests.net import world as w

_MARKS = ("<!-- network: begin -->", "<!-- network: end -->")
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


def making(*sizes: int) -> Iterator[Row]:
    """Yield the time a tenant of so many: made, done again, repaired; and of one more."""
    adding, again_at = {}, {}
    for size in sizes:
        with fresh() as world:
            for number in range(size):
                world.tenant(f"t{number}", egress=["10.0.0.0/8:5432/tcp", "dns"], ports=[f"{10000 + number}:80"])
            tids = [entry["tid"] for entry in world.entries.values()]
            with Network(world.state) as net:
                whole = timed(net.repair)
                again = again_at[size] = timed(partial(_apply_all, net, tids[:20])) / len(tids[:20])
                checked = timed(net.differences)
                adding[size] = statistics.median(_add(world, net, number) for number in range(9))
                w.nft("flush", "ruleset")
                repaired = timed(net.repair)
            yield {"row": f"{size} networks made at once, a tenant", "ms": whole / size}
            yield {"row": f"of {size}: made again, nothing to do, a tenant", "ms": again}
            yield {"row": f"of {size}: check of all, a tenant", "ms": checked / size}
            yield {"row": f"of {size}: repair after a flush of nftables, a tenant", "ms": repaired / size}
            yield {"row": f"one more added to {size}", "ms": adding[size]}
    few, count = sizes[0], sizes[-1]
    yield {"row": f"adding to {count} over adding to {few} (at most 1.5)", "factor": adding[count] / adding[few]}
    yield {"row": f"nothing to do of {count} over of {few}", "factor": again_at[count] / again_at[few]}


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


def client(address: str, seconds: float, *, down: bool, port: int = 5201, omit: float = 2) -> float:
    """Return bits a second of payload, as the receiver counts them, the first seconds left out."""
    words = ["iperf3", "-c", address, "-t", str(seconds), "-O", str(omit), "-J", "-p", str(port)]
    words += ["-R"] if down else []
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


_BRIDGED, _ROUTED = "veth and bridge by hand, not routed", "veth and bridge by hand, routed and masqueraded"


Way = tuple[int, int, str]  # namespace to send from, to receive in, its address


def throughput(seconds: float, rounds: int) -> Iterator[Row]:
    """Yield throughput without a rate, beside two that are made by hand, from a namespace to one that is "outside".

    Ours: tenant, veth, bridge, routed by the host (rules, tracking, masquerade), veth, outside.
    Not routed: the same two veths on one bridge, in a host of their own without any rule.
    Routed: as ours, in a host of its own with one rule, masquerade.
    Short turns, taken in turn; ratios round by round, as the machine's speed drifts.
    """
    short = partial(client, seconds=seconds, omit=0.3)
    with contextlib.ExitStack() as stack:
        bridged = stack.enter_context(_by_hand())
        routed = stack.enter_context(_by_hand(routed=True))
        world = stack.enter_context(fresh(a={"egress": "all"}))
        inside = stack.enter_context(world.namespace_of("a"))
        ways = {"ours": (inside, world.outside, w.OUTSIDE4), _BRIDGED: bridged, _ROUTED: routed}
        for _, outside, address in ways.values():
            stack.enter_context(iperf(outside, address))
        for down in (False, True):
            got: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, (namespace, _, address) in ways.items():
                    got[name].append(w.run_in(namespace, None, partial(short, address, down=down)))
            yield from _compared("down" if down else "up", got)


def _compared(way: str, got: dict[str, list[float]]) -> Iterator[Row]:
    for name, values in got.items():
        yield {"row": f"unshaped {way}: {name}", "gbit/s": statistics.median(values) / 1e9}
    for name, goal in ((_BRIDGED, " (at least 90)"), (_ROUTED, "")):
        ratios = [mine * 100 / theirs for mine, theirs in zip(got["ours"], got[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        yield {"row": f"unshaped {way}: ours over {name}, median{goal}", "percent": middle, "lower": low, "upper": high}


@contextlib.contextmanager
def _by_hand(*, routed: bool = False) -> Iterator[Way]:
    """Give a way through a host of its own: a plain bridge, with both ends on it or one of them ``routed``."""
    inside, outside, machine = w.new_namespace(), w.new_namespace(), w.new_namespace()
    with host.namespace(machine):
        w.ip("link", "add", "plain", "type", "bridge")
        w.ip("link", "set", "plain", "up")
        for name, namespace in (("one", inside), ("two", outside)):
            w.ip("link", "add", name, "type", "veth", "peer", "name", "inner", "netns",
                 f"/proc/{os.getpid()}/fd/{namespace}")  # fmt: skip
            w.ip("link", "set", name, "up", *([] if routed and name == "two" else ["master", "plain"]))
        if routed:
            w.ip("addr", "add", "10.78.0.1/24", "dev", "plain")
            w.ip("addr", "add", "192.0.2.1/24", "dev", "two")
            host.write_sysctl("net/ipv4/ip_forward", "1")
            w.nft("add", "table", "ip", "plain")
            w.nft("add", "chain", "ip", "plain", "out", "{ type nat hook postrouting priority srcnat; }")
            w.nft("add", "rule", "ip", "plain", "out", "ip", "saddr", "10.78.0.0/24", "masquerade")
    for namespace, address in ((inside, "10.78.0.2/24" if routed else "192.0.2.1/24"), (outside, "192.0.2.2/24")):
        w.ip("addr", "add", address, "dev", "inner", namespace=namespace)
        w.ip("link", "set", "inner", "up", namespace=namespace)
    if routed:
        w.ip("route", "add", "default", "via", "10.78.0.1", namespace=inside)
    yield inside, outside, "192.0.2.2"
    for namespace in (inside, outside, machine):
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
            with _docker(Path(directory)) as docker:
                cases: dict[str, Callable[[], subprocess.CompletedProcess[str]]] = {
                    "without": lambda: without.run("/bin/true"),
                    "with": lambda: joined.run("/bin/true"),
                    **docker,
                }
                times: dict[str, list[float]] = {name: [] for name in (*cases, "unpinned")}
                for number in range(rounds):
                    for name, run in cases.items():
                        times[name].append(timed(lambda: _check(run())))  # noqa: B023
                    if number % 5 == 0:
                        pins.remove(entry["tid"])
                        times["unpinned"].append(timed(lambda: _check(joined.run("/bin/true"))))
            pins.remove(without.tid)
    middle = {name: statistics.median(values) for name, values in times.items()}
    if docker:
        yield {"row": "docker run --network none", "ms": middle[_DOCKER_NONE]}
        yield {"row": "docker run, bridged", "ms": middle[_DOCKER_BRIDGED]}
        yield {"row": "what docker's bridge adds", "ms": middle[_DOCKER_BRIDGED] - middle[_DOCKER_NONE]}
    else:
        yield {"row": "docker: its daemon does not start here"}
    yield {"row": "what ours adds, made ahead", "ms": middle["with"] - middle["without"]}
    yield {"row": "what ours adds, made first", "ms": middle["unpinned"] - middle["without"]}
    yield {"row": "start without a network", "ms": middle["without"]}
    yield {"row": "start with one, made ahead", "ms": middle["with"]}
    yield {"row": "start with one that is made first (after a reboot)", "ms": middle["unpinned"]}
    yield {
        "row": "a start with a network over one without (at most 110)",
        "percent": middle["with"] * 100 / middle["without"],
    }


_DOCKER_NONE, _DOCKER_BRIDGED = "docker none", "docker bridged"


@contextlib.contextmanager
def _docker(directory: Path) -> Iterator[dict[str, Callable[[], "subprocess.CompletedProcess[str]"]]]:
    """Give the same start by docker, without and with its bridge, over the same root; nothing where it can't run."""
    peers.install("dockerd", "iptables")
    made = World(directory, dict(os.environ))

    def case(words: tuple[str, ...], *network: str) -> Callable[[], "subprocess.CompletedProcess[str]"]:
        argv = [*words, "run", "--rm", *network, "bench", "/bin/true"]
        return lambda: subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)

    with peers.docker(made) as words:
        if not words:
            yield {}
            return
        peers.docker_image(made, words)
        yield {_DOCKER_NONE: case(words, "--network", "none"), _DOCKER_BRIDGED: case(words)}


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
            f"{value:.{1 if value >= 10 else 2}f} {unit}" for unit, value in row.items() if unit not in ("row", "part")
        )
        lines.append(f"| {row['row']} | {figures} |")
    return "\n".join(lines)


def run(only: Sequence[str] = (), *, quick: bool = False) -> dict[str, Any]:
    """Measure the parts named (none: all); returns "machine", and "rows" whose keys but the first two are units."""
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "starts": lambda: starts(5 if quick else 40),
        "making": lambda: making(*((10, 20) if quick else (10, 50, 200))),
        "rates": lambda: rates(4 if quick else 12),
        "sharing": lambda: sharing(4 if quick else 12),
        "throughput": lambda: throughput(1, 3 if quick else 15),
    }
    rows: list[Row] = []
    for name, part in parts.items():
        if not only or name in only:
            for row in part():
                rows.append({"part": name, **row})
                sys.stderr.write(f"{row}\n")
    return {"machine": {**harness.machine(), "load": os.getloadavg()[0]}, "rows": rows}


def write(report: dict[str, Any]) -> None:
    """Put the table between its marks in README.md."""
    readme = Path(__file__).with_name("README.md")
    before, _, rest = readme.read_text().partition(_MARKS[0])
    after = rest.partition(_MARKS[1])[2]
    readme.write_text(f"{before}{_MARKS[0]}\n\n{table(report['rows'])}\n\n{_MARKS[1]}{after}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs, to see that it works")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--write", action="store_true", help="write the table into README.md too")
    parser.add_argument("--only", nargs="*", default=(), help="making, rates, sharing, throughput, starts")
    options = parser.parse_args()
    report = run(options.only, quick=options.quick)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.write:
        write(report)
    sys.stdout.write(table(report["rows"]) + "\n")


if __name__ == "__main__":
    main()
