"""The validated spec: frozen dataclasses that everything to the right reads.

They are made by :mod:`isochamber.spec.load` and by tests; they can be printed and
compared, and hold no open files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where in an input file a value was written: 1-based line and column, as editors count."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Base:
    """One ``bases:`` entry: what a bootstrap tool is asked to make."""

    name: str
    tool: str  # "mmdebstrap" or "debootstrap"
    suite: str
    mirror: str
    snapshot: str | None  # a timestamp of snapshot.debian.org; replaces mirror when set
    variant: str
    architecture: str  # Debian's name, e.g. "amd64"
    packages: tuple[str, ...]  # sorted, unique
    files: Mapping[str, Path]  # absolute path inside the base -> the operator's file on the host


@dataclass(frozen=True, slots=True)
class ProgFile:
    """One entry of a package's ``progs/``, as the walk saw it (no content was read).

    ``path`` is relative to ``progs/``, with ``/``. ``kind`` is "file" or "directory";
    nothing else is let in. ``identity`` is what fstat(2) said: a file whose identity
    differs when it is opened later was changed in between.
    """

    path: str
    kind: str
    executable: bool
    size: int  # bytes
    identity: tuple[int, int, int, int, int]  # st_dev, st_ino, st_size, st_mtime_ns, st_ctime_ns


@dataclass(frozen=True, slots=True)
class Package:
    """What a tenant handed in: config.json, validated, and the list of its progs/."""

    directory: Path  # absolute
    cname: str
    dependencies: str  # the install script as the tenant sees it ("/home/install_deps.sh"), or ""
    init: str | tuple[str, ...]  # as written
    argv: tuple[str, ...]  # init split into words
    env: Mapping[str, str]
    user: tuple[int, int]  # uid and gid inside
    inputs: tuple[str, ...] | None  # paths below progs/ the install script may see; None: all
    progs: tuple[ProgFile, ...]  # sorted by path

    @property
    def script(self) -> str | None:
        """The install script's path relative to progs/, or None when there is nothing to install."""
        return self.dependencies.removeprefix("/home/") or None


@dataclass(frozen=True, slots=True)
class Device:
    """A device of the host, at the same path inside."""

    path: str
    read_only: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may use at most. Sizes in bytes, counts as numbers; None: no limit of its own."""

    tmp: int  # size of /tmp's tmpfs
    shm: int  # size of /dev/shm's tmpfs
    open_files: int  # RLIMIT_NOFILE, soft and hard
    install_seconds: int  # an install script that runs longer is killed
    memory: int = 1 << 30  # with the page cache and tmpfs that it fills
    swap: int = 0  # besides memory
    processes: int = 512  # threads count
    cpu_weight: int = 100  # 1 to 10000, against its neighbours'
    cpus: float | None = None  # processors' worth of time
    io_weight: int | None = None  # 1 to 1000
    io_read: int | None = None  # bytes a second from the state directory's disk
    io_write: int | None = None
    tmp_inodes: int | None = None  # None: one a page of the size
    shm_inodes: int | None = None
    file_size: int = 16 << 30  # RLIMIT_FSIZE, holes counted
    locked_memory: int = 8 << 20  # RLIMIT_MEMLOCK
    disk: int | None = None  # upper and /home together
    install_memory: int = 1 << 30
    install_processes: int = 4096
    required: tuple[str, ...] = ()  # names that the operator wrote down: not in force is an error, not a warning


@dataclass(frozen=True, slots=True)
class Health:
    """A command that tells whether a tenant is well; times in seconds."""

    argv: tuple[str, ...]
    interval: int = 30
    timeout: int = 30
    retries: int = 3
    start_period: int = 0


@dataclass(frozen=True, slots=True)
class Service:
    """What the supervisor does with a tenant."""

    restart: str = "no"  # "no", "on-failure" or "always"
    retries: int = 0  # restarts after failures in a row; 0: no end
    after: tuple[str, ...] = ()  # names of tenants
    ready: str = "started"  # or "notify"
    health: Health | None = None
    stop_signal: str = "TERM"
    stop_grace: int = 10  # seconds
    warm: int = 0  # sandboxes that wait
    log_size: int = 1 << 20  # bytes a file
    log_count: int = 3
    journald: bool = False


@dataclass(frozen=True, slots=True)
class Port:
    """One published port: what reaches the host's is the tenant's."""

    address: str | None  # of the host; None: every one of it but the loopback's
    host: int
    inside: int
    protocol: str  # "tcp" or "udp"

    def overlaps(self, other: "Port") -> bool:
        """Say whether the two can't both be published."""
        same = (self.host, self.protocol) == (other.host, other.protocol)
        both = {self.address, other.address}
        return same and (len(both) == 1 or (None in both and not any((one or "").startswith("127.") for one in both)))


@dataclass(frozen=True, slots=True)
class Egress:
    """One destination that a tenant may open connections to."""

    host: str  # a CIDR block, or a host name
    is_name: bool
    low: int  # first and last port; 0 and 65535 for all
    high: int
    protocol: str  # "tcp", "udp", "icmp" or "any"


@dataclass(frozen=True, slots=True)
class Rate:
    """Shaping, in bits a second; None: not in that direction. ``queue`` None: the fairest the kernel has."""

    up: int | None
    down: int | None
    queue: str | None


@dataclass(frozen=True, slots=True)
class Allowance:
    """How many bytes (both ways together) a period holds, and what happens then."""

    size: int
    per: str  # "day" or "month", in UTC
    slow: int | None  # bits a second each way when it is used up; None: cut


@dataclass(frozen=True, slots=True)
class Network:
    """What a tenant is granted of the network; everything but ``mode`` needs mode "bridge"."""

    mode: str = "none"  # "none", "bridge" or "host"
    ports: tuple[Port, ...] = ()
    egress_all: bool = False
    egress_dns: bool = False  # the granted resolvers, port 53
    egress: tuple[Egress, ...] = ()
    dns: tuple[str, ...] = ()  # resolvers; none named: the host's
    peers: tuple[str, ...] = ()  # names
    rate: Rate | None = None
    allowance: Allowance | None = None


@dataclass(frozen=True, slots=True)
class Subnets:
    """The blocks that tenants' addresses are taken from; None: derived from the state directory."""

    ipv4: str | None = None
    ipv6: str | None = None


@dataclass(frozen=True, slots=True)
class Seccomp:
    """What the operator says about a tenant's system calls; what it was seen to make is in its learned list."""

    mode: str = "kill"  # what happens to a call outside that list: kill, errno, notify, log; none: it is not applied
    approved: frozenset[str] = frozenset()  # names of policy.DENIED and policy.DANGEROUS


@dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant: the operator's grants joined with its package."""

    name: str
    base: str  # a key of Spec.bases
    package: Package
    ipc: str | None  # host directory bound at /tmp/tenant_ipc, or None for "ipc: none"
    network: Network
    limits: Limits
    install_env: Mapping[str, str]  # added to the install script's environment (a proxy, say)
    service: Service = Service()
    capabilities: tuple[str, ...] = ()  # sorted; without CAP_
    devices: tuple[Device, ...] = ()
    read_only: bool = False  # its root; /home, /tmp and /dev/shm stay writable
    install_network: str = "bridge"  # of the install script: "bridge" (all but the host and tenants), "host" or "none"
    subnets: Subnets = Subnets()  # the spec's
    seccomp: Seccomp = Seccomp()
    place: Place | None = None  # None: dropped into new_tenants/ and not named in tenants.yaml


@dataclass(frozen=True, slots=True)
class Spec:
    """Everything that was asked for, validated as a whole."""

    file: Path  # tenants.yaml
    root: Path  # the state directory, absolute
    bases: Mapping[str, Base]
    tenants: Mapping[str, Tenant]
    warnings: tuple[str, ...] = field(default=())
    subnets: Subnets = field(default=Subnets())
