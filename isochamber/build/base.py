"""base_fs: the lowest lowerdir, a Debian root made by mmdebstrap or debootstrap, with the operator's files in it."""

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from isochamber import paths
from isochamber.build import bootstrap, contents, debcache, durable, locks, manifest, process, space, tree
from isochamber.build.inputs import Inputs
from isochamber.build.progress import Reporter
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.launch import syscalls
from isochamber.spec.model import Base

FileDigest = Callable[[Path], str]

_FORMAT = "1"  # of what is done here besides the tool's own work: another number is another base
_TITLE = "base {}"
_LIKELY_BYTES, _LIKELY_NAMES = 300 << 20, 12_000  # of a minimal Debian root with its downloads

# invoke-rc.d(8): 101 means "action forbidden": installing a package starts no service.
_POLICY = "#!/bin/sh\nexit 101\n"
_APT = 'Acquire::Languages "none";\n'
_INSIDE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
_SNAPSHOT_APT = 'Acquire::Check-Valid-Until "false";\n'
_HOSTS = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"

# What a tool leaves that is another at every build, or that no tenant may find: device nodes, lists, logs.
_EMPTIED = (debcache.LISTS, "var/cache/apt", "var/log/apt", "dev", "run", "tmp")
_REMOVED = (
    "var/log/bootstrap.log", "var/log/dpkg.log", "var/log/alternatives.log", "var/lib/dbus/machine-id",
    "var/cache/ldconfig/aux-cache", "var/lib/dpkg/status-old", "var/lib/dpkg/available-old",
    "var/cache/debconf/config.dat-old", "var/cache/debconf/templates.dat-old",
    "etc/dpkg/dpkg.cfg.d/99mmdebstrap",  # how the tool's own dpkg was told not to sync every file
)  # fmt: skip


def inputs(base: Base, file_digest: FileDigest) -> Inputs:
    """Return what the base is made of; ``file_digest`` hashes an operator's file."""
    return Inputs.of(
        {
            "format": _FORMAT,
            "tool": base.tool,
            "suite": base.suite,
            "mirror": bootstrap.mirror_of(base),  # the snapshot's, when there is one: then mirror: does not count
            "variant": base.variant,
            "arch": base.architecture,
            "packages": " ".join(base.packages),
            **{f"file {inside}": file_digest(source) for inside, source in base.files.items()},
        }
    )


def product(base: Base, file_digest: FileDigest) -> str:
    """Return the product's name, ``<name>-<digest>``."""
    return f"{base.name}-{inputs(base, file_digest).digest()}"


def exists(state: State, name: str) -> bool:
    """Say whether the product is on disk."""
    return manifest.usable(state.base(name))


def build(
    state: State, base: Base, file_digest: FileDigest, reporter: Reporter, *, former_product: str | None = None
) -> str:
    """Build the base unless it is there, and return its product name; raises IsochamberError (stage "base").

    Two processes never build the same one: the second waits, and finds it.
    ``former_product`` is what the reasons for building are compared with; by default the
    newest base of this name.
    """
    made_of = inputs(base, file_digest)
    name = f"{base.name}-{made_of.digest()}"
    title = _TITLE.format(base.name)
    with locks.product_lock(state, f"base-{name}", reporter.say):
        if exists(state, name):
            return name
        bootstrap.check_tool(base)
        reporter.reasons(title, _reasons(state, base, made_of, former_product))
        _require_space(state, base)
        try:
            with durable.staging_directory(state.staging, f"base-{base.name}") as stage:
                _bootstrap(state, base, stage, title, reporter)
                root = os.open(stage / paths.ROOTFS, tree.DIRECTORY)
                try:
                    _finish(base, root, made_of)
                finally:
                    os.close(root)
                manifest.complete(stage, "base", base.name, made_of)
                stage.chmod(0o755)
                durable.remove_tree(state.base(name), state.staging)  # a torn one
                durable.commit_tree(stage, state.base(name))
        except OSError as error:
            raise IsochamberError.from_os(error, stage="base", tenant=base.name) from error
    return name


def deb_cache(state: State, product: str) -> Path:
    """Return where .debs of the archive that ``product`` came from are kept."""
    values = dict(manifest.read(state.base(product)).inputs.items)
    return debcache.directory(state, values["mirror"], values["arch"])


def _require_space(state: State, base: Base) -> None:
    """Raise IsochamberError unless there is room for the base: as much as its former one took, or as Debian's do."""
    known = [manifest.read(path) for path in (state.root / paths.BASES).glob(f"{base.name}-*") if manifest.exists(path)]
    size = max((found.size for found in known), default=_LIKELY_BYTES)
    names = max((found.names for found in known), default=_LIKELY_NAMES)
    space.require(state.root, size, names=names, stage="base", tenant=base.name)


def _reasons(state: State, base: Base, made_of: Inputs, former_product: str | None) -> tuple[str, ...]:
    """Say what changed since the former base; nothing when there is none."""
    if former_product is not None:
        known = [former_product]
    else:
        found = (state.root / paths.BASES).glob(f"{base.name}-*")
        known = [path.name for path in sorted(found, key=lambda path: path.stat().st_mtime)]
    former = [manifest.read(state.base(name)) for name in known if exists(state, name)]
    same = [candidate for candidate in former if candidate.name == base.name]
    return made_of.changed_from(same[-1].inputs) if same else ()


def _bootstrap(state: State, base: Base, stage: Path, title: str, reporter: Reporter) -> None:
    """Let the tool fill ``stage``/rootfs, from cached .debs as far as there are any, and keep those it downloaded."""
    rootfs, settings = stage / paths.ROOTFS, stage / "settings"
    bootstrap.write_settings(settings)
    cache = debcache.directory(state, bootstrap.mirror_of(base), base.architecture)
    debcache.show(cache, rootfs)
    log = state.log(f"base-{base.name}")
    with reporter.product(title, every_line=False) as progress:
        notice = bootstrap.proxy_notice()
        if notice is not None:
            reporter.say(f"{title}: {notice}")
        environment = bootstrap.environment(settings)
        outcome = process.run(bootstrap.command(base, stage), log=log, product=progress, env=environment)
        if outcome.status:
            raise IsochamberError(
                f"{base.tool} exited with {outcome.status}",
                stage="base", tenant=base.name, path=log, hint="the last lines of its log follow",
                notes=outcome.last_lines,
            )  # fmt: skip
        for beside in (settings, *(stage / name for name in bootstrap.BESIDE)):
            durable.remove_tree(beside)
        root = os.open(rootfs, tree.DIRECTORY)
        try:
            debcache.keep(cache, root, root)
        finally:
            os.close(root)


def _finish(base: Base, root: int, made_of: Inputs) -> None:
    """Make the root the same wherever it was built, and put the operator's files in."""
    for directory in _EMPTIED:
        _empty(root, directory)
    for path in _REMOVED:
        _remove(root, path)
    for directory, mode in (
        (f"{debcache.LISTS}/partial", 0o700),
        (f"{debcache.ARCHIVES}/partial", 0o700),
        ("home", 0o755),
    ):
        descriptor = _open_made(root, directory)
        os.fchmod(descriptor, mode)
        os.close(descriptor)
    for path, text, mode in (
        ("etc/resolv.conf", "", 0o644),
        ("etc/hostname", "isochamber\n", 0o644),
        ("etc/hosts", _HOSTS, 0o644),
        ("etc/machine-id", "", 0o644),
        ("etc/apt/apt.conf.d/90isochamber", _APT + (_SNAPSHOT_APT if base.snapshot else ""), 0o644),
        ("usr/sbin/policy-rc.d", _POLICY, 0o755),
    ):
        _place(root, path, text.encode(), mode)
    expected = dict(made_of.items)
    for inside, source in base.files.items():
        _place(root, inside.removeprefix("/"), *_operators(base, source, expected[f"file {inside}"]))


def _operators(base: Base, source: Path, expected: str) -> tuple[bytes, int]:
    """Return an operator's file and the mode it gets; raises IsochamberError when it is not what names the base."""
    descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise IsochamberError("is not a regular file", stage="base", tenant=base.name, path=source)
        content = file.read()
    if contents.digest_with_mode(hashlib.sha256(content).hexdigest(), mode) != expected:
        raise IsochamberError(
            "changed while the base was built", stage="base", tenant=base.name, path=source, hint="run ./doit again"
        )
    return content, 0o755 if mode & 0o111 else 0o644


def _empty(root: int, directory: str) -> None:
    """Remove what is in a directory of the root, unless there is no such directory."""
    try:
        descriptor = syscalls.openat2(root, directory, os.O_RDONLY | os.O_DIRECTORY, resolve=_INSIDE)
    except FileNotFoundError:
        return  # a variant without apt, say
    try:
        tree.remove_contents(descriptor)
    finally:
        os.close(descriptor)


def _remove(root: int, path: str) -> None:
    """Remove a file of the root, unless there is none."""
    directory, _, name = path.rpartition("/")
    try:
        parent = syscalls.openat2(root, directory, os.O_RDONLY | os.O_DIRECTORY, resolve=_INSIDE)
    except FileNotFoundError:
        return
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)
    finally:
        os.close(parent)


def _place(root: int, path: str, content: bytes, mode: int) -> None:
    """Write a file inside the root, its directories made; /lib -> usr/lib is followed, nothing leads out."""
    directory, _, name = path.rpartition("/")
    parent = _open_made(root, directory)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
    finally:
        os.close(parent)


def _open_made(root: int, directory: str) -> int:
    """Open ``directory`` inside the root, with what is missing of it made; the descriptor is the caller's."""
    parts = directory.split("/") if directory else []
    opened = os.dup(root)
    for count, name in enumerate(parts, 1):
        path = "/".join(parts[:count])
        parent, opened = opened, -1
        try:
            try:
                opened = syscalls.openat2(root, path, os.O_RDONLY | os.O_DIRECTORY, resolve=_INSIDE)
            except FileNotFoundError:
                os.mkdir(name, dir_fd=parent)
                opened = syscalls.openat2(root, path, os.O_RDONLY | os.O_DIRECTORY, resolve=_INSIDE)
                os.fchmod(opened, 0o755)  # whatever the umask
        finally:
            os.close(parent)
    return opened
