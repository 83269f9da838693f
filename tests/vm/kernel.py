"""Debian's kernel and the initial RAM disk that boots it: from two packages, unpacked below the test's scratch."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

GUEST = Path(__file__).with_name("guest")
PACKAGE = "linux-image-cloud-amd64"  # a metapackage: the newest kernel of the release

# What must be loaded before the root file system can be mounted (ext4 is built in), in any order.
_EARLY = ("virtio_pci", "virtio_blk", "virtio_console")


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package, and a static busybox."""

    tree: Path

    @property
    def image(self) -> Path:
        """The file that is booted."""
        (path,) = (self.tree / "boot").glob("vmlinuz-*")
        return path

    @property
    def release(self) -> str:
        """What uname(2) says, for example ``6.1.0-50-cloud-amd64``."""
        return self.image.name.removeprefix("vmlinuz-")

    @property
    def modules(self) -> Path:
        """The directory of its modules."""
        return self.tree / "lib/modules" / self.release

    @property
    def busybox(self) -> Path:
        """The shell of the initial RAM disk."""
        return self.tree / "bin/busybox"


def _apt(*words: str, cwd: Path | None = None) -> str:
    argv = [words[0], "-o", "APT::Sandbox::User=root", *words[1:]]
    return subprocess.run(argv, cwd=cwd, check=True, capture_output=True, text=True, timeout=300).stdout


def _download(directory: Path) -> None:
    shown = _apt("apt-cache", "show", "--no-all-versions", PACKAGE)
    found = re.search(r"^Depends: (linux-image-\S+)", shown, re.MULTILINE)
    assert found, shown
    _apt("apt-get", "download", found[1], "busybox-static", cwd=directory)


def fetch(directory: Path) -> Kernel:
    """Download the packages and unpack them below ``directory``, once; nothing is installed on the host."""
    tree, archives = directory / "kernel", directory / "archives"
    if tree.exists():
        return Kernel(tree)
    archives.mkdir(parents=True, exist_ok=True)
    try:
        _download(archives)
    except subprocess.CalledProcessError:  # the host's package lists are missing, or older than the mirror
        _apt("apt-get", "update")
        _download(archives)
    for archive in archives.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", archive, directory / "unpacked"], check=True)
    (directory / "unpacked").rename(tree)
    return Kernel(tree)


def early_modules(dependencies: str) -> list[str]:
    """Return the paths of the early modules, each after what it needs; ``dependencies`` is modules.dep(5)'s text."""
    needs = {path: rest.split() for path, _, rest in (line.partition(":") for line in dependencies.splitlines())}
    by_name = {Path(path).stem.replace("-", "_"): path for path in needs}
    ordered: list[str] = []
    for name in _EARLY:
        path = by_name[name]
        ordered += [each for each in (*reversed(needs[path]), path) if each not in ordered]
    return ordered


def make_initrd(kernel: Kernel, dependencies: str, target: Path) -> None:
    """Write the initial RAM disk: busybox, the early modules, and a script that mounts the root and goes there."""
    tree = target.with_suffix(".tree")
    for name in ("bin", "modules", "dev", "proc", "root"):
        (tree / name).mkdir(parents=True)
    modules = early_modules(dependencies)
    for path in modules:
        (tree / "modules" / Path(path).name).write_bytes((kernel.modules / path).read_bytes())
    (tree / "bin/busybox").write_bytes(kernel.busybox.read_bytes())
    (tree / "bin/busybox").chmod(0o755)
    (tree / "modules/order").write_text("".join(f"{Path(path).name}\n" for path in modules))
    (tree / "init").write_bytes((GUEST / "initrd.sh").read_bytes())
    (tree / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    with target.open("wb") as archive:
        subprocess.run(
            [kernel.busybox, "cpio", "-o", "-H", "newc"], input=names.encode(), stdout=archive, cwd=tree, check=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
