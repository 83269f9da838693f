"""Where things lie: the state directory and the run-time directory, as names only.

Both halves agree on these names; nothing here touches a disk. Strings, because
the run-time half does not pay for importing pathlib.
"""

import os

DEFAULT_ROOT = "/var/lib/isochamber"
DEFAULT_RUN = "/run/isochamber"
DEFAULT_CGROUP = "isochamber"
DEFAULT_IPC = "/tmp/tenant_ipc"  # noqa: S108 - the host daemon's directory, fixed by the original

JOURNAL = "/run/systemd/journal/socket"
NOTIFY_INSIDE = "/dev/notify"  # where a tenant finds its $NOTIFY_SOCKET: in the one directory that is always ours

# Below the state directory.
CONTAINERS = "containers.json"
NAMESPACE = "namespace"  # the UUID that tids are made in, written once
NAMESPACE_COPY = "namespace.copy"
NEW_TENANTS = "new_tenants"
BASES = "base_fs"
LAYERS = "layers"
TENANTS_FS = "tenants_fs"
TENANTS_PERSIST = "tenants_persist"
CACHE = "cache"
STAGING = "staging"
FILTERS = "filters"  # compiled system call filters: <digest>.bpf
LOGS = "logs"  # one log a product: logs/<kind>-<name>.log

# A base or a layer is a directory of these: ROOTFS is the lowerdir, MANIFEST is written last.
ROOTFS = "rootfs"
LAYER_HOME = "home"
# In tenants_fs/<tid>, each with two slots: what is not used takes the upper over new lowers.
UPPER, WORKDIR = "upper", "workdir"
SLOTS = ("", ".b")
NAME = "name"  # beside a tenant's home: what its tid was made from
DISK_IMAGE = "disk.img"  # in tenants_persist/<tid>: holds tenants_fs/<tid> where limits: disk is given
MANIFEST = "manifest.json"
LISTING = "files.list"  # one line for every name below ROOTFS


def run_directory() -> str:
    """Return the directory for what a reboot may forget (``$ISOCHAMBER_RUN``, else /run/isochamber)."""
    return os.environ.get("ISOCHAMBER_RUN") or DEFAULT_RUN


def cgroup_parent() -> str:
    """Return the cgroup that the tenants' own lie in (``$ISOCHAMBER_CGROUP``), below the root of each hierarchy."""
    return os.environ.get("ISOCHAMBER_CGROUP") or DEFAULT_CGROUP


def namespace_pin(tid: str, kind: str) -> str:
    """Return where the namespace ``kind`` ("user" or "net") of ``tid`` is pinned."""
    return f"{run_directory()}/ns/{tid}/{kind}"


def network_file(tid: str, name: str) -> str:
    """Return a file of the tenant's network, beside its pin: "network", "resolv.conf", "hosts" or "build"."""
    return f"{run_directory()}/ns/{tid}/{name}"


def tenant_lock(tid: str) -> str:
    """Return the lock file that a running tenant's keeper holds (flock, exclusive)."""
    return f"{run_directory()}/tenants/{tid}.lock"


def tenant_record(tid: str) -> str:
    """Return the pid record of a running tenant: JSON, ``pid``, ``keeper``, ``start_time``, ``cgroup``."""
    return f"{run_directory()}/tenants/{tid}.json"


def control_socket() -> str:
    """Return the socket that the supervisor listens on."""
    return f"{run_directory()}/control"


def serve_file(name: str) -> str:
    """Return a file of the supervisor's own, which only root sees: "nursery" (its socket), "nursery.log" ..."""
    return f"{run_directory()}/serve/{name}"


def product_lock(state_id: str, product: str) -> str:
    """Return the lock file under which ``product`` (for example ``layer-<digest>``) is built."""
    return f"{run_directory()}/locks/{state_id}-{product}"
