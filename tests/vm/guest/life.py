"""Inside the guest, between two power cuts: checks what the last one left, then works until it is killed.

Argument: JSON ``{"seed": n, "model": {tenant: facts or null}, "at_work": tenant or null}``; or ``wait``:
it says ``{"warm": 1}``, and reads the JSON from the host. In between the machine may have been saved, so the
JSON then has ``now`` and ``random``: the time, and bytes for the kernel's generator.
Writes one JSON object a line, straight to the host, which has it when the write
returns: ``{"checked": {...}}`` or ``{"broken": [...]}``, then for each operation
``{"begin": kind, "name": tenant}`` and ``{"done": kind, "name": tenant, "facts": ...}``.

Facts are what must still be there after a cut: the entry of containers.json, what
was deployed to /home, and the number that the tenant itself wrote there and synced.
"""

import base64
import fcntl
import json
import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from isochamber.build import fsck, gc, registry
from isochamber.build.pipeline import Pipeline
from isochamber.build.progress import Reporter
from isochamber.launch import command, syscalls
from isochamber.serve.ring import Ring
from isochamber.spec import load
from isochamber.tasks.__main__ import main as doit

HERE = Path("/srv/power")
TENANTS = HERE / "tenants.yaml"
ROOT = HERE / "state"
NAMES = ("ada", "bob", "cem", "dai")
Facts = dict[str, Any]
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207

_PORT = os.dup(1)  # to the host; what doit and others print goes where errors go
os.dup2(2, 1)

# The tenant counts its starts, and syncs the number before it ends.
PROGRAM = """\
#!/bin/sh
set -e
number=0
[ ! -f /home/count ] || read number </home/count
echo $((number + 1)) | dd of=/home/count.new conv=fsync 2>/dev/null
mv /home/count.new /home/count
sync
"""
SCRIPT = (
    "#!/bin/sh\nset -e\nread line </home/settings\necho $line >/etc/made\nmkdir -p /opt/made\necho left >/home/left\n"
)


def say(**message: Any) -> None:
    """Tell the host; it has the message when this returns."""
    line = json.dumps({"out": json.dumps(message) + "\n"}) + "\n"
    os.write(_PORT, line.encode())


def keep(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file of the operator's so that a cut does not take it: what is tested is not the operator."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    with new.open("w") as file:
        file.write(text)
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    new.rename(path)
    os.sync()


def listed() -> list[str]:
    """Return the tenants of tenants.yaml."""
    return [name for name in NAMES if f"  {name}:" in TENANTS.read_text()]


def list_tenants(names: list[str]) -> None:
    """Write tenants.yaml."""
    lines = [
        f"root: {ROOT}",
        "defaults: {ipc: none, install_network: host}",
        "bases: {default: {}}",
        "tenants:" if names else "tenants: {}",
    ]
    keep(TENANTS, "\n".join([*lines, *(f"  {name}: {{package: packages/{name}}}" for name in names)]) + "\n")


def pipeline() -> Pipeline:
    """Return a fresh one."""
    return Pipeline(load.load(TENANTS), Reporter(quiet=True))


def home_of(entry: Facts) -> Path:
    """Return a tenant's /home as the host sees it."""
    return ROOT / str(entry["home"])


def count_of(entry: Facts) -> int:
    """Return the number that the tenant wrote; what can't be read is no number."""
    try:
        return int((home_of(entry) / "count").read_text())
    except FileNotFoundError:
        return 0


def facts_of(name: str) -> Facts | None:
    """Return what is on disk of a tenant, or None."""
    entry = registry.find(pipeline().state, name)
    if entry is None:
        return None
    return {"entry": entry, "settings": (home_of(entry) / "settings").read_text(), "count": count_of(entry)}


# What is done, each by the code that ./doit and isochamber call.


def put(name: str, dice: random.Random) -> Facts | None:
    """Make a tenant, or change what its layer depends on, or only its /home."""
    package = HERE / "packages" / name
    keep(package / "config.json", json.dumps(
        {"tid": "", "cname": name, "dependencies": "/home/deps.sh", "init": "/home/main"}
    ))  # fmt: skip
    keep(package / "progs/main", PROGRAM + f"# {dice.randrange(1000)}\n", 0o755)
    keep(package / "progs/deps.sh", SCRIPT, 0o755)
    if dice.random() < 0.7 or not (package / "progs/settings").exists():
        keep(package / "progs/settings", f"rate={dice.randrange(1000)}\n")
    if name not in listed():
        list_tenants([*listed(), name])
    made = pipeline()
    if not made.base_current("default"):
        made.make_base("default")
    made.make_dirs(name)
    made.make_layer(name)
    made.make_home(name)
    made.configure(name)
    return facts_of(name)


def delete(name: str, _dice: random.Random) -> None:
    """Remove a tenant and all it has."""
    list_tenants([each for each in listed() if each != name])
    made = pipeline()
    gc.delete(made.state, name, made.reporter)
    if HERE.joinpath("packages", name, "progs/settings").exists():
        HERE.joinpath("packages", name, "progs/settings").unlink()


def run(name: str, _dice: random.Random) -> Facts | None:
    """Start the tenant, which counts."""
    done = subprocess.run(
        command.argv("run", "--root", str(ROOT), name), capture_output=True, stdin=subprocess.DEVNULL, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}: {done.stderr}")
    return facts_of(name)


def log(name: str, dice: random.Random) -> Facts | None:
    """Write so much into a ring of logs that it turns; its end may be lost, and nothing else may be."""
    entry = registry.find(pipeline().state, name)
    assert entry is not None
    ring = Ring(str(ROOT / "logs" / f"power-{name}"), 4096, 3)
    for _ in range(dice.randrange(1, 100)):
        ring.write(b"stdout", b"x" * dice.randrange(200) + b"\n")
    ring.close()
    return facts_of(name)


def prune(_name: str, _dice: random.Random) -> None:
    """Remove what nothing refers to."""
    made = pipeline()
    gc.prune(made.state, made.spec, made.reporter)


# What is checked after a cut.


def as_announced(name: str, facts: Facts | None) -> list[str]:
    """Return what is not there of what was said to be done."""
    now = facts_of(name)
    if facts is None:
        return [f"{name} was deleted and is back"] if now else []
    if now is None:
        return [f"{name} was configured and has no entry"]
    lost = [
        f"{name}: {key} of its entry was {value!r} and is {now['entry'].get(key)!r}"
        for key, value in facts["entry"].items()
        if now["entry"].get(key) != value
    ]
    lost += [f"{name}: {lower} is gone" for lower in now["entry"]["lowers"] if not (ROOT / lower).is_dir()]
    if now["settings"] != facts["settings"]:
        lost.append(f"{name}: /home/settings was {facts['settings']!r} and is {now['settings']!r}")
    if now["count"] < facts["count"]:
        lost.append(f"{name}: it had counted to {facts['count']}, and is at {now['count']}")
    return lost


def converge() -> list[str]:
    """Run one ./doit, then look at everything; return what is broken."""
    status = doit([])
    broken = [f"./doit ended with {status}"] if status else []
    state = pipeline().state
    broken += [f"{path} was left in staging" for path in state.staging.glob("*")]
    return broken + [finding.line() for finding in fsck.check(state, deep=True)]


def check(model: dict[str, Facts | None], at_work: str | None) -> list[str]:
    """Return everything that is wrong after a cut."""
    broken = []
    for name, facts in model.items():
        if name != at_work:
            broken += as_announced(name, facts)
    if not TENANTS.exists():
        list_tenants([])
    return broken + converge()


def sabotage() -> None:
    """Take every sync of the project's away: what is announced is not on the disk yet."""
    for module, name in ((os, "fsync"), (os, "fdatasync"), (syscalls, "syncfs")):
        setattr(module, name, lambda *_: None)


def wait() -> dict[str, Any]:
    """Say that everything is imported, read the job, and be as after a boot: with the time, and with chance."""
    say(warm=1)
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(_PORT, 65536)
    job: dict[str, Any] = json.loads(line)
    time.clock_settime(time.CLOCK_REALTIME, job["now"])
    chance = base64.b64decode(job["random"])
    with open("/dev/urandom", "wb") as generator:
        fcntl.ioctl(generator, _RNDADDENTROPY, struct.pack("ii", 8 * len(chance), len(chance)) + chance)
        fcntl.ioctl(generator, _RNDRESEEDCRNG)
    subprocess.run(["mount", "-t", "ext4", "-o", job["data"], "/dev/vdb", "/srv"], check=True)
    return job


def main() -> None:
    """Check, then work until the power is cut."""
    job = wait() if sys.argv[1] == "wait" else json.loads(sys.argv[1])
    os.environ["ISOCHAMBER_TENANTS"] = str(TENANTS)
    broken = check(job["model"], job["at_work"])
    if broken:
        say(broken=broken)
        sys.exit(1)
    for name in set(NAMES) - set(listed()):  # a deletion that was cut
        if registry.find(pipeline().state, name):
            delete(name, random.Random())
    say(checked={name: facts_of(name) for name in NAMES})
    if job["sabotage"]:
        sabotage()
    dice = random.Random(job["seed"])
    while True:
        name = dice.choice(NAMES)
        kinds = ["put", "put", "run", "run", "log", "delete"] if name in listed() else ["put", "put", "prune"]
        kind = dice.choice(kinds)
        say(begin=kind, name=name)
        facts = {"put": put, "run": run, "log": log, "delete": delete, "prune": prune}[kind](name, dice)
        say(done=kind, name=name, facts=facts)


if __name__ == "__main__":
    main()
