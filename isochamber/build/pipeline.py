"""One tenant's way from spec to entry: what is current, and what makes it so.

The task graph and the command line both go through here, so that they can't
disagree. Every ``*_current`` only reads (it may remember content digests in
cache/), every ``make_*`` does the work and may be called again.
"""

from collections.abc import Mapping
from pathlib import Path

from isochamber.build import base, contents, disk, durable, entry, filters, home, identity, layer, locks, registry
from isochamber.build.identity import Identity
from isochamber.build.progress import Reporter
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.spec import learned
from isochamber.spec.model import Base, Package, Spec, Tenant


class Pipeline:
    """A spec, its state directory, and what was already computed in this process."""

    def __init__(self, spec: Spec, reporter: Reporter) -> None:
        self.spec = spec
        self.state = State(spec.root)
        self.reporter = reporter
        self._contents: dict[str, Mapping[str, str]] = {}
        self._bases: dict[str, str] = {}
        # Only what is there: what is missing is looked for again.
        self._identities: dict[str, Identity] = {}
        self._layers: dict[str, str] = {}
        self._built: set[str] = set()  # bases
        self._holds = False

    def hold(self) -> None:
        """From now on until this process ends no prune takes anything here: what one task makes the next refers to."""
        self._holds = True
        if self.state.namespace is not None:
            locks.hold_builds(self.state, self.reporter.say)

    def _create(self) -> None:
        self.state.create()
        if self._holds:
            self.hold()

    # The spec's nouns.

    def tenant(self, name: str) -> Tenant:
        """Return the tenant called ``name``; KeyError is a bug of ours, names come from the spec."""
        return self.spec.tenants[name]

    def _base_of(self, tenant: Tenant) -> Base:
        return self.spec.bases[tenant.base]

    def contents_of(self, package: Package) -> Mapping[str, str]:
        """Return the content digests of a package's progs/, hashed at most once a process."""
        key = str(package.directory)
        if key not in self._contents:
            self._contents[key] = contents.digests(self.state, package)
        return self._contents[key]

    def _file_digest(self, path: Path) -> str:
        return contents.file_digest(self.state, path)

    # base_fs

    def base_product(self, name: str) -> str:
        """Return ``<name>-<digest>`` of the base ``name`` as the spec wants it now."""
        if name not in self._bases:
            self._bases[name] = base.product(self.spec.bases[name], self._file_digest)
        return self._bases[name]

    def base_current(self, name: str) -> bool:
        """Say whether that base is on disk."""
        if name not in self._built and base.exists(self.state, self.base_product(name)):
            self._built.add(name)
        return name in self._built

    def make_base(self, name: str) -> None:
        """Build it; raises IsochamberError (stage "base")."""
        self._create()
        with locks.building(self.state, self.reporter.say):
            base.build(self.state, self.spec.bases[name], self._file_digest, self.reporter)

    # dirs

    def identity_of(self, name: str) -> Identity | None:
        """Return the tenant's tid and uid range, or None while it has none."""
        if name not in self._identities:
            found = identity.find(self.state, name)
            if found is None:
                return None
            self._identities[name] = found
        return self._identities[name]

    def dirs_current(self, name: str) -> bool:
        """Say whether its directories are there, on a disk of the size that it is to have."""
        found = self.identity_of(name)
        return found is not None and disk.current(self.state, found.tid, self.tenant(name).limits.disk)

    def make_dirs(self, name: str) -> None:
        """Give the tenant a tid, a uid range and its directories; raises IsochamberError (stage "dirs")."""
        self._create()
        with locks.building(self.state, self.reporter.say):
            self._identities.pop(name, None)
            identity.ensure(self.state, name, self.tenant(name).limits.disk)

    def _require_identity(self, name: str) -> Identity:
        found = self.identity_of(name)
        if found is None:
            raise IsochamberError("has no directories yet", stage="dirs", tenant=name, hint=f"doit dirs:{name}")
        return found

    # install_deps

    def layer_product(self, name: str) -> str | None:
        """Return the layer that serves ``name`` now, or None: no dependencies, or not built yet."""
        if name not in self._layers:
            found = self._find_layer(name)
            if found is None:
                return None
            self._layers[name] = found
        return self._layers[name]

    def _find_layer(self, name: str) -> str | None:
        tenant = self.tenant(name)
        own = self.contents_of(tenant.package)
        recipe = layer.recipe(tenant, self.base_product(tenant.base), own)
        return None if recipe is None else layer.find(self.state, tenant, recipe, own)

    def layer_current(self, name: str) -> bool:
        """Say whether nothing is to be installed, or the layer is on disk."""
        return not self.tenant(name).package.dependencies or self.layer_product(name) is not None

    def make_layer(self, name: str) -> None:
        """Run the install script in its sandbox and seal what it added; raises IsochamberError (stage "layer")."""
        tenant = self.tenant(name)
        with locks.building(self.state, self.reporter.say):
            layer.build(
                self.state,
                tenant,
                self.base_product(tenant.base),
                self.contents_of(tenant.package),
                self._require_identity(name),
                self.reporter,
                former_product=self._former_layer(name),
            )

    def _former_layer(self, name: str) -> str | None:
        found = self.identity_of(name)
        former = None if found is None else registry.read(self.state, salvage=True).get(found.tid)
        return None if former is None else entry.layer_product(former)

    # home

    def _desired_home(self, name: str) -> home.Desired | None:
        """Return what /home is to hold, or None while the layer it depends on is missing."""
        if not self.layer_current(name):
            return None
        return home.desired(self.state, self.contents_of(self.tenant(name).package), self.layer_product(name))

    def home_current(self, name: str) -> bool:
        """Say whether the manifest beside /home records what is wanted now."""
        found, wanted = self.identity_of(name), self._desired_home(name)
        return found is not None and wanted is not None and home.current(self.state, found.tid, wanted)

    def make_home(self, name: str) -> None:
        """Deploy progs/ and the layer's /home by manifest; raises IsochamberError (stage "home")."""
        tid = self._require_identity(name).tid
        with locks.building(self.state, self.reporter.say):
            wanted = self._desired_home(name)
            if wanted is None:
                raise IsochamberError(
                    "its layer is missing", stage="home", tenant=name, hint=f"doit install_deps:{name}"
                )
            home.deploy(self.state, self.tenant(name), tid, wanted, self.reporter)

    # filters, a part of configure: they take milliseconds, and every tenant without grants shares its own

    def learned_file(self, name: str) -> Path:
        """Return where the tenant's learned list is, or will be."""
        return self.state.tenant_persist(self._require_identity(name).tid) / learned.FILE

    def filters_of(self, name: str) -> filters.Wanted:
        """Return the system call filters that the tenant is to have now; raises SpecError for a wrong learned list."""
        grants = self.tenant(name).seccomp
        known = learned.read(self.learned_file(name)) or learned.Learned()
        approved = grants.approved | known.approved
        if grants.mode == "none" or not known.calls:
            return filters.Wanted(filters.default(approved))
        return filters.Wanted(filters.default(approved), filters.learned(known, approved, grants.mode), grants.mode)

    def learn(self, name: str, found: learned.Learned) -> None:
        """Write the tenant's learned list and make its entry of it; raises IsochamberError (stage "learn")."""
        path = self.learned_file(name)
        try:
            durable.write_file(path, learned.text(found, name).encode(), staging=self.state.staging)
        except OSError as error:
            raise IsochamberError.from_os(error, stage="learn", tenant=name, path=path) from error
        self.configure(name)

    # configure

    def wanted_entry(self, name: str, kept: filters.Wanted | None = None) -> dict[str, object] | None:
        """Return the entry as it should stand in containers.json, or None while a part of it is missing."""
        tenant, found = self.tenant(name), self.identity_of(name)
        if found is None or not self.base_current(tenant.base) or not self.layer_current(name):
            return None
        base_product, layer_product = self.base_product(tenant.base), self.layer_product(name)
        slot = entry.choose_slot(self.state, found.tid, entry.lowers(base_product, layer_product))
        return entry.make(
            self.state,
            tenant,
            found,
            base_product,
            layer_product,
            self.contents_of(tenant.package),
            (kept or self.filters_of(name)).entry(),
            self.spec.subnets,
            slot,
            disk.size(self.state, found.tid),
        )

    def configured(self, name: str) -> bool:
        """Say whether containers.json holds that entry, its filters are there, and the upper belongs to its lowers."""
        if self.identity_of(name) is None:
            return False
        kept = self.filters_of(name)
        wanted = self.wanted_entry(name, kept)
        return wanted is not None and entry.current(self.state, wanted) and kept.exist(self.state)

    def configure(self, name: str) -> None:
        """Write the entry, with a fresh upper when the lowers changed; raises IsochamberError (stage "configure")."""
        self._require_identity(name)
        with locks.building(self.state, self.reporter.say):
            wanted = self.wanted_entry(name)
            if wanted is None:
                raise IsochamberError(
                    "its base, layer or directories are missing",
                    stage="configure",
                    tenant=name,
                    hint="run ./doit again",
                )
            self.filters_of(name).ensure(self.state)
            entry.put(self.state, wanted, self.reporter)
