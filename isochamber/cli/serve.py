"""The verbs of the supervisor itself: serve, metrics, events."""

import argparse
import json
import os
import time

from isochamber.cli import common
from isochamber.errors import IsochamberError, printable


def serve(arguments: argparse.Namespace) -> int:
    """Supervise the tenants in the foreground until SIGTERM; they run on after it unless --stop-tenants."""
    from isochamber.serve import daemon  # noqa: PLC0415

    return daemon.main(
        str(common.root_of(arguments)),
        group=arguments.group,
        textfile=arguments.metrics_file,
        interval=arguments.metrics_interval,
        account=arguments.account_interval,
        stay=not arguments.stop_tenants,
    )


def renew(_arguments: argparse.Namespace) -> int:
    """Replace the process that starts tenants by a new one; those that run stay with the former until they end."""
    from isochamber.serve import client  # noqa: PLC0415

    client.ask(client.need(), {"verb": "renew"})
    return 0


def metrics(_arguments: argparse.Namespace) -> int:
    """Print the supervisor's metrics as OpenMetrics text."""
    from isochamber.serve import client  # noqa: PLC0415

    text = client.ask(client.need(), {"verb": "metrics"})["text"]
    if os.isatty(1):
        text = "\n".join(map(printable, text.split("\n")))
    common.write_all(1, text.encode())
    return 0


def events(arguments: argparse.Namespace) -> int:
    """Show what happens to tenants, as it happens."""
    from isochamber.serve import client  # noqa: PLC0415

    request = {"verb": "events", "stream": arguments.stream, "since": common.moment(arguments.since)}
    for answer in client.stream(client.need(), request):
        item = answer.get("item")
        if item is None or (item["event"] == "listening" and not arguments.json):
            continue
        if arguments.json:
            common.say(json.dumps(item))
        else:
            more = " ".join(f"{key}={item[key]}" for key in item if key not in ("time", "event", "name", "tid"))
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(item["time"]))
            common.say(printable(f"{when} {item['event']} {item.get('name', '')} {more}".rstrip()))
        common.flush()
    return 0


def _seconds(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise IsochamberError("an interval is above 0", stage="serve", exit_code=2)
    return value


def add(verbs: common.Verbs) -> None:
    """Add these verbs to the parser."""
    added = common.add_verb(verbs, "serve", serve)
    added.add_argument("--group", help="whose members may talk to the supervisor besides root (a name or a number)")
    added.add_argument(
        "--metrics-file", metavar="FILE", help="write metrics there for node_exporter's textfile collector"
    )
    added.add_argument("--metrics-interval", metavar="SECONDS", type=_seconds, default=15.0)
    added.add_argument(
        "--account-interval", metavar="SECONDS", type=_seconds, default=60.0, help="how often `net account` is done"
    )
    added.add_argument("--stop-tenants", action="store_true", help="on SIGTERM stop every tenant too")
    common.add_verb(verbs, "metrics", metrics)
    common.add_verb(verbs, "renew", renew)
    added = common.add_verb(verbs, "events", events)
    added.add_argument("--since", help="show from then on: seconds since 1970, or 10m, 2h, 3d ago")
    added.add_argument("--no-stream", dest="stream", action="store_false", help="show what there is, and end")
    added.add_argument("--json", action="store_true", help="an object a line")
