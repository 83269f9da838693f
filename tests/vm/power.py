"""Cutting a machine's power again and again, and keeping account of what it had announced as done."""

import base64
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.vm.image import INSIDE
from tests.vm.machine import Machine, MachineError

LIFE = (f"{INSIDE}/.venv/bin/python", f"{INSIDE}/tests/vm/guest/life.py")
CHECKED = 600.0  # seconds until the guest has checked what the last cut left
_LONGEST = 3.0  # seconds of a first operation, before it is known how long they take


class BrokenError(AssertionError):
    """Something that had been announced as done is not there after a power cut, or what is there is broken."""


@dataclass
class Account:
    """What the guest has announced: the facts of each tenant, and which one it was at work on."""

    model: dict[str, Any] = field(default_factory=dict)
    at_work: str | None = None
    done: int = 0
    cuts_at_work: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # how long each kind of operation took at last
    began: tuple[str, float] = ("", 0.0)

    def take(self, message: dict[str, Any]) -> None:
        """Note one announcement."""
        if "checked" in message:
            self.model, self.at_work = message["checked"], None
        elif "begin" in message:
            self.at_work, self.began = message["name"], (message["begin"], time.monotonic())
        elif "done" in message:
            if message["done"] != "prune":
                self.model[message["name"]] = message["facts"]
            self.at_work = None
            self.done += 1
            self.seconds[message["done"]] = time.monotonic() - self.began[1]


def _announcements(
    machine: Machine, seed: int, account: Account, *, sabotage: bool = False
) -> Iterator[dict[str, Any]]:
    job = {"seed": seed, "model": account.model, "at_work": account.at_work, "sabotage": sabotage}
    rest, errors = "", ""
    if machine.saved is None:
        said = machine.stream(*LIFE, json.dumps(job), timeout=CHECKED, direct=True)
    else:
        chance = base64.b64encode(os.urandom(64)).decode()
        machine.say({**job, "now": time.time(), "random": chance, "data": machine.data_options})
        said = machine.follow(time.monotonic() + CHECKED, {"out": [], "err": []})
    for kind, text in said:
        if kind == "out":
            *lines, rest = (rest + text).split("\n")
            yield from (json.loads(line) for line in lines)
        if kind == "err":
            errors += text
        if kind == "status":
            raise AssertionError(f"seed {seed}: the guest ended its work with {text}: {errors[-4000:]}")


def cut(machine: Machine, seed: int, account: Account, *, sabotage: bool = False) -> None:
    """Boot, let the guest check what the last cut left, let it work, and cut its power at a moment that ``seed`` says.

    Raises BrokenError when something that had been announced is not there, or is broken.
    ``sabotage`` takes the guest's syncs away, and cuts as soon as something was announced.
    """
    dice = random.Random(seed)
    operations = dice.randrange(1, 6)  # the power goes during the last of these, or shortly after it
    moment = dice.random()
    machine.boot()
    try:
        began = 0
        for message in _announcements(machine, seed, account, sabotage=sabotage):
            account.take(message)
            _not_broken(message, seed)
            began += "begin" in message
            if began == operations and ("done" in message if sabotage else "begin" in message):
                if not sabotage:
                    time.sleep(moment * 1.2 * account.seconds.get(account.began[0], _LONGEST))
                machine.cut()  # what was announced until now is still read
    except MachineError as error:
        if not machine.was_cut:
            raise AssertionError(f"seed {seed}: {error}") from error
    finally:
        machine.kill()
    account.cuts_at_work += account.at_work is not None


def look(machine: Machine, seed: int, account: Account) -> None:
    """Boot and let the guest check what the last cut left; raises BrokenError."""
    machine.boot()
    try:
        for message in _announcements(machine, seed, account):
            _not_broken(message, seed)
            if "checked" in message:
                break
    finally:
        machine.kill()


def _not_broken(message: dict[str, Any], seed: int) -> None:
    if "broken" in message:
        raise BrokenError(f"after the power cut before seed {seed}: {message['broken']}")
