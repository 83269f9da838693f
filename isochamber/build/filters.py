"""System call filters: which programs a tenant's start loads, and their compilation by libseccomp.

A program is data first: its digest is that of its rules, so that whether one is on
disk is known without compiling anything. The bytes lie in ``filters/<digest>.bpf``,
are written once, and never changed.

What a tenant gets, in the order of loading (of two refusals the later one's errno counts):

    known    lets through every call that was reviewed, and the usual sockets; the rest answers ENOSYS
    deny     refuses what no tenant needs, with the errno that its programs understand best
    learned  lets through what `isochamber learn` saw, less what is dangerous and was not approved, and what every
             program needs; only where something was learned

All of them kill what comes in by another architecture's entry (int 0x80 and x32 on amd64).
"""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType

from isochamber import paths
from isochamber.build import durable
from isochamber.build.inputs import DIGEST_HEX
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.spec import arguments, policy
from isochamber.spec.learned import Learned
from isochamber.spec.policy import Condition

_FORMAT = 1  # raised when the compiler below makes other bytes of the same rules

ALLOW, KILL, LOG, NOTIFY = "allow", "kill", "log", "notify"
NO_SUCH_CALL = "ENOSYS"

# What uname(2) calls an architecture, and what libseccomp does.
_ARCHITECTURES = {
    "x86_64": "X86_64", "aarch64": "AARCH64", "riscv64": "RISCV64", "armv7l": "ARM", "armv6l": "ARM", "i686": "X86",
}  # fmt: skip
_FAR_ABOVE = 512  # no kernel has so many calls yet
_PRIVATE_TO_ARM = ("breakpoint", "cacheflush", "set_tls")  # numbers far above all others


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens to one call, or to one use of it."""

    call: str
    action: str  # ALLOW, NOTIFY, the name of an errno, or policy.PRETENDS
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class Program:
    """One filter, before it is compiled."""

    architecture: str  # as uname(2) says it
    otherwise: str  # for a call that no rule fits: an action
    rules: tuple[Rule, ...]
    known_up_to: int | None = None  # also let through every call with a name, up to this number
    newer: bool = False  # also let through the numbers of calls that nobody has looked at: another filter answers

    def digest(self) -> str:
        """Return the digest of all that the bytes depend on."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        rules = [[rule.call, rule.action, rule.conditions] for rule in self.rules]
        text = json.dumps(
            [_FORMAT, self.architecture, self.otherwise, self.known_up_to, self.newer, rules], separators=(",", ":")
        )
        return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_HEX]


def machine() -> str:
    """Return this machine's architecture, by its own name."""
    return os.uname().machine


@cache  # also for its digests: a thousand tenants share these
def default(approved: frozenset[str] = frozenset(), architecture: str | None = None) -> tuple[Program, ...]:
    """Return the programs that every tenant gets, less what its operator ``approved``."""
    return _known(approved, architecture or machine()), _deny(approved, architecture or machine())


MODES = {"kill": KILL, "errno": "EPERM", "notify": NOTIFY, "log": LOG}


def learned(known: Learned, approved: frozenset[str], mode: str, architecture: str | None = None) -> Program:
    """Return the allow list of one tenant: what was seen and is harmless or approved, and what is approved.

    What the default filters refuse is left to them: a program that asks for ``clone3``, or
    for a call of a later kernel, is answered as it was while it was learned.
    """
    rules = {Rule(name, ALLOW) for name in policy.ALWAYS}
    rules.update(Rule(row.call, ALLOW, row.conditions) for row in policy.DENIED.values())
    rules.update(_use(name) for name in (known.names() - _questionable(known)) | approved)
    # What is let through as a whole is not let through once more in parts.
    whole = {rule.call for rule in rules if not rule.conditions}
    kept = [rule for rule in rules if not rule.conditions or rule.call not in whole]
    return Program(architecture or machine(), MODES[mode], tuple(sorted(kept, key=_order)), newer=True)


def questions(known: Learned, approved: frozenset[str]) -> dict[str, str]:
    """Return what of a learned list is dangerous and not approved yet, with the reason."""
    names = sorted(_questionable(known) - approved)
    return {name: policy.DENIED[name].why if name in policy.DENIED else policy.DANGEROUS[name] for name in names}


def _questionable(known: Learned) -> set[str]:
    return {name for name in known.names() if name in policy.DENIED or name in policy.DANGEROUS}


def _use(name: str) -> Rule:
    """Return the rule that lets ``name`` through: a call, call:VALUE, or the name of a denied row."""
    if name in policy.DENIED:
        return Rule(policy.DENIED[name].call, ALLOW, policy.DENIED[name].conditions)
    call, _, value = name.partition(":")
    if not value:
        return Rule(call, ALLOW)
    argument = arguments.MATTERS[call]
    return Rule(call, ALLOW, ((argument.index, arguments.LOW_32_BITS, argument.number(value)),))


def _order(rule: Rule) -> tuple[str, tuple[Condition, ...]]:
    return rule.call, rule.conditions


@dataclass(frozen=True, slots=True)
class Learning:
    """The filters of a run that learns, and what is refused by whoever answers: what could be approved and is not."""

    wanted: "Wanted"
    refused: tuple[policy.Denied, ...]

    def entry(self, notes: int) -> dict[str, object]:
        """Return what the plan says; ``notes`` is the descriptor that the run's notes go to."""
        seccomp = library()
        refused: dict[int, list[object]] = {}
        for row in self.refused:
            number = seccomp.resolve_syscall(seccomp.system_arch(), row.call)
            refused.setdefault(number, []).append([row.name, getattr(errno, row.errno), row.conditions])
        matters = {
            seccomp.resolve_syscall(seccomp.system_arch(), call): argument.index
            for call, argument in arguments.MATTERS.items()
        }
        learning = {"notes": notes, "matters": matters, "refused": refused}
        return {**self.wanted.entry(), "learning": learning}


def learning(approved: frozenset[str]) -> Learning:
    """Return what a run that learns is started with.

    What nobody may approve stays refused by the kernel. What could be approved is refused
    by whoever answers, so that it is noted that the tenant tried.
    """
    grantable = frozenset(name for name, row in policy.DENIED.items() if row.approvable)
    rules = tuple(Rule(name, ALLOW) for name in sorted(policy.ALWAYS))
    program = Program(machine(), NOTIFY, rules)
    refused = tuple(policy.DENIED[name] for name in sorted(grantable - approved))
    return Learning(Wanted(default(grantable), program, "learn"), refused)


def name_of(number: int) -> str:
    """Return the name of one of this machine's system calls; raises ValueError for a number that has none."""
    seccomp = library()
    return str(seccomp.resolve_syscall(seccomp.system_arch(), number).decode())


def _known(approved: frozenset[str], architecture: str) -> Program:
    sockets = {Rule(call, ALLOW, conditions) for call, conditions in policy.ALLOWED_SOCKETS}
    for name in approved & set(policy.DENIED):
        row = policy.DENIED[name]
        if row.call in ("socket", "socketpair"):
            sockets.add(Rule(row.call, ALLOW, row.conditions))
    rules = tuple(sorted(sockets, key=_order))
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
        compiled = all(state.filter(program.digest()).is_file() for program in self._all())
        return compiled and (self.learned is None or _names_file(state).is_file())

    def ensure(self, state: State) -> None:
        """Compile what is not on disk; raises IsochamberError (stage "filter")."""
        ensure(state, self._all())
        if self.learned is not None:
            _ensure_names(state)


# Compiling


def ensure(state: State, programs: Iterable[Program]) -> None:
    """Compile what is not on disk yet; raises IsochamberError (stage "filter")."""
    for program in programs:
        path = state.filter(program.digest())
        if path.is_file():
            continue
        content = compiled(program)
        try:
            for directory in (state.root / paths.FILTERS, state.staging):
                durable.make_directories(directory)
            durable.write_file(path, content, staging=state.staging)
        except OSError as error:
            raise IsochamberError.from_os(error, stage="filter", path=path) from error


def _names_file(state: State) -> Path:
    return state.root / paths.FILTERS / f"names-{machine()}.json"


def _ensure_names(state: State) -> None:
    """Write what the launcher calls calls and their arguments by when it reports one; it has no libseccomp."""
    seccomp = library()
    calls = {
        str(seccomp.resolve_syscall(seccomp.system_arch(), name)): name
        for name in _names(seccomp, seccomp.system_arch(), policy.LAST_REVIEWED)
    }
    matters = {
        call: [argument.index, argument.bits, {str(number): name for name, number in argument.names.items()}]
        for call, argument in arguments.MATTERS.items()
    }
    content = json.dumps({"calls": calls, "matters": matters}).encode()
    path = _names_file(state)
    try:
        if not path.is_file() or path.read_bytes() != content:
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
            f"the filter can't be compiled: {error}", stage="filter", hint="if seccomp.yaml was edited, look there"
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
    if program.newer and architecture == seccomp.system_arch():  # libseccomp translates no number without a name
        for number in range(policy.LAST_REVIEWED + 1, _FAR_ABOVE):
            made.add_rule(seccomp.ALLOW, number)
    with tempfile.TemporaryFile() as file:
        made.export_bpf(file)
        file.seek(0)
        return file.read()


def _add(seccomp: ModuleType, made: object, architecture: int, rule: Rule) -> None:
    # libseccomp takes the number that this machine knows the call by, and translates it.
    number = seccomp.resolve_syscall(seccomp.system_arch(), rule.call)
    if number == -1:
        raise ValueError(f"there is no system call {rule.call}")
    if seccomp.resolve_syscall(architecture, rule.call) < 0:
        for instead in _replaced(rule):
            _add(seccomp, made, architecture, instead)
        return
    conditions = [_argument(seccomp, condition) for condition in rule.conditions]
    made.add_rule(_action(seccomp, rule.action), number, *conditions)  # type: ignore[attr-defined] # pyseccomp's


def _argument(seccomp: ModuleType, condition: Condition) -> object:
    index, mask, value = condition
    if mask == policy.NOT_NULL:
        return seccomp.Arg(index, seccomp.NE, 0)
    return seccomp.Arg(index, seccomp.MASKED_EQ, mask, value)


def _replaced(rule: Rule) -> list[Rule]:
    """Return what an architecture without that call has instead, let through where the call is."""
    if rule.action != ALLOW:
        return []
    found = []
    for call, value in policy.REPLACED.get(rule.call, ()):
        matters = arguments.MATTERS.get(call)
        if value is None or matters is None:
            found.append(Rule(call, ALLOW))
        else:
            found.append(Rule(call, ALLOW, ((matters.index, arguments.LOW_32_BITS, value),)))
    return found


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
    simple = {
        ALLOW: seccomp.ALLOW, KILL: seccomp.KILL_PROCESS, LOG: seccomp.LOG, NOTIFY: seccomp.NOTIFY,
        policy.PRETENDS: seccomp.ERRNO(0),
    }  # fmt: skip
    return int(simple[action] if action in simple else seccomp.ERRNO(getattr(errno, action)))
