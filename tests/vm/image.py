"""The guest's disks: Debian from the project's own base and layer code, with the project and its Python packages in it.

What is put together is an overlay of four lowers, made and read in a mount
namespace of its own: the project, the kernel's modules, a dependency layer that
the project built, the base below it. mke2fs(8) copies it into a disk image.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import PROJECT
from tests.vm import selection
from tests.vm.kernel import GUEST, Kernel

INSIDE = "/opt/isochamber"
PACKAGES = (
    "python3", "kmod", "procps", "iproute2", "nftables", "netbase", "libseccomp2", "strace", "libcap2-bin", "e2fsprogs",
    "xfsprogs", "gcc", "libc6-dev", "iperf3", "systemd",
)  # fmt: skip

# Of the test environment's packages, those that no test imports: large, and of no use inside.
_NOT_INSIDE = (
    "mypy*",
    "ruff*",
    "grimp*",
    "import*linter*",
    "pip*",
    "setuptools*",
    "ast_serialize*",
    "*-stubs",
    "librt*",
)
_NOT_COPIED = (".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", ".doit*")

_ASSEMBLE = r"""
set -eu
mount -t tmpfs tmpfs "$WORK"
mkdir "$WORK/upper" "$WORK/work" "$WORK/root"
mount -t overlay -o "lowerdir=$LOWERS,upperdir=$WORK/upper,workdir=$WORK/work" overlay "$WORK/root"
cd "$WORK/root"
chroot . depmod "$RELEASE"
chroot . systemctl enable --quiet isochamber-guest.service
chroot . python3 -m venv --without-pip "$INSIDE/.venv"
mkdir -p srv var/tmp
mknod -m 666 dev/null c 1 3
cp "usr/lib/modules/$RELEASE/modules.dep" "$DEPENDENCIES"
chroot . "$INSIDE/.venv/bin/python" -m compileall -q "$INSIDE/isochamber" "$INSIDE/tests" "$INSIDE/.venv/lib" || :
# pytest rewrites the tests' assertions at their first import, and keeps what it made: here it costs a second.
mount -t proc proc proc
chroot . sh -c "cd $INSIDE && .venv/bin/python -m pytest -q -p no:cacheprovider --collect-only $COLLECT"
umount proc
mke2fs -q -t ext4 -O ^has_journal -L root -d . "$IMAGE" "$SIZE"
"""


def _environment_packages() -> Path:
    return next((PROJECT / ".venv/lib").glob("python3.*/site-packages"))


def _copy_python_packages(target: Path) -> None:
    """Put what the tests import into ``target``, for the guest's Python: Debian 12's."""
    ours = _environment_packages()
    if ours.parent.name == "python3.11":
        shutil.copytree(ours, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", *_NOT_INSIDE))
        return
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", target,
            "--python-version", "3.11", "--only-binary", ":all:", "--no-deps", "--require-hashes",
            "--requirement", PROJECT / "requirements/test.lock",
        ],
        check=True, timeout=600,
    )  # fmt: skip


def _project_tree(tree: Path, kernel: Kernel) -> None:
    """Make the uppermost lower: the project at its place inside, the modules, and the guest's PID 1."""
    inside = tree / INSIDE.strip("/")
    shutil.copytree(PROJECT, inside, symlinks=True, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    packages = inside / ".venv/lib/python3.11/site-packages"
    packages.parent.mkdir(parents=True)
    _copy_python_packages(packages)
    (packages / "isochamber.pth").write_text(f"{INSIDE}\n")
    modules = tree / "usr/lib/modules"
    modules.mkdir(parents=True)
    shutil.copytree(kernel.modules, modules / kernel.release, symlinks=True)
    for name in ("build", "source"):
        (modules / kernel.release / name).unlink(missing_ok=True)
    (tree / "usr/sbin").mkdir(parents=True)
    shutil.copyfile(GUEST / "init.sh", tree / "usr/sbin/isochamber-guest")
    (tree / "usr/sbin/isochamber-guest").chmod(0o755)
    for source, target in (
        (PROJECT / "data/bin/isochamber", inside / ".venv/bin/isochamber"),
        # For the tests of power cuts and units: a base of one program.
        (GUEST / "mmdebstrap", tree / "usr/local/bin/mmdebstrap"),
        (kernel.busybox, tree / "usr/lib/isochamber-guest/busybox"),
    ):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755)
    # For a machine whose PID 1 is systemd.
    units = tree / "etc/systemd/system"
    units.mkdir(parents=True)
    shutil.copyfile(GUEST / "agent.service", units / "isochamber-guest.service")


def _layer(root: Path, directory: Path) -> tuple[Path, Path]:
    """Let the project build the guest's dependency layer in the state directory ``root``; return it and its base."""
    package = directory / "guest"
    (package / "progs").mkdir(parents=True)
    install = f"apt-get update && apt-get install -y --no-install-recommends {' '.join(PACKAGES)}"
    (package / "progs/install_deps.sh").write_text(f"#!/bin/sh\nset -e\n{install}\n")
    (package / "progs/install_deps.sh").chmod(0o755)
    (package / "config.json").write_text(
        json.dumps({"tid": "", "cname": "guest", "dependencies": "/home/install_deps.sh", "init": "/bin/true"})
    )
    tenants = directory / "guest.yaml"
    tenants.write_text(
        f"root: {root}\nbases: {{default: {{packages: []}}}}\n"
        f"tenants: {{guest: {{package: {package}, ipc: none, install_network: host}}}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "isochamber.tasks", "install_deps:guest"],
        env={**os.environ, "ISOCHAMBER_TENANTS": str(tenants)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (layer,) = (path for path in (root / "layers").iterdir() if not path.name.startswith("."))
    (base,) = (root / "base_fs").iterdir()
    return layer / "rootfs", base / "rootfs"


def make_root(root: Path, kernel: Kernel, directory: Path) -> tuple[Path, str]:
    """Make the guest's root disk; return the image and the text of modules.dep(5). ``root`` is a state directory."""
    layer, base = _layer(root, directory)
    tree, work = directory / "tree", directory / "work"
    _project_tree(tree, kernel)
    collect = [*selection.whole(), *selection.chosen()]
    work.mkdir()
    image, dependencies = directory / "root.img", directory / "modules.dep"
    environment = {
        "WORK": str(work), "LOWERS": f"{tree}:{layer}:{base}", "RELEASE": kernel.release, "INSIDE": INSIDE,
        "DEPENDENCIES": str(dependencies), "IMAGE": str(image), "SIZE": "2G", "COLLECT": " ".join(collect),
    }  # fmt: skip
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", _ASSEMBLE],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return image, dependencies.read_text()


def make_data(image: Path, content: Path | None, size: str = "2G") -> Path:
    """Make a data disk with ``content`` in it; sparse, so that only what is written costs room."""
    source = ["-d", str(content)] if content is not None else []
    subprocess.run(["mke2fs", "-q", "-t", "ext4", *source, image, size], check=True, timeout=300)
    return image
