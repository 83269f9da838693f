"""The verbs that look at tenants through the supervisor: ps, logs, stats, top."""

import argparse
import json
import os
import re
import time
from collections.abc import Iterable
from typing import Any

from isochamber.cli import common
from isochamber.errors import EXIT_BAD_INPUT, IsochamberError, printable

Row = dict[str, Any]

_PS = (("TENANT ID", "id"), ("NAME", "name"), ("BASE", "base"), ("COMMAND", "command"), ("STATUS", "status"),
       ("HEALTH", "health"), ("PID", "pid"))  # fmt: skip
_STATS = (("NAME", "name"), ("CPU %", "cpu"), ("MEM USAGE / LIMIT", "memory"), ("NET IO", "net"), ("BLOCK IO", "block"),
          ("PIDS", "pids"))  # fmt: skip


def ps(arguments: argparse.Namespace) -> int:
    """List the tenants that run under the supervisor; with -a the others too."""
    from isochamber.serve import client  # noqa: PLC0415

    rows = client.ask(client.need(), {"verb": "ps", "all": arguments.all})["rows"]
    if arguments.json:
        common.say(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        row["id"] = row["tid"][:12]
        row["status"] = _status(row)
    if arguments.quiet:
        for row in rows:
            common.say(row["tid"])
        return 0
    if arguments.format:
        for row in rows:
            common.say(formatted(arguments.format, row))
        return 0
    _table(_PS, rows)
    return 0


def formatted(template: str, row: Row) -> str:
    """Return ``template`` with {{.Name}} (podman's way) or {name} replaced by what the row says."""

    def value(match: re.Match[str]) -> str:
        wanted = (match[1] or match[2]).lower().replace("_", "")
        for key, found in row.items():
            if key.replace("_", "") == wanted:
                return printable("" if found is None else found)
        raise IsochamberError(
            f"--format: there is no {match[0]}", stage="ps", hint=f"known: {', '.join(sorted(row))}",
            exit_code=EXIT_BAD_INPUT,
        )  # fmt: skip

    return re.sub(r"\{\{\s*\.(\w+)\s*\}\}|\{(\w+)\}", value, template.replace("\\t", "\t"))


def _status(row: Row) -> str:
    state = row["state"]
    if state == "exited":
        ago = _span(time.time() - (row["exited_at"] or 0))
        return f"Exited ({row['exit_code']}) {ago} ago"
    if state in ("running", "paused", "stopping"):
        text = f"Up {_span(time.time() - row['started_at'])}"
        return text if state == "running" else f"{text} ({state})"
    return f"{state.capitalize()}{' (warm)' if row['warm'] else ''}"


def _span(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} seconds"


def _table(columns: tuple[tuple[str, str], ...], rows: Iterable[Row]) -> None:
    for line in table(columns, rows):
        common.say(line)


def table(columns: tuple[tuple[str, str], ...], rows: Iterable[Row]) -> list[str]:
    """Return the lines of a table, every cell escaped."""
    cells = [[title for title, _ in columns]]
    cells += [[printable("" if row.get(key) is None else row[key])[:60] for _, key in columns] for row in rows]
    widths = [max(len(line[number]) for line in cells) for number in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def logs(arguments: argparse.Namespace) -> int:
    """Show what a tenant has written; escaped on a terminal, as it is otherwise."""
    from isochamber.serve import client  # noqa: PLC0415

    request = {
        "verb": "logs", "tenant": arguments.tenant, "tail": arguments.tail, "follow": arguments.follow,
        "since": common.moment(arguments.since),
    }  # fmt: skip
    for answer in client.stream(client.need(), request):
        line = answer.get("item")
        if line is not None:
            _show(line, arguments)
    return 0


def _show(line: Row, arguments: argparse.Namespace) -> None:
    if arguments.json:
        common.say(json.dumps(line))
        common.flush()
        return
    head = f"{line['time']} " if arguments.timestamps else ""
    end = "" if line["partial"] else "\n"
    target = 2 if line["stream"] == "stderr" else 1
    text = line["text"]
    if os.isatty(target) and not arguments.raw:
        text = printable(text)
    common.write_all(target, f"{head}{text}{end}".encode("utf-8", "surrogateescape"))


def stats(arguments: argparse.Namespace) -> int:
    """Show what running tenants use."""
    from isochamber.serve import client  # noqa: PLC0415

    stream = arguments.stream
    request = {"verb": "stats", "tenants": arguments.tenant, "stream": stream, "interval": arguments.interval}
    before: Row | None = None
    for answer in client.stream(client.need(), request):
        item = answer.get("item")
        if item is None:
            continue
        if arguments.json:
            common.say(json.dumps(item["rows"], indent=2 if not stream else None))
        elif before is None and stream:
            before = item  # cpu is a difference
            continue
        else:
            if stream and os.isatty(1):
                common.say("\x1b[H\x1b[2J")
            _table(_STATS, shown(before, item))
            before = item
        common.flush()
        if not stream:
            break
    return 0


def shown(before: Row | None, now: Row) -> list[Row]:
    """Return the rows of ``now`` for people, cpu as the share since ``before``, or since each was started."""
    former = {row["tid"]: row for row in before["rows"]} if before is not None else {}
    rows = []
    for row in now["rows"]:
        since = before["time"] if before is not None else row["started_at"]
        seconds = max(now["time"] - since, 1e-6)
        used = row["cpu_usec"] - (0 if before is None else former.get(row["tid"], row)["cpu_usec"])
        limit = common.size(row["memory_limit"]) if (row["memory_limit"] or 1 << 62) < 1 << 60 else "none"
        rows.append({
            "name": row["name"] + (" (warm)" if row["state"] == "warm" else ""),
            "cpu": f"{used / seconds / 1e4:.2f}%",
            "memory": f"{common.size(row['memory'])} / {limit}",
            "net": f"{common.size(row['net_rx'])} / {common.size(row['net_tx'])}",
            "block": f"{common.size(row['io_read'])} / {common.size(row['io_write'])}",
            "pids": row["pids"],
            "share": used / seconds / 1e4,
        })  # fmt: skip
    return rows


def top(arguments: argparse.Namespace) -> int:
    """Show what running tenants use on a live screen, the busiest first; q ends it."""
    if not (os.isatty(0) and os.isatty(1)):
        raise IsochamberError("top needs a terminal", stage="top", hint="isochamber stats --no-stream", exit_code=2)
    import curses  # noqa: PLC0415

    curses.wrapper(_screen, arguments)
    return 0


def _screen(screen: Any, arguments: argparse.Namespace) -> None:
    import curses  # noqa: PLC0415

    from isochamber.serve import client  # noqa: PLC0415

    with_cursor = getattr(curses, "curs_set", None)
    try:
        if with_cursor is not None:
            with_cursor(0)
    except curses.error:
        pass  # a terminal whose cursor can't be hidden
    end = client.need()
    before: Row | None = None
    screen.timeout(int(arguments.interval * 1000))
    while True:
        item = next(iter(list(client.stream(end, {"verb": "stats", "stream": False}))))["item"]
        rows = sorted(shown(before or item, item), key=lambda row: -row["share"])
        before = item
        screen.erase()
        height, width = screen.getmaxyx()
        lines = [f"isochamber: {len(rows)} tenants, {time.strftime('%H:%M:%S')}", "", *table(_STATS, rows)]
        for number, line in enumerate(lines[: height - 1]):
            screen.addnstr(number, 0, line, width - 1, curses.A_REVERSE if number == 2 else curses.A_NORMAL)
        screen.refresh()
        if screen.getch() in (ord("q"), ord("Q"), 27):
            return


def add(verbs: common.Verbs) -> None:
    """Add these verbs to the parser."""
    added = common.add_verb(verbs, "ps", ps)
    added.add_argument("-a", "--all", action="store_true", help="those that do not run, too")
    added.add_argument("-q", "--quiet", action="store_true", help="tids only")
    added.add_argument("--format", help="a line a tenant, with {{.Name}} {{.Status}} ... or {name} {status}")
    added.add_argument("--json", action="store_true")
    added = common.add_verb(verbs, "logs", logs)
    added.add_argument("tenant", help="name or tid")
    added.add_argument("-f", "--follow", action="store_true", help="go on as it writes more, until it ends for good")
    added.add_argument("-n", "--tail", type=int, metavar="LINES", help="begin with the last so many")
    added.add_argument("--since", help="begin then: seconds since 1970, or 10m, 2h, 3d ago")
    added.add_argument("-t", "--timestamps", action="store_true")
    added.add_argument("--raw", action="store_true", help="escape nothing, even on a terminal")
    added.add_argument("--json", action="store_true", help="an object a line")
    added = common.add_verb(verbs, "stats", stats)
    added.add_argument("tenant", nargs="*", help="names or tids (default: all that run)")
    added.add_argument("--no-stream", dest="stream", action="store_false", help="once")
    added.add_argument("-i", "--interval", type=float, default=1.0, metavar="SECONDS")
    added.add_argument("--json", action="store_true")
    added = common.add_verb(verbs, "top", top)
    added.add_argument("-i", "--interval", type=float, default=1.0, metavar="SECONDS")
