"""System call filters: which programs a tenant's start loads, and their compilation by libseccomp.

A program is data first: its digest is that of its rules, so that whether one is on
disk is known without compiling anything. The bytes lie in ``filters/<digest>.bpf``,
are written once, and never changed.

What a tenant gets, in the order of loading (of two refusals the later one's errno counts):

    known    lets through every call that was reviewed, and the usual sockets; the rest answers ENOSYS
    deny     refuses what no tenant needs, with the errno that its programs understand best
    learned  lets through what `isochamber learn` saw, and what was approved; only where something was learned

All of them kill what comes in by another architecture's entry (int 0x80 and x32 on amd64).
"""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from isochamber import paths
from isochamber.build import durable
from isochamber.build.inputs import DIGEST_HEX
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.spec import policy
from isochamber.spec.policy import Condition

_FORMAT = 1  # raised when the compiler below makes other bytes of the same rules

ALLOW, KILL, LOG, NOTIFY = "allow", "kill", "log", "notify"
NO_SUCH_CALL = "ENOSYS"

# What uname(2) calls an architecture, and what libseccomp does.
_ARCHITECTURES = {
    "x86_64": "X86_64", "aarch64": "AARCH64", "riscv64": "RISCV64", "armv7l": "ARM", "armv6l": "ARM", "i686": "X86",
}  # fmt: skip
_PRIVATE_TO_ARM = ("breakpoint", "cacheflush", "set_tls")  # numbers far above all others


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens to one call, or to one use of it."""

    call: str
    action: str  # ALLOW, NOTIFY, or the name of an errno
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """One filter, before it is compiled."""

    architecture: str  # as uname(2) says it
    otherwise: str  # for a call that no rule fits: an action
    rules: tuple[Rule, ...]
    known_up_to: int | None = None  # also let through every call with a name, up to this number

    def digest(self) -> str:
        """Return the digest of all that the bytes depend on."""
        rules = [[rule.call, rule.action, rule.conditions] for rule in self.rules]
        text = json.dumps([_FORMAT, self.architecture, self.otherwise, self.known_up_to, rules], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_HEX]


def machine() -> str:
    """Return this machine's architecture, by its own name."""
    return os.uname().machine


@cache  # also for its digests: a thousand tenants share these
def default(approved: frozenset[str] = frozenset(), architecture: str | None = None) -> tuple[Program, ...]:
    """Return the programs that every tenant gets, less what its operator ``approved``."""
    return _known(approved, architecture or machine()), _deny(approved, architecture or machine())


def _known(approved: frozenset[str], architecture: str) -> Program:
    sockets = {Rule(call, ALLOW, conditions) for call, conditions in policy.ALLOWED_SOCKETS}
    for name in approved & set(policy.DENIED):
        row = policy.DENIED[name]
        if row.call in ("socket", "socketpair"):
            sockets.add(Rule(row.call, ALLOW, row.conditions))
    rules = tuple(sorted(sockets, key=lambda rule: (rule.call, rule.conditions)))
    return Program(architecture, NO_SUCH_CALL, rules, policy.LAST_REVIEWED)


def _deny(approved: frozenset[str], architecture: str) -> Program:
    rows = [row for name, row in sorted(policy.DENIED.items()) if name not in approved]
    return Program(architecture, ALLOW, tuple(Rule(row.call, row.errno, row.conditions) for row in rows))


@dataclass(frozen=True, slots=True)
class Wanted:
    """The filters of one tenant, in the order of loading."""

    programs: tuple[Program, ...]
    learned: Program | None = None
    mode: str = "none"  # what the learned one does to a call that it does not know

    def entry(self) -> dict[str, object]:
        """Return what containers.json says of them."""
        return {
            "mode": self.mode,
            "filters": [program.digest() for program in self.programs],
            "learned": None if self.learned is None else self.learned.digest(),
        }

    def _all(self) -> tuple[Program, ...]:
        return self.programs if self.learned is None else (*self.programs, self.learned)

    def exist(self, state: State) -> bool:
        """Say whether every one is on disk."""
        return all(state.filter(program.digest()).is_file() for program in self._all())

    def ensure(self, state: State) -> None:
        """Compile what is not on disk; raises IsochamberError (stage "filter")."""
        ensure(state, self._all())


# Compiling


def ensure(state: State, programs: Iterable[Program]) -> None:
    """Compile what is not on disk yet; raises IsochamberError (stage "filter")."""
    for program in programs:
        path = state.filter(program.digest())
        if path.is_file():
            continue
        content = compiled(program)
        try:
            durable.make_directories(state.root / paths.FILTERS)
            durable.write_file(path, content, staging=state.staging)
        except OSError as error:
            raise IsochamberError.from_os(error, stage="filter", path=path) from error


def compiled(program: Program) -> bytes:
    """Return the program's BPF instructions; raises IsochamberError (stage "filter")."""
    seccomp = library()
    if program.architecture not in _ARCHITECTURES:
        raise IsochamberError(
            f"filters for {program.architecture} can't be made", stage="filter",
            hint=f"known are {', '.join(_ARCHITECTURES)}",
        )  # fmt: skip
    try:
        return _compile(seccomp, program)
    except (OSError, ValueError) as error:
        raise IsochamberError(
            f"libseccomp refuses the filter: {error}", stage="filter", hint="this is a bug of isochamber"
        ) from error


def library() -> ModuleType:
    """Return pyseccomp; raises IsochamberError where libseccomp is missing."""
    try:
        import pyseccomp  # noqa: PLC0415 - it searches for the library: 70 ms that a start does not pay
    except (ImportError, RuntimeError, OSError) as error:
        raise IsochamberError(
            f"libseccomp can't be loaded: {error}", stage="filter", hint="apt-get install libseccomp2"
        ) from error
    return pyseccomp  # type: ignore[no-any-return] # it ships no types


def _compile(seccomp: ModuleType, program: Program) -> bytes:
    architecture = getattr(seccomp.Arch, _ARCHITECTURES[program.architecture])
    made = seccomp.SyscallFilter(_action(seccomp, program.otherwise))
    if architecture != seccomp.system_arch():
        made.add_arch(architecture)
        made.remove_arch(seccomp.system_arch())
    made.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)
    made.set_attr(seccomp.Attr.CTL_OPTIMIZE, 2)  # a tree: a call costs the logarithm of the number of rules
    for rule in _expanded(seccomp, architecture, program):
        _add(seccomp, made, architecture, rule)
    with tempfile.TemporaryFile() as file:
        made.export_bpf(file)
        file.seek(0)
        return file.read()


def _add(seccomp: ModuleType, made: object, architecture: int, rule: Rule) -> None:
    # libseccomp takes the number that this machine knows the call by, and translates it.
    number = seccomp.resolve_syscall(seccomp.system_arch(), rule.call)
    if number == -1:
        raise ValueError(f"there is no call {rule.call}")
    if seccomp.resolve_syscall(architecture, rule.call) < 0:
        return  # that architecture has no such call: whoever makes it gets ENOSYS
    conditions = [seccomp.Arg(index, seccomp.MASKED_EQ, mask, value) for index, mask, value in rule.conditions]
    made.add_rule(_action(seccomp, rule.action), number, *conditions)  # type: ignore[attr-defined] # pyseccomp's


def _expanded(seccomp: ModuleType, architecture: int, program: Program) -> list[Rule]:
    if program.known_up_to is None:
        return list(program.rules)
    own = {rule.call for rule in program.rules}
    names = [*_names(seccomp, architecture, program.known_up_to), *_PRIVATE_TO_ARM]
    return [*program.rules, *(Rule(name, ALLOW) for name in names if name not in own)]


def _names(seccomp: ModuleType, architecture: int, last: int) -> list[str]:
    found = []
    for number in range(last + 1):
        try:
            found.append(seccomp.resolve_syscall(architecture, number).decode())
        except ValueError:
            continue  # a hole: a number that no call has
    if policy.REVIEWED not in found:
        raise ValueError(f"this libseccomp does not know {policy.REVIEWED}, it is older than 2.5.4")
    return found


def _action(seccomp: ModuleType, action: str) -> int:
    simple = {ALLOW: seccomp.ALLOW, KILL: seccomp.KILL_PROCESS, LOG: seccomp.LOG, NOTIFY: seccomp.NOTIFY}
    return int(simple[action] if action in simple else seccomp.ERRNO(getattr(errno, action)))
