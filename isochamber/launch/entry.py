"""One entry of containers.json, checked: what the launcher is told to do.

The file is ours, but a damaged or hand-edited one must give one line and not a
half-made container, so every field is checked for type and range before anything
is made. A *plan* (the build sandbox) is the same shape with a few keys more.
"""

from __future__ import annotations

import os

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.launch import lean
from isochamber.launch.filterset import Seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

VERSION = 1
_STAGE = "entry"
_LARGE = 1 << 20  # bytes of containers.json: some 500 tenants


class Entry:
    """A checked entry; paths that lie in the state directory stay relative to it."""

    __slots__ = (
        "argv",
        "binds",
        "capabilities",
        "cwd",
        "devices",
        "disk",
        "env",
        "gid",
        "home",
        "home_fd",
        "hostname",
        "ipc",
        "limits",
        "limits_required",
        "lowers",
        "name",
        "net",
        "net_digest",
        "network",
        "overlay",
        "read_only",
        "rlimits",
        "seccomp",
        "service",
        "tid",
        "timeout",
        "tmpfs",
        "uid",
        "uid_base",
        "uid_count",
        "upper",
        "volatile",
        "workdir",
    )  # fmt: skip

    def __init__(self, raw: Mapping[str, Any]) -> None:
        field = _Fields(raw)
        self.name: str = field.text("name")
        self.tid: str = field.text("tid")
        if len(self.tid) != 32 or not set(self.tid) <= set("0123456789abcdef"):
            raise field.wrong("tid", "32 hex digits")
        if field.number("version", 0, 1 << 30) != VERSION:
            raise field.wrong("version", str(VERSION))
        self.argv: list[str] = field.texts("argv")
        if not self.argv or not self.argv[0]:
            raise field.wrong("argv", "at least one word")
        self.env: dict[str, str] = field.mapping("env")
        self.cwd: str = field.absolute("cwd")
        self.hostname: str = field.text("hostname")
        self.uid_count: int = field.number("uid_count", 1, 1 << 31)
        self.uid_base: int = field.number("uid_base", 1, (1 << 32) - 2 - self.uid_count)
        self.uid: int = field.number("uid", 0, self.uid_count - 1)
        self.gid: int = field.number("gid", 0, self.uid_count - 1)
        self.lowers: list[str] = [field.below_root("lowers", path) for path in field.texts("lowers")]
        if not self.lowers:
            raise field.wrong("lowers", "at least the base")
        self.upper: str = field.below_root("upper", field.text("upper"))
        self.workdir: str = field.below_root("workdir", field.text("workdir"))
        self.overlay: str = field.below_root("overlay", field.text("overlay"))
        self.home: str = field.below_root("home", field.text("home"))
        self.ipc: str | None = None if raw.get("ipc") is None else field.absolute("ipc")
        self.network: str = field.text("network")
        if self.network not in {"none", "bridge", "host"}:
            raise field.wrong("network", "none, bridge or host")
        self.net: Mapping[str, Any] | None = _net(field, raw)
        self.net_digest: str | None = None if self.net is None else self.net["digest"]
        if (self.net_digest is not None) != (self.network == "bridge"):
            raise field.wrong("net", "an object with network bridge, else null")
        self.capabilities: list[str] = field.texts("capabilities")
        self.tmpfs: dict[str, int] = field.numbers("tmpfs")
        self.rlimits: dict[str, int] = field.numbers("rlimits")
        self.seccomp: Seccomp = Seccomp(raw.get("seccomp"), field.wrong)
        # None: a build's sandbox, which nobody supervises.
        self.service: Service | None = (
            None if field.present("service") is None else Service(field.mapping_of_any("service"))
        )
        self.limits: dict[str, int] = field.numbers("limits")
        if "swap" in self.limits and "memory" not in self.limits:
            raise field.wrong("limits", "complete: swap needs memory beside it")
        self.limits_required: list[str] = field.texts("limits_required")
        self.devices: list[Device] = [Device(device) for device in field.objects("devices")]
        self.read_only: bool = field.flag("read_only")
        self.disk: int | None = None if field.present("disk") is None else field.number("disk", 1, 1 << 62)
        # Only a plan has these.
        self.volatile: bool = raw.get("volatile") is True
        self.home_fd: int | None = field.number("home_fd", 0, 1 << 20) if "home_fd" in raw else None
        self.binds: list[Bind] = [Bind(bind) for bind in field.objects("binds")] if "binds" in raw else []
        self.timeout: int | None = field.number("timeout", 1, 1 << 31) if "timeout" in raw else None


def _net(field: _Fields, raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return ``net``, whose digest is all that a start reads; ``isochamber net join`` checks the rest."""
    net = raw.get("net", "")
    if net is None:
        return None
    if not isinstance(net, dict):
        raise field.wrong("net", "an object or null")
    digest = net.get("digest")
    if not isinstance(digest, str) or len(digest) != 40 or not set(digest) <= set("0123456789abcdef"):
        raise field.wrong("net", "an object with a digest")
    return net


class Device:
    """A device of the host that the tenant gets, at the same path."""

    __slots__ = ("path", "read_only")

    def __init__(self, raw: Mapping[str, Any]) -> None:
        field = _Fields(raw)
        self.path: str = field.absolute("path")
        parts = self.path.split("/")
        if len(parts) < 3 or parts[1] != "dev" or not all(parts[2:]) or {".", ".."} & set(parts):
            raise field.wrong("path of a device", "below /dev")
        self.read_only: bool = field.flag("read_only")


class Bind:
    """A directory of the host that a plan shows to the sandbox; ``source`` may be relative to the state directory."""

    __slots__ = ("idmap", "read_only", "source", "target")

    def __init__(self, raw: Mapping[str, Any]) -> None:
        field = _Fields(raw)
        self.source: str = field.text("source")
        self.target: str = field.absolute("target")
        self.read_only: bool = raw.get("read_only") is True
        self.idmap: bool = raw.get("idmap") is True


class Service:
    """How the supervisor treats the tenant; times in seconds, sizes in bytes."""

    __slots__ = (
        "after", "health", "journald", "log_count", "log_size", "ready", "restart", "retries", "stop_grace",
        "stop_signal", "warm",
    )  # fmt: skip

    def __init__(self, raw: Mapping[str, Any]) -> None:
        field = _Fields(raw)
        self.restart: str = field.one_of("restart", ("no", "on-failure", "always"))
        self.retries: int = field.number("retries", 0, 1000)
        self.after: list[str] = field.texts("after")
        self.ready: str = field.one_of("ready", ("started", "notify"))
        self.health: Health | None = None if field.present("health") is None else Health(field.mapping_of_any("health"))
        stop = _Fields(field.mapping_of_any("stop"))
        self.stop_signal: int = getattr(lean.signal, f"SIG{stop.text('signal')}", 0)
        if not self.stop_signal:
            raise stop.wrong("signal", "the name of a signal without SIG")
        self.stop_grace: int = stop.number("grace", 0, 3600)
        self.warm: int = field.number("warm", 0, 1)
        logs = _Fields(field.mapping_of_any("logs"))
        self.log_size: int = logs.number("size", 1, 1 << 46)
        self.log_count: int = logs.number("count", 1, 100)
        self.journald: bool = logs.flag("journald")


class Health:
    """A command that tells whether the tenant is well; times in seconds."""

    __slots__ = ("argv", "interval", "retries", "start_period", "timeout")

    def __init__(self, raw: Mapping[str, Any]) -> None:
        field = _Fields(raw)
        self.argv: list[str] = field.texts("argv")
        if not self.argv:
            raise field.wrong("argv", "at least one word")
        self.interval: int = field.number("interval", 1, 86400)
        self.timeout: int = field.number("timeout", 1, 86400)
        self.retries: int = field.number("retries", 1, 1000)
        self.start_period: int = field.number("start_period", 0, 86400)


class _Fields:
    """Typed look-ups in a raw entry; what is wrong becomes one line that names the field."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        if not isinstance(raw, dict):
            raise IsochamberError("an entry of containers.json is not an object", stage=_STAGE, hint=_HINT)
        self.raw = raw

    def wrong(self, key: str, expected: str) -> IsochamberError:
        name = self.raw.get("name")
        return IsochamberError(
            f"{key} in containers.json is not {expected}",
            stage=_STAGE,
            tenant=name if isinstance(name, str) else None,
            hint=_HINT,
        )

    def text(self, key: str) -> str:
        value = self.raw.get(key)
        if not isinstance(value, str) or not value or "\0" in value:
            raise self.wrong(key, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.raw.get(key)
        if not isinstance(value, list) or not all(isinstance(word, str) and "\0" not in word for word in value):
            raise self.wrong(key, "a list of texts")
        return value

    def mapping(self, key: str) -> dict[str, str]:
        value = self.raw.get(key)
        if not isinstance(value, dict) or not all(
            isinstance(text, str) and "\0" not in text and "\0" not in name and "=" not in name and name
            for name, text in value.items()
        ):
            raise self.wrong(key, "an object of texts")
        return value

    def number(self, key: str, low: int, high: int) -> int:
        value = self.raw.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(key, f"a number from {low} to {high}")
        return value

    def numbers(self, key: str) -> dict[str, int]:
        value = self.raw.get(key)
        if not isinstance(value, dict) or not all(
            isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 63
            for number in value.values()
        ):
            raise self.wrong(key, "an object of numbers")
        return value

    def objects(self, key: str) -> list[Mapping[str, Any]]:
        value = self.raw.get(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.wrong(key, "a list of objects")
        return value

    def present(self, key: str) -> Any:
        if key not in self.raw:
            raise self.wrong(key, "there")
        return self.raw[key]

    def mapping_of_any(self, key: str) -> Mapping[str, Any]:
        value = self.raw.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return value

    def service(self) -> Service | None:
        return None if self.present("service") is None else Service(self.mapping_of_any("service"))

    def one_of(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in allowed:
            raise self.wrong(key, " or ".join(allowed))
        return value

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def absolute(self, key: str) -> str:
        value = self.text(key)
        if not value.startswith("/"):
            raise self.wrong(key, "an absolute path")
        return value

    def below_root(self, key: str, path: str) -> str:
        parts = path.split("/")
        if path.startswith("/") or not all(parts) or "." in parts or ".." in parts or set(path) & set(":,\\"):
            raise self.wrong(f"{key} {path!r}", "a path below the state directory")
        return path


_HINT = "delete the file and run ./doit: it is made anew with the same tids and uid ranges"


def read(root: str, tenant: str) -> Entry:
    """Return the entry of ``tenant`` (a name or a tid); raises IsochamberError (stage "entry").

    The registry writes one entry a line, so only the line that holds the name is parsed, and of a
    large file only a few are read: a start does not get slower with the number of tenants.
    """
    path = f"{root}/{paths.CONTAINERS}"
    try:
        with open(path, "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > _LARGE:
                from isochamber.launch import search  # noqa: PLC0415 - what few machines need

                raw = search.by_name(file.fileno(), size, tenant)
                if raw is not None:
                    return Entry(raw)
            content = file.read()
    except FileNotFoundError as error:
        raise IsochamberError.from_os(
            error, stage=_STAGE, tenant=tenant, path=path, hint=f"nothing is configured yet: ./doit configure:{tenant}"
        ) from error
    except OSError as error:
        raise IsochamberError.from_os(error, stage=_STAGE, tenant=tenant, path=path) from error
    raw = _on_its_own_line(content, tenant) or _in_the_whole(content, tenant, path)
    if raw is None:
        raise IsochamberError(
            "is not configured", stage=_STAGE, tenant=tenant, path=path, hint=f"./doit configure:{tenant}"
        )
    return Entry(raw)


def _on_its_own_line(content: bytes, tenant: str) -> Mapping[str, Any] | None:
    needle = lean.quote(tenant).encode()
    found = []
    at = content.find(needle)  # one search of the bytes: no list of thousands of lines is made
    while at >= 0:
        begin, end = content.rfind(b"\n", 0, at) + 1, content.find(b"\n", at)
        end = len(content) if end < 0 else end
        try:
            found.append(lean.parse(content[begin:end].rstrip(b", \r")))
        except ValueError:
            return None  # not as the registry writes it: the whole file will tell
        at = content.find(needle, end)
    return _choose(found, tenant)


def _choose(entries: list[object], tenant: str) -> Mapping[str, Any] | None:
    """Return the entry whose tid is ``tenant``, else the one whose name is: one may be named like another's tid."""
    for key in ("tid", "name"):
        for raw in entries:
            if isinstance(raw, dict) and raw.get(key) == tenant:
                return raw
    return None


def _in_the_whole(content: bytes, tenant: str, path: str) -> Mapping[str, Any] | None:
    """Tell a damaged file from one that lacks the tenant, and read one that somebody has laid out anew."""
    entries = _parse(content, path)
    if not isinstance(entries, list):
        raise IsochamberError("is not a list", stage=_STAGE, path=path, hint=_HINT)
    return _choose(entries, tenant)


def parse(text: bytes) -> Entry:
    """Return the entry that ``text`` is, the JSON of one alone; raises IsochamberError (stage "entry")."""
    return Entry(_parse(text, paths.CONTAINERS))  # type: ignore[arg-type] # Entry checks it


def _parse(text: bytes, path: str) -> object:
    try:
        return lean.parse(text)
    except ValueError as error:
        raise IsochamberError(f"is damaged: {error}", stage=_STAGE, path=path, hint=_HINT) from error


def read_plan(descriptor: int) -> Entry:
    """Return the plan written as JSON on ``descriptor``; raises IsochamberError (stage "entry"), OSError."""
    with open(descriptor, "rb") as file:
        return Entry(_parse(file.read(), "plan"))  # type: ignore[arg-type] # Entry checks it
