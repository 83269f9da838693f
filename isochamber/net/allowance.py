"""How much of its allowance a tenant has used: the kernel counts, this remembers across reboots and power cuts.

The count in the kernel (an nftables quota) is what cuts or slows, at once and without
us. It is written down by every ``isochamber net account``: a power cut loses what
passed since the last one, which is for a timer to call every minute.
"""

import datetime
import json
from dataclasses import dataclass
from pathlib import Path

from isochamber.build import durable
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.spec.model import Allowance

FILE = "allowance.json"
_WARN_AT = 80  # percent


@dataclass(frozen=True, slots=True)
class Used:
    """What is written down: bytes in a period ("2026-11" or "2026-11-24", UTC), and the warning that was given."""

    period: str
    size: int
    warned: int  # percent: 0, 80 or 100


def period(allowance: Allowance, now: datetime.datetime) -> str:
    """Return the name of the period that ``now`` (UTC) lies in."""
    return now.strftime("%Y-%m" if allowance.per == "month" else "%Y-%m-%d")


def _path(state: State, tid: str) -> Path:
    return state.tenant_persist(tid) / FILE


def read(state: State, tid: str, current: str) -> Used:
    """Return what was used in the period ``current``; another period's, or a damaged file, is nothing used."""
    try:
        raw = json.loads(_path(state, tid).read_bytes())
        found = Used(str(raw["period"]), int(raw["bytes"]), int(raw["warned"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Used(current, 0, 0)
    return found if found.period == current else Used(current, 0, 0)


def is_of_another_period(state: State, tid: str, current: str) -> bool:
    """Say whether something is written down, and for a period that is over."""
    try:
        return bool(json.loads(_path(state, tid).read_bytes())["period"] != current)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write(state: State, tid: str, used: Used) -> None:
    """Write it down if it is news; raises IsochamberError (stage "net")."""
    if read(state, tid, used.period) == used and not is_of_another_period(state, tid, used.period):
        return
    text = json.dumps({"period": used.period, "bytes": used.size, "warned": used.warned}) + "\n"
    try:
        if _path(state, tid).parent.is_dir():
            durable.write_file(_path(state, tid), text.encode(), staging=state.staging)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="net", path=_path(state, tid)) from error


def count(allowance: Allowance, former: Used, size: int) -> tuple[Used, str | None]:
    """Return what to write down for ``size`` bytes in all, and the warning this is the first time for. Pure."""
    percent = size * 100 // allowance.size
    level = 100 if percent >= 100 else _WARN_AT if percent >= _WARN_AT else 0
    used = Used(former.period, size, max(level, former.warned))
    if level <= former.warned:
        return used, None
    then = "cut" if allowance.slow is None else f"slowed to {allowance.slow // 1000} kbit/s"
    what = f"has used {percent} % of its {allowance.size} bytes a {allowance.per}"
    return used, what + (f", and is {then} until the next" if level == 100 else "")
