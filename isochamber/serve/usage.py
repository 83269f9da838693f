"""What tenants use: from their cgroup where there is one that counts, else from /proc. A few reads a tenant."""

from __future__ import annotations

import os
from typing import Any

from isochamber.serve.unit import Unit

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _read(path: str) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(descriptor, 65536)
        finally:
            os.close(descriptor)
    except OSError:
        return None


def _number(path: str) -> int | None:
    found = _read(path)
    return int(found) if found is not None and found.strip().isdigit() else None


def _pairs(found: bytes | None) -> dict[str, int]:
    """Return "key value" lines as numbers."""
    pairs = {}
    for line in (found or b"").splitlines():
        key, _, value = line.partition(b" ")
        if value.strip().isdigit():
            pairs[key.decode()] = int(value)
    return pairs


def processes(group: str | None, pid: int) -> list[int]:
    """Return the processes of a tenant, as the host counts."""
    found = None if group is None else _read(f"{group}/cgroup.procs")
    return [pid] if found is None else [int(word) for word in found.split()]


def _cpu_of(pids: list[int]) -> int:
    ticks = 0
    for pid in pids:
        stat = _read(f"/proc/{pid}/stat")
        if stat is not None:
            fields = stat.rpartition(b")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks * 1_000_000 // _TICKS


def _resident(pids: list[int]) -> int:
    pages = 0
    for pid in pids:
        found = _read(f"/proc/{pid}/statm")
        if found is not None:
            pages += int(found.split()[1])
    return pages * _PAGE


def network(pid: int) -> tuple[int, int]:
    """Return (received, sent) bytes of a tenant's own network, loopback left out."""
    received = sent = 0
    for line in (_read(f"/proc/{pid}/net/dev") or b"").splitlines()[2:]:
        name, _, rest = line.partition(b":")
        fields = rest.split()
        if name.strip() != b"lo" and len(fields) >= 9:
            received += int(fields[0])
            sent += int(fields[8])
    return received, sent


def _memory(held: dict[str, Any]) -> tuple[int | None, int | None, dict[str, int]]:
    """Return memory in use, its limit, and what happened at the limit: of the controller where it is mounted."""
    v1, group = held["cgroups"].get("memory"), held["cgroup"]
    if v1:
        events = _pairs(_read(f"{v1}/memory.oom_control"))
        events["max"] = _number(f"{v1}/memory.failcnt") or 0
        return _number(f"{v1}/memory.usage_in_bytes"), _number(f"{v1}/memory.limit_in_bytes"), events
    current = _number(f"{group}/memory.current") if group else None
    if current is None:
        return None, None, {}
    return current, _number(f"{group}/memory.max"), _pairs(_read(f"{group}/memory.events"))


def of(one: Unit, *, has_network: bool = True) -> dict[str, Any]:
    """Return what a running (or waiting) tenant uses: microseconds, bytes, counts; None where nobody counts.

    One that has no network but loopback has no bytes to be counted.
    """
    held = one.held if one.runs else one.warm
    if held is None:
        return {}
    group, pid = held["cgroup"], held["pid"]
    pids = processes(group, pid)
    cpu = _pairs(_read(f"{group}/cpu.stat") if group else None)
    memory, limit, events = _memory(held)
    received, sent = network(pid) if has_network else (0, 0)
    read, written = _io(group, pids)
    return {
        "name": one.name, "tid": one.tid, "state": "warm" if not one.runs else one.state(), "pids": len(pids),
        "cpu_usec": cpu["usage_usec"] if "usage_usec" in cpu else _cpu_of(pids),
        "throttled_usec": cpu.get("throttled_usec", 0),
        "memory": memory if memory is not None else _resident(pids), "memory_limit": limit,
        "oom_kills": events.get("oom_kill", 0), "memory_high": events.get("high", 0) + events.get("max", 0),
        "net_rx": received, "net_tx": sent, "io_read": read, "io_write": written,
        "started_at": held["started_at"], "restarts": one.restarts,
    }  # fmt: skip


def _io(group: str | None, pids: list[int]) -> tuple[int, int]:
    found = _read(f"{group}/io.stat") if group else None
    read = written = 0
    if found:
        for word in found.split():
            key, _, value = word.partition(b"=")
            read += int(value) if key == b"rbytes" else 0
            written += int(value) if key == b"wbytes" else 0
        return read, written
    for pid in pids:
        values = _pairs((_read(f"/proc/{pid}/io") or b"").replace(b": ", b" "))
        read += values.get("read_bytes", 0)
        written += values.get("write_bytes", 0)
    return read, written


def proportional(pid: int | str) -> int:
    """Return the PSS of a process in bytes (proc_pid_smaps(5)): what it costs, shared pages divided."""
    for line in (_read(f"/proc/{pid}/smaps_rollup") or b"").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return 0
