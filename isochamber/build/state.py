"""The state directory as the compile-time half sees it: its own identity, and paths."""

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
        try:
            namespace = uuid.UUID((self.root / paths.NAMESPACE).read_text().strip())
            self.__dict__["_namespace"] = namespace  # it never changes, and None is never remembered
            return namespace
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise IsochamberError(
                "does not hold a UUID", stage="state", path=self.root / paths.NAMESPACE, hint="restore it from a backup"
            ) from error

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
            if self.namespace is None:
                durable.write_file(self.root / paths.NAMESPACE, f"{uuid.uuid4()}\n".encode(), exclusive=True)
        except OSError as error:
            raise IsochamberError.from_os(
                error, stage="state", hint="run as root, or choose another root: in tenants.yaml"
            ) from error

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
        return self.root / paths.TENANTS_FS / tid

    def tenant_persist(self, tid: str) -> Path:
        """Return tenants_persist/<tid>, which holds home and its manifest."""
        return self.root / paths.TENANTS_PERSIST / tid

    def filter(self, digest: str) -> Path:
        """Return where the compiled system call filter ``digest`` lies."""
        return self.root / paths.FILTERS / f"{digest}.bpf"

    def log(self, product: str) -> Path:
        """Return the log that errors of ``product`` (``layer-sensor``) name."""
        return self.root / paths.LOGS / f"{product}.log"

    def relative(self, path: Path) -> str:
        """Return ``path`` as containers.json writes it: relative to the state directory."""
        return os.fspath(path.relative_to(self.root))
