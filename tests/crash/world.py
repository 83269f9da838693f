"""A state directory small enough to be made a thousand times: the real code over a stand-in for mmdebstrap."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from isochamber.build import backup, bootstrap, durable, entry, fsck, gc, identity, manifest, recover, registry
from isochamber.build import restore as restoring
from isochamber.build.pipeline import Pipeline
from isochamber.build.progress import Reporter
from isochamber.launch import disk
from isochamber.spec import load

# What stands in for mmdebstrap: a shell and what it needs, so that a real install script runs over it.
STAND_IN = """\
#!/bin/sh
set -e
for last; do target=$before; before=$last; done
mkdir -p "$target/etc/apt/apt.conf.d" "$target/usr/bin" "$target/usr/sbin" "$target/var/log" "$target/tmp" "$target/dev"
for name in proc sys run tmp home root; do mkdir -p "$target/$name"; done
ln -s usr/bin "$target/bin"
cp /bin/dash "$target/usr/bin/sh"
for library in $(ldd /bin/dash | grep -o '/[^ ]*'); do
    mkdir -p "$target/${library%/*}"
    cp "$library" "$target/$library"
done
echo bookworm > "$target/etc/debian_version"
echo log > "$target/var/log/bootstrap.log"
"""
SCRIPT = "#!/bin/sh\nset -e\nread line < /home/settings\necho $line > /etc/made\necho left > /home/left\n"
PROGRAM = "#!/bin/sh\necho here\n"
_environment = bootstrap.environment

KEPT = ("base_fs", "layers", "tenants_fs", "tenants_persist")
UID_FILES = "lowers"


class World:
    """tenants.yaml, two packages and a state directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "state"
        self.file = directory / "tenants.yaml"
        self.tools = directory / "tools"
        self.backups = directory / "backups"

    def make(self) -> None:
        """Write everything but the state directory."""
        self.tools.mkdir(parents=True)
        self.backups.mkdir()
        tool = self.tools / "mmdebstrap"
        tool.write_text(STAND_IN)
        tool.chmod(0o755)
        self.file.write_text(
            f"root: {self.root}\ndefaults: {{ipc: none, install_network: host}}\nbases: {{default: {{}}}}\n"
            "tenants:\n  sensor: {package: packages/sensor}\n  plain: {package: packages/plain}\n"
        )
        for name, script in (("sensor", SCRIPT), ("plain", "")):
            progs = self.directory / "packages" / name / "progs"
            progs.mkdir(parents=True)
            config = {"tid": "", "cname": name, "dependencies": "/home/deps.sh" if script else "", "init": "/home/main"}
            (progs.parent / "config.json").write_text(json.dumps(config))
            (progs / "main").write_text(PROGRAM)
            (progs / "main").chmod(0o755)
            (progs / "data").mkdir()
            (progs / "data/one").write_text("one\n")
            if script:
                (progs / "settings").write_text("rate=1\n")
                (progs / "deps.sh").write_text(script)
                (progs / "deps.sh").chmod(0o755)

    def limit(self, size: str) -> None:
        """Give sensor a disk of its own."""
        text = re.sub(r"packages/sensor.*", f"packages/sensor, limits: {{disk: {size}}}}}", self.file.read_text())
        _write(self.file, text)

    def detach(self) -> None:
        """Unmount the tenants' disks, as a reboot does."""
        for path in (self.root / "tenants_fs").glob("*"):
            disk.detach(str(self.root), path.name)

    def attach(self) -> None:
        """Mount the tenants' disks, as a start does."""
        for path in (self.root / "tenants_persist").glob("*/disk.img"):
            disk.attach(str(self.root), path.parent.name)

    def remove(self) -> None:
        """Remove it, whatever is mounted."""
        self.detach()
        shutil.rmtree(self.directory)

    def pipeline(self) -> Pipeline:
        """Return a fresh one, quiet, with the stand-in in front of the real tool."""

        def environment(settings: Path) -> dict[str, str]:
            found = _environment(settings)
            return {**found, "PATH": f"{self.tools}:{found['PATH']}"}

        bootstrap.environment = environment  # of this world, whichever was before it in this process
        return Pipeline(load.load(self.file), Reporter(quiet=True))

    def copy(self, to: Path) -> "World":
        """Return a copy at ``to``, state directory included; nobody's disk is mounted in it."""
        self.detach()
        other = World(to)
        to.mkdir()
        for name in ("tools", "packages"):
            shutil.copytree(self.directory / name, to / name)
        other.file.write_text(self.file.read_text().replace(str(self.root), str(other.root)))
        for name in ("state", "backups"):
            if (self.directory / name).exists():
                subprocess.run(["cp", "-a", self.directory / name, to / name], check=True)
        return other

    def change(self, rate: int = 2) -> None:
        """Change what the install script reads: another layer, and a fresh upper over it."""
        _write(self.directory / "packages/sensor/progs/settings", f"rate={rate}\n")

    def snapshot(self) -> dict[str, str]:
        """Return what the state directory holds, times and inode numbers left out."""
        self.attach()
        found = {}
        for name in KEPT:
            for line in manifest.describe(self.root / name).lines.decode().splitlines():
                fields = json.loads(line)
                found[f"{name}/{fields[0]}"] = line
        file = self.root / "containers.json"
        for each in json.loads(file.read_text()) if file.exists() else ():
            found[f"entry of {each['name']}"] = json.dumps({**each, "package": "", "digest": ""})
        for name in [name for name in found if name.endswith(("/namespace", "/former.json", "/disk.img"))]:
            found[name] = "there"  # a random number; entries, which name where their package lies; what is in it counts
        return found

    def leftovers(self) -> list[str]:
        """Return names of stages that are still there."""
        found = [str(path) for path in (self.root / "staging").iterdir()]
        places = [
            self.root,
            *(self.root / name for name in KEPT),
            *self.root.glob("tenants_*/*"),
            *self.root.glob("tenants_fs/*/staging"),
        ]
        return found + [str(path) for place in places for path in place.glob(".tmp-*")]


# What a step does. Each is called in a process of its own, and may be cut anywhere and called again.


def base(world: World) -> None:
    world.pipeline().make_base("default")


def layer(world: World) -> None:
    pipeline = world.pipeline()
    pipeline.make_dirs("sensor")
    pipeline.make_layer("sensor")


def home(world: World) -> None:
    world.pipeline().make_home("sensor")


def configure(world: World) -> None:
    """doit, all of it: whatever is missing."""
    pipeline = world.pipeline()
    recover.clean(pipeline.state)
    with registry.together(pipeline.state):
        for name in pipeline.spec.tenants:
            make_missing(pipeline, name)


def make_missing(pipeline: Pipeline, name: str) -> None:
    """Do what doit does for one tenant: whatever is not as it should be."""
    base_name = pipeline.tenant(name).base
    if not pipeline.base_current(base_name):
        pipeline.make_base(base_name)
    if not pipeline.dirs_current(name):
        pipeline.make_dirs(name)
    if not pipeline.layer_current(name):
        pipeline.make_layer(name)
    if not pipeline.home_current(name):
        pipeline.make_home(name)
    if not pipeline.configured(name):
        pipeline.configure(name)


def delete(world: World) -> None:
    pipeline = world.pipeline()
    recover.clean(pipeline.state)
    if gc.known_tid(pipeline.state, "sensor") is not None:
        gc.delete(pipeline.state, "sensor", pipeline.reporter)


def prune(world: World) -> None:
    pipeline = world.pipeline()
    gc.prune(pipeline.state, pipeline.spec, pipeline.reporter)


def save(world: World) -> None:
    backup.backup(world.pipeline().state, "sensor", world.backups / "sensor")


def restore(world: World) -> None:
    restoring.restore(world.pipeline().state, world.backups / "sensor", replace=True)


def rollback(world: World) -> None:
    pipeline = world.pipeline()
    tid = pipeline.state.tid("sensor")
    if entry.slot_of(registry.read(pipeline.state)[tid]) == identity.SLOTS[1]:  # going back twice would go forth
        entry.rollback(pipeline.state, "sensor")


def check(world: World) -> None:
    found = fsck.check(world.pipeline().state, deep=True)
    if found:
        raise AssertionError("; ".join(finding.line() for finding in found))


def changed(world: World) -> None:
    """Another layer, and a fresh upper over it."""
    operate("changed", world)
    configure(world)


def given(world: World) -> None:
    """A disk of its own, onto which it moves."""
    operate("given", world)
    configure(world)


def grown(world: World) -> None:
    """A larger one."""
    operate("grown", world)
    configure(world)


_OPERATED: dict[str, Callable[[World], None]] = {
    "changed": lambda world: world.change(),
    "given": lambda world: world.limit("16M"),
    "grown": lambda world: world.limit("24M"),
}


def operate(step: str, world: World) -> None:
    """Write what the operator writes before ``step``; it is not ours, and nothing is written twice."""
    if step in _OPERATED:
        _OPERATED[step](world)


def _write(path: Path, text: str) -> None:
    if path.read_text() != text:
        path.write_text(text)


def everything(world: World) -> None:
    """All of it in one process, with a mark in the trace wherever success would be said."""
    for step in (base, layer, home, configure, save, changed, rollback, restore, prune, delete):
        step(world)
        _say_success()
    _alone(world.root)


def _alone(root: Path) -> None:
    """What else the durable module offers, each with nothing after it that would sync in its place."""
    durable.make_directories(root / "tenants_fs/alone/below")
    _say_success()
    durable.write_file(root / "tenants_fs/alone/file", b"once\n", exclusive=True, staging=root / "staging")
    _say_success()
    durable.remove_file(root / "tenants_fs/alone/file")
    _say_success()
    stage = root / "staging/.tmp-alone"
    stage.mkdir()
    (stage / "file").touch()
    durable.commit_tree(stage, root / "tenants_fs/alone/tree")
    _say_success()


def _say_success() -> None:
    os.close(os.open(os.devnull, os.O_RDONLY | os.O_CREAT))


STEPS = {
    function.__name__: function
    for function in (
        base,
        layer,
        home,
        configure,
        changed,
        delete,
        prune,
        save,
        restore,
        rollback,
        given,
        grown,
        check,
        everything,
    )
}


def again(name: str, world: World) -> None:
    """What ./doit does first, and then the step once more."""
    recover.clean(world.pipeline().state)
    STEPS[name](world)


def run_step(name: str, directory: str, case: str = "") -> int:
    """Do one step; returns 0, 125 after an error of ours (told on stderr), and lets everything else through."""
    from isochamber.errors import IsochamberError

    world = World(Path(directory))
    try:
        if name == "again":
            again(case, world)
        else:
            STEPS[name](world)
    except IsochamberError as error:
        os.write(2, f"{error.line()}\n".encode())
        return 125
    return 0
