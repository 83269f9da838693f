"""tenants.yaml and every package -> a Spec, or a SpecError with every problem at once. Nothing is written."""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from isochamber import paths
from isochamber.errors import SpecError, printable
from isochamber.spec import document, grants, package, service, validate
from isochamber.spec import network as networks
from isochamber.spec.document import Document
from isochamber.spec.model import Base, Limits, Network, Package, Seccomp, Spec, Subnets, Tenant

DEFAULT_BASE = "default"
DEFAULT_MIRROR = "http://deb.debian.org/debian"
SNAPSHOT_MIRROR = "http://snapshot.debian.org/archive/debian/{}"

# What limits: may say; the defaults of those that are not here stand in the dataclass.
_LIMITS = {"tmp": 64 << 20, "shm": 64 << 20, "open_files": 1024, "install_seconds": 3600}
_SIZES = ("tmp", "shm", "memory", "swap", "io_read", "io_write", "file_size", "locked_memory", "install_memory", "disk")

# What uname(2) says -> what Debian says, for a 64-bit and a 32-bit userland.
_ARCHITECTURES = {
    "x86_64": ("amd64", "i386"), "aarch64": ("arm64", "armhf"), "armv7l": ("armhf", "armhf"), "i686": ("i386", "i386"),
    "riscv64": ("riscv64", "riscv64"), "ppc64le": ("ppc64el", "ppc64el"), "s390x": ("s390x", "s390x"),
}  # fmt: skip


def host_architecture() -> str:
    """Return Debian's name of this machine's architecture, as its userland counts."""
    machine = os.uname().machine
    return _ARCHITECTURES.get(machine, (machine, machine))[0 if sys.maxsize > 1 << 32 else 1]


def _read(file: Path) -> Document:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise SpecError((f"{file}: can't be read: {error.strerror}",)) from None
    return document.parse(str(file), content)


def root_of(file: Path, root: Path | None = None) -> Path:
    """Return the state directory: ``root``, else $ISOCHAMBER_ROOT, else ``root:`` of ``file``, else the default.

    Only that is looked at: what is configured can be run and listed whatever else is
    wrong in ``file``. Raises SpecError when ``file`` is needed and can't be read.
    """
    given = root or os.environ.get("ISOCHAMBER_ROOT")
    if given:
        return Path(given).absolute()
    return _root_in(_read(file).value)


def _root_in(value: Any) -> Path:
    named = value.get("root") if isinstance(value, dict) else None
    return Path(named) if isinstance(named, str) and named.startswith("/") else Path(paths.DEFAULT_ROOT)


def load(file: Path, root: Path | None = None, only: str | None = None) -> Spec:
    """Validate ``file`` and the packages it names or finds dropped; raises SpecError with every problem.

    With ``only`` (a name or a tid), other tenants' packages are left out, so that one
    hostile package does not stop the operator from running the others.
    """
    return _Loader(file, root, only).load()


class _Loader:
    """One loading: the document, the problems so far."""

    def __init__(self, file: Path, root: Path | None, only: str | None) -> None:
        self._file, self._only = file, only
        self._document = _read(file)
        if self._document.value is None and not self._document.problems:
            self._document.value = {}  # an empty file has no tenants
        given = root or os.environ.get("ISOCHAMBER_ROOT")
        self._root = Path(given).absolute() if given else _root_in(self._document.value)
        self._lines: list[tuple[int, int, str]] = []
        self._wrong: set[tuple[object, ...]] = set()  # paths with a problem
        self._tainted: set[tuple[object, ...]] = set()  # and every path above one
        self._foreign: list[str] = []  # problems in other files
        self._networks: dict[str, Network] = {}
        self._default_network = Network()
        self._subnets = Subnets()
        self._warnings: list[str] = []

    def load(self) -> Spec:
        for place, path, what in self._document.problems:
            self._problem(path, what, (place.line, place.column))
        value = self._document.value
        if value is not None:
            for path, what in validate.problems("tenants", value):
                if path not in self._document.unusable:
                    self._problem(path, what)
        if not isinstance(value, dict):
            self._raise()
        # What has no problem so far is looked at more closely, so that all of them are said at once.
        bases = self._bases(self._mapping("bases"))
        self._read_networks()
        tenants = dict(self._tenants())
        if self._only is None:
            for name, what in service.problems_of_order(tenants, {*self._mapping("tenants"), *tenants}):
                self._problem(("tenants", name, "after"), what)
        if self._lines or self._foreign:
            self._raise()
        return Spec(self._file, self._root, bases, tenants, tuple(self._warnings), self._subnets)

    def _problem(self, path: tuple[object, ...], what: str, where: tuple[int, int] | None = None) -> None:
        place = self._document.place(path)
        line, column = where or (place.line, place.column)
        tenant = f"{printable(path[1])}: " if len(path) > 1 and path[0] == "tenants" else ""
        self._lines.append((line, column, f"{self._file}:{line}:{column}: {tenant}{what}"))
        self._wrong.add(path)
        self._tainted.update(path[:length] for length in range(len(path) + 1))

    def _is_wrong(self, path: tuple[object, ...]) -> bool:
        """Say whether something at, below or above ``path`` was wrong."""
        return path in self._tainted or any(path[:length] in self._wrong for length in range(len(path)))

    def _mapping(self, key: str) -> Mapping[str, Any]:
        """Return the top-level mapping ``key``, empty when there is none."""
        found = self._document.value.get(key)
        return found if isinstance(found, dict) else {}

    def _raise(self) -> NoReturn:
        ordered = [text for _, _, text in sorted(self._lines)]
        raise SpecError(tuple(dict.fromkeys([*ordered, *self._foreign])))

    def _bases(self, value: Mapping[str, Any]) -> dict[str, Base]:
        names = [name for name in dict.fromkeys([DEFAULT_BASE, *value]) if not self._is_wrong(("bases", name))]
        return {name: self._base(name, value.get(name) or {}) for name in names}

    def _base(self, name: str, value: Mapping[str, Any]) -> Base:
        files = {}
        for inside, source in value.get("files", {}).items():
            path = self._file.parent / source
            if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for a path that is too long
                self._problem(
                    ("bases", name, "files", inside), f"{printable(path)} is not a file, must be one of the host's"
                )
            files[inside] = path
        if "snapshot" in value and "mirror" in value:
            self._problem(("bases", name, "snapshot"), "a snapshot is its own mirror, leave one of the two out")
        return Base(
            name=name,
            tool=value.get("tool", "mmdebstrap"),
            suite=value.get("suite", "bookworm"),
            mirror=value.get("mirror", DEFAULT_MIRROR),
            snapshot=value.get("snapshot"),
            variant=value.get("variant", "minbase"),
            architecture=value.get("arch") or host_architecture(),
            packages=tuple(sorted(set(value.get("packages", ())))),
            files=dict(sorted(files.items())),
        )

    def _tenants(self) -> Iterator[tuple[str, Tenant]]:
        named = self._mapping("tenants")
        bases = {DEFAULT_BASE, *self._mapping("bases")}
        defaults = {} if self._is_wrong(("defaults",)) else self._mapping("defaults")
        if defaults.get("base", DEFAULT_BASE) not in bases:
            self._unknown_base(("defaults", "base"), defaults["base"], bases)
            return
        for name in [*named, *self._dropped(set(named))]:
            if self._only is not None and not self._is_only(name):
                continue
            if self._is_wrong(("tenants", name)):
                continue
            own: Mapping[str, Any] = named.get(name) or {}
            if not package.is_name(name):
                self._problem(
                    ("tenants", name), f"is no name for a tenant, must match {package.NAME.pattern} and be no tid"
                )
                continue
            base = own.get("base", defaults.get("base", DEFAULT_BASE))
            if base not in bases:
                self._unknown_base(("tenants", name, "base"), base, bases)
                continue
            found = self._package(name, own)
            if found is not None:
                place = self._document.places.get(("tenants", name))
                network = self._networks.get(name, self._default_network)
                self._check_install(name, base, found, own, defaults)
                yield name, _tenant(name, base, found, network, own, defaults, place, self._subnets)

    def _check_install(
        self, name: str, base: str, found: Package, own: Mapping[str, Any], defaults: Mapping[str, Any]
    ) -> None:
        """Refuse a proxy or mirror that the install script would not reach, unless its network was written down."""
        if found.script is None or "install_network" in own or "install_network" in defaults:
            return
        places: dict[tuple[object, ...], object] = {}
        if base in self._mapping("bases"):
            places["bases", base, "mirror"] = (self._mapping("bases")[base] or {}).get("mirror", "")
        for path, settings in ((("defaults",), defaults), (("tenants", name), own)):
            for key, value in settings.get("install_env", {}).items():
                if key.lower() in networks.PROXIES and (settings is own or key not in own.get("install_env", {})):
                    places[(*path, "install_env", key)] = value
        for place, value in places.items():
            if networks.is_on_loopback(str(value)) and place not in self._wrong:
                whose = "" if place[0] == "tenants" else f"{name}: "
                what = f"{whose}layer: {printable(value)} is on this host's loopback, where its install script"
                self._problem(place, f"{what} does not get; write install_network: host, or another address")

    def _read_networks(self) -> None:
        """Read every tenant's grant, also with ``only``: ports and peers are a matter between tenants."""
        if not self._is_wrong(("subnets",)):
            self._subnets, problems = networks.parse_subnets(self._mapping("subnets"))
            for path, what in problems:
                self._problem(("subnets", *path), what)
        self._default_network = self._network(("defaults", "network"), self._mapping("defaults"))
        named = self._mapping("tenants")
        for name, own in named.items():
            if isinstance(own, dict) and "network" in own:
                self._networks[name] = self._network(("tenants", name, "network"), own)
            else:
                self._networks[name] = self._default_network
        dropped = dict.fromkeys(self._dropped(set(named)), self._default_network)
        problems, warnings = networks.between({**dropped, **self._networks})
        for path, what in problems:
            self._problem(("tenants", *path), what)
        self._warnings += warnings

    def _network(self, path: tuple[object, ...], value: Mapping[str, Any]) -> Network:
        if "network" not in value or self._is_wrong(path):
            return Network()
        found, problems = networks.parse(value["network"])
        for below, what in problems:
            self._problem((*path, *below), what)
        return found

    def _is_only(self, name: str) -> bool:
        if name == self._only:
            return True
        # A tid: only the state directory can say whose it is, so every package counts.
        return self._only is not None and len(self._only) == 32

    def _unknown_base(self, path: tuple[object, ...], base: str, bases: set[str]) -> None:
        self._problem(path, f"there is no base {printable(base)}, allowed: {', '.join(sorted(bases))}")

    def _dropped(self, named: set[str]) -> list[str]:
        """Return the packages in new_tenants/ that tenants.yaml does not name; hidden ones are being copied still."""
        directory = self._root / paths.NEW_TENANTS
        try:
            found = sorted(entry.name for entry in os.scandir(directory))
        except OSError:
            return []
        names = []
        for name in found:
            if name.startswith(".") or name in named:
                continue
            if package.is_name(name):
                names.append(name)
            elif self._only is None:
                text = f"{directory}/{printable(name)}: is no name for a tenant, must match {package.NAME.pattern}"
                self._foreign.append(text)
        return names

    def _package(self, name: str, own: Mapping[str, Any]) -> Package | None:
        given = own.get("package")
        directory = self._file.parent / given if given else self._root / paths.NEW_TENANTS / name
        try:
            return package.read(Path(os.path.normpath(directory)), name)
        except SpecError as error:
            if given and not os.path.isdir(directory):  # noqa: PTH112 - Path.is_dir raises for a path that is too long
                self._problem(("tenants", name, "package"), f"{printable(directory)} is not a directory")
            else:
                self._foreign.extend(error.problems)
            return None


def _tenant(
    name: str,
    base: str,
    found: Package,
    network: Network,
    own: Mapping[str, Any],
    defaults: Mapping[str, Any],
    place: Any,
    subnets: Subnets,
) -> Tenant:
    ipc = own.get("ipc", defaults.get("ipc", "required"))
    return Tenant(
        name=name,
        base=base,
        package=found,
        ipc={"required": paths.DEFAULT_IPC, "none": None}.get(ipc, ipc),
        network=network,
        limits=_limits({**defaults.get("limits", {}), **own.get("limits", {})}),
        service=service.of(own, defaults),
        capabilities=tuple(sorted(set(own.get("capabilities", defaults.get("capabilities", ()))))),
        devices=grants.devices(own.get("devices", defaults.get("devices", []))),
        read_only={**defaults.get("filesystem", {}), **own.get("filesystem", {})}.get("read_only", False),
        install_env={**defaults.get("install_env", {}), **own.get("install_env", {})},
        install_network=own.get("install_network", defaults.get("install_network", "bridge")),
        subnets=subnets,
        seccomp=_seccomp(_long(own.get("seccomp", {})), _long(defaults.get("seccomp", {}))),
        place=place,
    )


def _long(seccomp: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the long form: ``seccomp: kill`` is ``seccomp: {mode: kill}``."""
    return {"mode": seccomp} if isinstance(seccomp, str) else seccomp


def _seccomp(own: Mapping[str, Any], defaults: Mapping[str, Any]) -> Seccomp:
    approved = frozenset([*defaults.get("approved", ()), *own.get("approved", ())])
    return Seccomp(own.get("mode", defaults.get("mode", "kill")), approved)


def half_of_memory() -> int:
    """Return half of this machine's memory in bytes: what a tenant may use that was given no limit."""
    pages: int = os.sysconf("SC_PHYS_PAGES")
    return pages // 2 * os.sysconf("SC_PAGE_SIZE")


def _limits(named: Mapping[str, Any]) -> Limits:
    values = {**_LIMITS, "memory": half_of_memory(), "install_memory": half_of_memory(), **named}
    best_effort = values.pop("best_effort", False)
    for key in _SIZES:
        if key in values:
            values[key] = validate.parse_size(values[key], zero=key == "swap")
    return Limits(**values, required=() if best_effort else tuple(sorted(set(named) - {"best_effort"})))
