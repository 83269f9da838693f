"""The two tools that make a Debian root: which command each takes, and what it needs of the host.

Each runs in mount and PID namespaces of its own (unshare(1) from util-linux) and dies
with its parent, so that a build that is killed leaves neither its mounts nor its
processes behind. Of the host's settings none gets in but its archive keys and its
proxy, and the proxy is said.
"""

import os
import re
from pathlib import Path

from isochamber import paths
from isochamber.build import process
from isochamber.errors import IsochamberError
from isochamber.launch import mounts
from isochamber.spec import load
from isochamber.spec.model import Base

_CONTAINED = (
    "setpriv", "--pdeathsig", "KILL", "--",
    "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc", "--",
)  # fmt: skip

# dpkg asks for some two thousand syncs, and the whole tree is synced once, before it gets its name: a volatile
# overlay (overlayfs.rst) over the target answers them at once. Where there can be none, the tool does without.
_UNSYNCED = f"""\
cd "$1" && mkdir lower work && mount -t overlay overlay -o \\
lowerdir=lower,upperdir={paths.ROOTFS},workdir=work,{mounts.APART},volatile {paths.ROOTFS}
cd / && shift && exec "$@"
"""
BESIDE = ("lower", "work")  # what that leaves beside the target

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_APT_CONFIG = 'Dir::Etc::main "/dev/null";\nDir::Etc::parts "/dev/null";\n'  # apt.conf(5): nothing of the host's
_PROXIES = ("http_proxy", "https_proxy", "no_proxy")

# Debian's architecture -> the name of its qemu-user-static handler in binfmt_misc.
_QEMU = {
    "arm64": "aarch64", "armhf": "arm", "armel": "arm", "i386": "i386", "amd64": "x86_64", "riscv64": "riscv64",
    "ppc64el": "ppc64le", "s390x": "s390x", "mips64el": "mips64el",
}  # fmt: skip
_RUNS_NATIVELY = {"amd64": ("i386",), "arm64": ()}

BINFMT = Path("/proc/sys/fs/binfmt_misc")


def mirror_of(base: Base) -> str:
    """Return the URL that packages come from."""
    return load.SNAPSHOT_MIRROR.format(base.snapshot) if base.snapshot else base.mirror


def check_tool(base: Base) -> None:
    """Raise IsochamberError (stage "base") when the tool, or what a foreign architecture needs, is missing."""
    process.require(base.tool, base.tool, stage="base")
    if not KEYRING.is_file():
        raise _missing(base, "the keys of Debian's archive are not installed", KEYRING, "debian-archive-keyring")
    host = load.host_architecture()
    if base.architecture == host or base.architecture in _RUNS_NATIVELY.get(host, ()):
        return
    foreign = f"{base.architecture} programs can't run here"
    handler = BINFMT / f"qemu-{_QEMU.get(base.architecture, base.architecture)}"
    if not (BINFMT / "status").exists():
        raise IsochamberError(
            f"{foreign}: binfmt_misc is not mounted",
            stage="base", tenant=base.name, path=BINFMT,
            hint=f"mount -t binfmt_misc binfmt_misc {BINFMT}, and apt-get install qemu-user-static binfmt-support",
        )  # fmt: skip
    try:
        registered = handler.read_text().splitlines()
    except FileNotFoundError:
        raise _missing(
            base, f"{foreign}: no handler is registered", handler, "qemu-user-static binfmt-support"
        ) from None
    if registered[:1] != ["enabled"]:
        raise IsochamberError(
            f"{foreign}: the handler is disabled",
            stage="base", tenant=base.name, path=handler, hint=f"echo 1 > {handler}",
        )  # fmt: skip
    if not any(line.startswith("flags:") and "F" in line for line in registered):
        # Without F the interpreter is looked for in the tenant's root, at every exec.
        raise IsochamberError(
            f"{foreign}: the handler lacks the flag F (fix binary)",
            stage="base", tenant=base.name, path=handler,
            hint="register it anew: apt-get install --reinstall qemu-user-static",
        )  # fmt: skip


def _missing(base: Base, what: str, path: Path, packages: str) -> IsochamberError:
    return IsochamberError(what, stage="base", tenant=base.name, path=path, hint=f"apt-get install {packages}")


def write_settings(directory: Path) -> None:
    """Make ``directory`` with the settings that :func:`environment` names; raises OSError."""
    directory.mkdir()
    (directory / "apt.conf").write_text(_APT_CONFIG)
    (directory / "wgetrc").touch()  # /dev/null would not do: wget wants a regular file


def environment(settings: Path) -> dict[str, str]:
    """Return what the tool sees of our environment: nothing that changes what it makes, but a proxy.

    ``settings`` is a directory of :func:`write_settings`. wget (debootstrap's) reads no
    settings of the host's, nor does debootstrap get a proxy from the host's apt;
    mmdebstrap's apt reads the new root's configuration alone.
    """
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "HOME": "/nonexistent",
        "DEBIAN_FRONTEND": "noninteractive",
        "SYSTEM_WGETRC": os.fspath(settings / "wgetrc"),
        "APT_CONFIG": os.fspath(settings / "apt.conf"),
        **_proxies(),
    }


def proxy_notice() -> str | None:
    """Return a line that says which proxy the downloads go through, its password left out; None: through none."""
    told = [f"{name}={re.sub(r'//[^/@]*@', '//***@', value)}" for name, value in sorted(_proxies().items())]
    return f"downloads go through a proxy: {', '.join(told)}" if told else None


def _proxies() -> dict[str, str]:
    return {name: os.environ[name] for name in _PROXIES if os.environ.get(name)}


def command(base: Base, stage: Path) -> list[str]:
    """Return the command that bootstraps ``base`` into the rootfs of ``stage``: that may hold .debs where apt looks.

    Both tools leave there what they downloaded, and the signed lists, for
    :mod:`isochamber.build.debcache`; :data:`BESIDE` is left in ``stage``, and nothing is synced.
    """
    words = _debootstrap(base) if base.tool == "debootstrap" else _mmdebstrap(base)
    if base.packages:
        words.append(f"--include={','.join(base.packages)}")
    within = [*_CONTAINED, "sh", "-c", _UNSYNCED, "sh", str(stage)]
    return [*within, *words, base.suite, str(stage / paths.ROOTFS), mirror_of(base)]


def _mmdebstrap(base: Base) -> list[str]:
    words = [
        "mmdebstrap", "--mode=root", "--format=directory", "--verbose",
        f"--variant={base.variant}", f"--architectures={base.architecture}",
        # check/qemu asks for arch-test, and check_tool has looked already.
        "--skip=check/empty,check/qemu,essential/unlink,cleanup/apt",
        '--aptopt=Acquire::Languages "none"',
        "--dpkgopt=force-unsafe-io",
    ]  # fmt: skip
    if base.snapshot:
        words.append('--aptopt=Acquire::Check-Valid-Until "false"')
    return words


def _debootstrap(base: Base) -> list[str]:
    # Without the force it goes on unverified when the keys are missing.
    words = ["debootstrap", f"--arch={base.architecture}", "--force-check-gpg", f"--keyring={KEYRING}"]
    if base.variant != "-":
        words.append(f"--variant={base.variant}")
    return words
