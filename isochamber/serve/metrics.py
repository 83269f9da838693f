"""Metrics in OpenMetrics text (the specification: OpenMetrics 1.0, "Text format"), for Prometheus and the like."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from isochamber.serve import containers, usage
from isochamber.serve.supervisor import Supervisor

_STATES = ("created", "running", "paused", "stopping", "restarting", "exited", "warm")

# name, type, help, key of usage, factor
_PER_TENANT: tuple[tuple[str, str, str, str, float], ...] = (
    ("cpu_seconds", "counter", "Processor time used.", "cpu_usec", 1e-6),
    ("cpu_throttled_seconds", "counter", "Time held back by its processor limit.", "throttled_usec", 1e-6),
    ("memory_bytes", "gauge", "Memory in use.", "memory", 1),
    ("memory_limit_hits", "counter", "Times it ran against its memory limit.", "memory_high", 1),
    ("oom_kills", "counter", "Processes killed at its memory limit.", "oom_kills", 1),
    ("io_read_bytes", "counter", "Bytes read from disks.", "io_read", 1),
    ("io_written_bytes", "counter", "Bytes written to disks.", "io_write", 1),
    ("network_receive_bytes", "counter", "Bytes received on its own network.", "net_rx", 1),
    ("network_transmit_bytes", "counter", "Bytes sent on its own network.", "net_tx", 1),
    ("processes", "gauge", "Processes it has.", "pids", 1),
)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> list[str]:
    suffix = "_total" if kind == "counter" else ""
    lines = [f"# TYPE isochamber_{name} {kind}", f"# HELP isochamber_{name} {text}"]
    lines += [f"isochamber_{name}{suffix}{labels} {value:.15g}" for labels, value in samples]
    return lines


def text(supervisor: Supervisor) -> str:
    """Return everything, ready to be scraped."""
    units = sorted(supervisor.units.values(), key=lambda one: one.name)
    known = supervisor.containers.by_tid()
    used: list[tuple[str, dict[str, Any]]] = []
    states, restarts, refused, unwell = [], [], [], []
    for one in units:
        label = f'{{tenant="{_escaped(one.name)}"}}'
        state = "warm" if one.warm is not None and not one.runs else one.state()
        states += [(f'{{tenant="{_escaped(one.name)}",state="{name}"}}', float(name == state)) for name in _STATES]
        restarts.append((label, float(one.restarts)))
        if containers.counts_refusals(known.get(one.tid)):
            refused.append((label, float(one.refused)))
        if one.health:
            unwell.append((label, float(one.health == "healthy")))
        found = usage.of(one, has_network=containers.has_network(known.get(one.tid)))
        if found:
            used.append((label, found))
    lines = _family("state", "gauge", "1 for the state that the tenant is in.", states)
    lines += _family("restarts", "counter", "Restarts by the supervisor.", restarts)
    lines += _family("refused_syscalls", "counter", "System calls that its learned list refused.", refused)
    lines += _family("healthy", "gauge", "1 while its health command succeeds.", unwell)
    for name, kind, about, key, factor in _PER_TENANT:
        lines += _family(name, kind, about, [(label, found[key] * factor) for label, found in used])
    lines += _family(
        "supervisor_memory_bytes",
        "gauge",
        "Proportional set size of the supervisor.",
        [("", usage.proportional("self"))],
    )
    return "\n".join([*lines, "# EOF", ""])


def write(supervisor: Supervisor, path: str) -> None:
    """Replace the file that node_exporter's textfile collector reads; raises OSError."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        # That collector reads the older format, which has no end mark.
        file.write(text(supervisor).replace("# EOF\n", ""))
    os.rename(f"{path}.new", path)
