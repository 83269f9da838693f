"""The state directory as the compile-time half sees it: its own identity, and paths."""

import contextlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from isochamber import paths
from isochamber.build import durable
from isochamber.errors import IsochamberError

_DIRECTORIES = (
    paths.NEW_TENANTS,
    paths.BASES,
    paths.LAYERS,
    paths.TENANTS_FS,
    paths.TENANTS_PERSIST,
    paths.CACHE,
    paths.STAGING,
    paths.FILTERS,
    paths.LOGS,
)


_NAMESPACE_HINT = "restore this file from a backup: the tenants' ids are made in it"


def read_uuid(file: Path) -> uuid.UUID | None:
    """Return the UUID that ``file`` holds, or None when it holds none."""
    try:
        return uuid.UUID(file.read_text().strip())
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class State:
    """One state directory. Making this object touches nothing; :meth:`create` does."""

    root: Path

    @property
    def namespace(self) -> uuid.UUID | None:
        """The UUID that this directory's tids are made in, or None while it has not been created."""
        known = self.__dict__.get("_namespace")
        return known if known is not None else self._read_namespace()

    def _read_namespace(self) -> uuid.UUID | None:
        """Read it, or its copy where the file itself is lost or damaged; raises IsochamberError when both are."""
        first, *_ = files = self.namespace_files()
        # Missing or damaged is told by the one read: another process may be creating it at this moment.
        found = [read_uuid(file) for file in files if os.path.lexists(file)]
        namespace = next(filter(None, found), None)
        if namespace is None:
            if found:
                raise IsochamberError("does not hold a UUID", stage="state", path=first, hint=_NAMESPACE_HINT)
            return None
        self.__dict__["_namespace"] = namespace  # it never changes, and None is never remembered
        return namespace

    def namespace_files(self) -> tuple[Path, Path]:
        """Return where the namespace stands: without it every tenant would get another tid, so it stands twice."""
        return self.root / paths.NAMESPACE, self.root / paths.NAMESPACE_COPY

    @property
    def identifier(self) -> str:
        """A short name that tells this directory's locks from another's."""
        return self.require_namespace().hex[:12]

    def require_namespace(self) -> uuid.UUID:
        """Return the namespace of a directory that exists; RuntimeError otherwise (a bug of ours)."""
        namespace = self.namespace
        if namespace is None:
            raise RuntimeError(f"{self.root} was not created")
        return namespace

    def tid(self, tenant: str) -> str:
        """Return the 32 hex digits that name ``tenant`` here, a UUIDv5 (RFC 9562, 5.5)."""
        return uuid.uuid5(self.require_namespace(), tenant).hex

    def create(self) -> None:
        """Make the directory (0700) and its parts, once; raises IsochamberError when it can't."""
        try:
            if not self.root.is_dir():
                durable.make_directories(self.root)
            if (self.root.stat().st_mode & 0o777) != 0o700:
                self.root.chmod(0o700)  # no host user reaches a tenant's set-uid file or device node through it
            for name in _DIRECTORIES:
                if not (self.root / name).is_dir():
                    durable.make_directories(self.root / name)
            self._write_namespace()
            durable.make_reserve(self.root)
        except OSError as error:
            raise IsochamberError.from_os(
                error, stage="state", hint="run as root, or choose another root: in tenants.yaml"
            ) from error

    def _write_namespace(self) -> None:
        files = self.namespace_files()
        if self.namespace is None:
            persisted = [entry.name for entry in os.scandir(self.root / paths.TENANTS_PERSIST) if len(entry.name) == 32]
            if (
                persisted and self.namespace is None
            ):  # a new one would make orphans of them all, and prune would remove them
                raise IsochamberError(
                    "is lost, and there are tenants", stage="state", path=files[0], hint=_NAMESPACE_HINT
                )
            durable.write_file(files[0], f"{uuid.uuid4()}\n".encode(), exclusive=True, staging=self.staging)
        for file in files:
            if read_uuid(file) != self.require_namespace():
                durable.write_file(file, f"{self.require_namespace()}\n".encode(), staging=self.staging)

    @property
    def containers(self) -> Path:
        """The contract."""
        return self.root / paths.CONTAINERS

    @property
    def staging(self) -> Path:
        """Where everything is built before it is renamed into place."""
        return self.root / paths.STAGING

    def base(self, product: str) -> Path:
        """Return the directory of the base product ``<name>-<digest>``."""
        return self.root / paths.BASES / product

    def layer(self, product: str) -> Path:
        """Return the directory of the layer product ``<recipe>-<observed>``."""
        return self.root / paths.LAYERS / product

    def tenant_fs(self, tid: str) -> Path:
        """Return tenants_fs/<tid>, which holds upper, workdir and overlay."""
        return self._below(paths.TENANTS_FS, tid)

    def tenant_persist(self, tid: str) -> Path:
        """Return tenants_persist/<tid>, which holds home and its manifest."""
        return self._below(paths.TENANTS_PERSIST, tid)

    def _below(self, part: str, name: str) -> Path:
        """Return the path, made once: a run with nothing to do asks for each a dozen times."""
        known: dict[tuple[str, str], Path] = self.__dict__.setdefault("_paths", {})
        if (part, name) not in known:
            known[part, name] = self.root / part / name
        return known[part, name]

    def name_of(self, tid: str) -> str | None:
        """Return the name that a tid was made from, None when nothing says it: a tid can't be turned back."""
        with contextlib.suppress(OSError, ValueError):
            return (self.tenant_persist(tid) / paths.NAME).read_text().strip() or None
        return None

    def filter(self, digest: str) -> Path:
        """Return where the compiled system call filter ``digest`` lies."""
        return self._below(paths.FILTERS, f"{digest}.bpf")

    def home(self, tid: str) -> Path:
        """Return where the tenant's /home is: on its disk image where it has one."""
        inside = self.tenant_fs(tid) / "home"
        return inside if inside.is_dir() else self.tenant_persist(tid) / "home"

    def staging_of(self, tid: str) -> Path:
        """Return where what becomes part of the tenant's upper or /home is staged: on the same file system."""
        inside = self.tenant_fs(tid) / paths.STAGING
        return inside if inside.is_dir() else self.staging

    def log(self, product: str) -> Path:
        """Return the log that errors of ``product`` (``layer-sensor``) name."""
        return self.root / paths.LOGS / f"{product}.log"

    def relative(self, path: Path) -> str:
        """Return ``path`` as containers.json writes it: relative to the state directory."""
        return os.fspath(path.relative_to(self.root))
