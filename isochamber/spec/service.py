"""The keys of a tenant that the supervisor reads: restart, after, ready, health, stop, warm, logs."""

import graphlib
import shlex
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from isochamber.spec import validate
from isochamber.spec.model import Health, Service, Tenant


def of(own: Mapping[str, Any], defaults: Mapping[str, Any]) -> Service:
    """Return what a tenant's own keys and the defaults say together; both are valid."""
    both = {**defaults, **own}
    restart, retries = validate.parse_restart(both.get("restart", "no")) or ("no", 0)
    stop = {**defaults.get("stop", {}), **own.get("stop", {})}
    logs = {**defaults.get("logs", {}), **own.get("logs", {})}
    blank = Service()
    return Service(
        restart=restart,
        retries=retries,
        after=tuple(dict.fromkeys(both.get("after", ()))),
        ready=both.get("ready", blank.ready),
        health=_health({**defaults.get("health", {}), **own.get("health", {})}),
        stop_signal=stop.get("signal", blank.stop_signal),
        stop_grace=stop.get("grace", blank.stop_grace),
        warm=both.get("warm", blank.warm),
        log_size=validate.parse_size(logs.get("size", blank.log_size)) or blank.log_size,
        log_count=logs.get("count", blank.log_count),
        journald=logs.get("journald", blank.journald),
    )


def _health(value: Mapping[str, Any]) -> Health | None:
    if not value:
        return None
    command = value["command"]
    words = shlex.split(command) if isinstance(command, str) else command
    return Health(tuple(words), **{key: number for key, number in value.items() if key != "command"})


def problems_of_order(tenants: Mapping[str, Tenant], names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (tenant, what is wrong) for every ``after:`` that is not in ``names`` or leads back to itself."""
    for name, tenant in tenants.items():
        for other in tenant.service.after:
            if other not in names:
                yield name, f"there is no tenant {other}"
    graph = {name: [other for other in tenant.service.after if other in tenants] for name, tenant in tenants.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = list(reversed(error.args[1]))
        yield circle[0], f"would wait for itself: {' after '.join(circle)}"
