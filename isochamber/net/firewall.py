"""nftables: rule sets put in as whole transactions, read back as JSON, compared with the same text loaded elsewhere.

What a tenant's part should look like is not parsed from the text: the text is loaded
in an empty network namespace and listed there, so that both sides of the comparison
were written by the same nft.
"""

import contextlib
import hashlib
import ipaddress
import json
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from isochamber.build.network import BUILDS
from isochamber.errors import IsochamberError
from isochamber.net import host, rules
from isochamber.net.nfnetlink import Questions
from isochamber.net.plan import Member, Plan, Site

_PUBLISHED = ("published4", "published6", "published_at4", "published_at6")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a tenant's rules depend on besides its grant."""

    resolvers: tuple[str, ...]
    names: rules.Addresses
    used: int  # bytes of its allowance


def _nft(*words: str, text: str = "") -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(["nft", *words], input=text, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        raise IsochamberError("nft is not installed", stage="net", hint="apt-get install nftables") from None


def _apply(text: str, tenant: str | None = None) -> None:
    """Hand one transaction to the kernel: all of it or nothing. Raises IsochamberError with nft's first line."""
    done = _nft("-f", "-", text=text)
    if done.returncode:
        raise _refused(done.stderr, tenant)


def _refused(stderr: str, tenant: str | None) -> IsochamberError:
    lines = stderr.splitlines() or ["nft failed"]
    what = re.sub(r"^\S*stdin:[0-9:-]+ (Error: )?", "", lines[0])
    hint = "does this kernel have nftables with nat, fib, quota, connlimit and the bridge family?"
    return IsochamberError(f"nftables: {what}", stage="net", tenant=tenant, hint=hint, notes=tuple(lines[1:2]))


def _list(*commands: str) -> list[Mapping[str, Any]] | None:
    """Return what nft lists for ``commands``, or None when something named there does not exist.

    One process a command: nft 1.0 looks only at the tables that the last of several names.
    """
    found: list[Mapping[str, Any]] = []
    for command in commands:
        done = _nft("-j", f"list {command}")
        if done.returncode:
            if "No such file or directory" in done.stderr:
                return None
            raise _refused(done.stderr, None)
        found += [item for item in json.loads(done.stdout)["nftables"] if "metainfo" not in item]
    return found


def stamp(site: Site) -> str:
    """Return what tells whether the shared rules in the kernel were made from this text."""
    return hashlib.sha256(rules.shared(site, ()).encode()).hexdigest()[:16]


def _signed(site: Site, between: Iterable[str]) -> str:
    """Return the shared rules with the empty set ``signed`` named after them: who adds to them asks for it by name."""
    return rules.shared(site, between).replace("set signed {", f"set signed-by-{stamp(site)} {{")


def shared_is_there(site: Site) -> bool:
    """Say whether both tables are there, made from this version's text for this site."""
    tables = (("inet", site.table), ("bridge", site.table), ("inet", _stamp_table(site)))
    with _questions() as ask:
        return all(ask.has_table(family, name) for family, name in tables)


@contextlib.contextmanager
def _questions() -> Iterator[Questions]:
    try:
        with Questions() as ask:
            yield ask
    except OSError as error:
        raise IsochamberError.from_os(
            error, stage="net", hint="run as root; does this kernel have nftables?"
        ) from error


def _stamp_table(site: Site) -> str:
    """Return the name of an empty table that is there as long as what it was put in with."""
    return f"{site.table}-{stamp(site)}"


def rebuild(plan: Plan, between: Iterable[str], facts: Callable[[Member], Facts]) -> None:
    """Replace both tables as one transaction, with every member; counted bytes are kept. Raises IsochamberError."""
    site = plan.site
    if site is None:
        return
    used = quotas(site)
    kept = set(between) | set(_between(site))
    text = [_removal(site), _signed(site, kept), f"add table inet {_stamp_table(site)}\n"]
    for member in plan.members.values():
        fact = facts(member)
        spent = max(fact.used, used.get(member.number, 0))
        text.append(rules.add(site, member, fact.resolvers, fact.names, spent))
    _apply("".join(text))


def _removal(site: Site) -> str:
    """Return the commands that remove the tables, there or not, and what earlier versions of them were stamped with."""
    stale = [
        f"delete table inet {item['table']['name']}\n"
        for item in _list("tables") or []
        if item.get("table", {}).get("name", "").startswith(f"{site.table}-")
    ]
    return "".join(stale) + "".join(
        f"add table {family} {site.table}\ndelete table {family} {site.table}\n" for family in ("inet", "bridge")
    )


def _between(site: Site) -> list[str]:
    found = _list(f"set inet {site.table} between") or []
    return [name for item in found for name in item.get("set", {}).get("elem", ())]


def put(site: Site, member: Member, facts: Facts, *, known: bool = True) -> None:
    """Add or replace one tenant's part as one transaction, unless it is there; the shared rules must be there.

    ``known``: it was here before, maybe with other ports. Raises IsochamberError.
    """
    used = None
    with _questions() as ask:
        if known and _is_there(ask, site, member, rules.stamp(site, member, facts.resolvers)):
            return
        used = ask.used("inet", site.table, f"allowance-{member.number}") if known else None
    # nft reads the whole table for a list: who is new is spared that, so that one more costs little among many.
    # Fails where the shared rules are gone or were made from another text; then nothing at all is changed.
    text = "".join(f"flush set {family} {site.table} signed-by-{stamp(site)}\n" for family in ("inet", "bridge"))
    text += rules.drop_stale_ports(site, member, _published(site)) if known else ""
    text += rules.clear(site, member) + rules.add(
        site, member, facts.resolvers, facts.names, facts.used if used is None else used
    )
    _apply(text, member.name)


def _is_there(ask: Questions, site: Site, member: Member, stamp: str) -> bool:
    """Say whether the tenant's first chain is of this stamp, and all that leads to its chains is there."""
    return stamp in ask.comments("inet", site.table, f"out-{member.number}") and all(
        ask.has_element(family, site.table, name, key) for family, name, key in rules.keys(member)
    )


def remove(site: Site, member: Member) -> None:
    """Remove one tenant's part as one transaction; nothing there is fine. Raises IsochamberError."""
    if _list(f"table bridge {site.table}") is None:
        return
    _apply(rules.remove(site, member, _published(site)), member.name)


def remove_all(site: Site) -> None:
    """Remove both tables; nothing there is fine. Raises IsochamberError."""
    _apply(_removal(site))


def _published(site: Site) -> list[tuple[str, str, str]]:
    """Return (map, key, address) of every published port, as nft writes them in a command."""
    found = []
    for item in _list(*(f"map inet {site.table} {name}" for name in _PUBLISHED)) or []:
        for key, value in item.get("map", {}).get("elem", ()):
            parts = key["concat"] if isinstance(key, dict) else [key]
            words = " . ".join(str(part) for part in parts)
            found.append((item["map"]["name"], words, str(value["concat"][0])))
    return found


def quotas(site: Site) -> dict[str, int]:
    """Return bytes counted by tenant number; what is not there is left out."""
    found = {}
    for item in _list(f"quotas table inet {site.table}") or []:
        quota = item.get("quota")
        if quota is not None and quota["table"] == site.table:
            found[quota["name"].removeprefix("allowance-")] = int(quota.get("used", 0))
    return found


def set_used(site: Site, member: Member, used: int) -> None:
    """Say how much of its allowance a tenant has used: a new period begins. Raises IsochamberError."""
    _apply("".join(f"{line}\n" for line in rules.renew_quota(site, member, used)), member.name)


def grant_names(site: Site, member: Member, facts: Facts) -> None:
    """Write the granted destinations anew, as their names resolve now; nothing else changes. Raises IsochamberError."""
    _apply(rules.regrant(site, member, facts.resolvers, facts.names), member.name)


def show(site: Site, member: Member) -> list[str]:
    """Return a tenant's own chains and sets as nft lists them, one line each; none when they are gone."""
    names = [
        f"chain inet {site.table} {chain}-{member.number}" for chain in ("out", "via", "in", "kept", "meter", "slow")
    ]
    names += [f"set inet {site.table} granted{version}-{member.number}" for version in (4, 6)]
    lines = [line for name in names for line in _nft(f"list {name}").stdout.splitlines()[1:-1]]
    return [line.replace("\t", "    ") for line in lines if line.strip(" \t{}")]


# Reading back.


def differences(plan: Plan, facts: Callable[[Member], Facts]) -> dict[str, str]:
    """Return what in the kernel is not as the plan says: tid, or "" for the shared part -> one line."""
    site = plan.site
    if site is None:
        return {}
    listing = f"table inet {site.table}", f"table bridge {site.table}"
    found = _list(*listing)
    if found is None:
        return {"": "its nftables tables are gone"}
    text = [_signed(site, _between(site))]
    for member in plan.members.values():
        fact = facts(member)
        text.append(rules.add(site, member, fact.resolvers, fact.names, 0))
    with host.namespace(None):
        _apply("".join(text))
        wanted = _list(*listing)
    by_number = {member.number: member.tid for member in plan.members.values()}
    by_value = {
        str(value): member.tid for member in plan.members.values() for value in (member.ipv4, member.ipv6, member.port)
    }
    ours, theirs = (_parts(items or [], by_number, by_value, site) for items in (wanted, found))
    return {
        tid: "its nftables rules are not as planned"
        for tid in sorted({*ours, *theirs})
        if ours.get(tid) != theirs.get(tid)
    }


def _parts(
    items: Iterable[Mapping[str, Any]], by_number: Mapping[str, str], by_value: Mapping[str, str], site: Site
) -> dict[str, list[str]]:
    """Split a listing by tenant ("" is the shared part), without what differs from day to day."""
    parts: dict[str, list[str]] = {}

    def add(tid: str, thing: object) -> None:
        parts.setdefault(tid, []).append(json.dumps(thing, sort_keys=True))

    for item in items:
        ((kind, raw),) = item.items()
        thing = {key: value for key, value in raw.items() if key not in ("handle", "used")}
        name = thing.get("chain") if kind == "rule" else thing.get("name")
        number = str(name).rpartition("-")[2] if kind != "table" else ""
        if number.isdecimal() and int(number) >= BUILDS:
            continue  # an install script's, while it runs
        owner = by_number.get(number, "") if "-" in str(name) else ""
        elements = thing.pop("elem", []) if kind in ("set", "map") else []
        if thing.get("name") in rules.COUNTED:
            elements = []  # the kernel's own, as connections come and go
        add(owner, [kind, thing])
        for element in elements:
            plain = _without_times(element)
            if _is_of_a_build(plain, site):
                continue
            holder = owner or _owner_of(plain, by_value)
            add(holder, [kind, thing["name"], plain])
    return {tid: sorted(lines) if tid else _in_order(lines) for tid, lines in parts.items()}


def _is_of_a_build(element: Any, site: Site) -> bool:
    """Say whether an element of a shared set is an install script's: by the address in it."""
    if isinstance(element, str):
        try:
            address = ipaddress.ip_address(element)
        except ValueError:
            return False
        block = site.gateway4.network if address.version == 4 else site.gateway6.network
        return address in block and int(address) - int(block.network_address) >= BUILDS
    values = element.get("concat", ()) if isinstance(element, dict) else element
    return any(_is_of_a_build(value, site) for value in values) if isinstance(values, list) else False


def _in_order(lines: list[str]) -> list[str]:
    """Order what has no order (sets and elements) and keep that of the rules."""
    return sorted(line for line in lines if not line.startswith('["rule"')) + [
        line for line in lines if line.startswith('["rule"')
    ]


def _without_times(element: Any) -> Any:
    if isinstance(element, dict) and "elem" in element:
        return element["elem"]["val"]
    return element


def _owner_of(element: Any, by_value: Mapping[str, str]) -> str:
    """Return whose an element of a shared set is, by the address or the port in it."""
    if isinstance(element, str):
        return by_value.get(element, "")
    values = element.get("concat", ()) if isinstance(element, dict) else element
    for value in values if isinstance(values, list) else ():
        found = _owner_of(value, by_value)
        if found:
            return found
    return ""
