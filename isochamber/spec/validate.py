"""A document against its cerberus schema: every problem with its place, and what is allowed instead."""

import difflib
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import cerberus
import yaml
from cerberus import errors

from isochamber.errors import printable
from isochamber.spec import grants, learned, network

SCHEMAS = Path(__file__).parents[2] / "schemas"

# As patterns, so that the generated JSON Schema says exactly the same.
SIZE = r"[1-9]([0-9]{0,13}|[0-9]{0,10}K|[0-9]{0,7}M|[0-9]{0,4}G)"
SIZE_OR_ZERO = rf"(0|{SIZE})"
MEMORY = r"([1-9][0-9]{0,4}G|(1[6-9]|[2-9][0-9]|[1-9][0-9]{2,7})M)"
LEAST_MEMORY = 16 << 20  # the launcher's own pages count until the exec
LARGEST_SIZE = 10**14 - 1  # a number of bytes; a text reaches 99999G
RESTART = r"(no|always|on-failure(:([1-9][0-9]{0,2}|1000))?)"
STAGES = ("kill", "errno", "notify", "log", "none")  # what a learned filter does to a call that it does not know
INSIDE = r"(/(?!\.{1,2}(/|$))[^/\x00-\x1f\x7f]+)+"
# signal(7), those that can be caught.
SIGNALS = (
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM", "STKFLT",
    "CHLD", "CONT", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    "RTMIN", "RTMAX",
)  # fmt: skip

_FACTOR = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

_TYPES = {
    "string": "a text", "integer": "a whole number", "dict": "a mapping", "list": "a list", "boolean": "true or false",
    "number": "a number",
}  # fmt: skip

Problem = tuple[tuple[object, ...], str]  # document path, "what, what is allowed"


def parse_size(value: object, *, zero: bool = False) -> int | None:
    """Return bytes for an int or a text such as 64M, None for anything else or out of range; 0 only with ``zero``."""
    lowest = 0 if zero else 1
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value if lowest <= value <= LARGEST_SIZE else None
    if not isinstance(value, str) or re.fullmatch(SIZE_OR_ZERO if zero else SIZE, value) is None:
        return None
    digits = value.rstrip("KMG")
    return int(digits) * _FACTOR[value[len(digits) :]]


def parse_restart(value: object) -> tuple[str, int] | None:
    """Return (policy, most restarts, 0: no end) for a ``restart:`` value, None for anything else.

    YAML 1.1 reads a bare ``no`` as false.
    """
    if value is False:
        return "no", 0
    match = re.fullmatch(RESTART, value) if isinstance(value, str) else None
    if match is None:
        return None
    policy, _, most = match[0].partition(":")
    return policy, int(most or 0)


class _Validator(cerberus.Validator):  # type: ignore[misc] # cerberus ships no types
    """cerberus with the few checks that a pattern can't say."""

    types_mapping = {  # noqa: RUF012 - cerberus' own way to change a type
        **cerberus.Validator.types_mapping,
        "integer": cerberus.TypeDefinition("integer", (int,), (bool,)),  # true is no number
    }

    def _check_with_size(self, field: str, value: object) -> None:
        if parse_size(value) is None:
            self._error(field, "a size in bytes above 0, or a number with K, M or G, such as 64M")

    def _check_with_size_or_zero(self, field: str, value: object) -> None:
        if parse_size(value, zero=True) is None:
            self._error(field, "a size in bytes, or a number with K, M or G, such as 64M")

    def _check_with_memory(self, field: str, value: object) -> None:
        size = parse_size(value)
        if size is None or size < LEAST_MEMORY or (isinstance(value, str) and re.fullmatch(MEMORY, value) is None):
            self._error(field, "bytes, or a number with M or G, and at least 16M")

    def _check_with_finite(self, field: str, value: object) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            self._error(field, "a number that is one")

    def _check_with_mode(self, field: str, value: object) -> None:
        if isinstance(value, str) and value not in network.MODES:
            self._error(field, f"one of {', '.join(network.MODES)}, or a mapping")

    def _check_with_stage(self, field: str, value: object) -> None:
        if isinstance(value, str) and value not in STAGES:
            self._error(field, f"one of {', '.join(STAGES)}, or a mapping")

    def _check_with_capability(self, field: str, value: object) -> None:
        if isinstance(value, str) and value not in grants.CAPABILITIES:
            self._error(field, grants.why_not(value))

    def _check_with_device(self, field: str, value: object) -> None:
        if isinstance(value, str) and re.fullmatch(grants.DEVICE, value) is None:
            self._error(field, "the path of a device below /dev, and none that every tenant has of its own")

    def _check_with_inside(self, field: str, value: str) -> None:
        if re.fullmatch(INSIDE, value) is None:
            self._error(field, "an absolute path inside the base, without . and ..")

    def _check_with_restart(self, field: str, value: object) -> None:
        if parse_restart(value) is None:
            self._error(field, "one of no, on-failure, on-failure:MAX (1 to 1000), always")

    def _check_with_signal(self, field: str, value: str) -> None:
        if value not in SIGNALS:
            self._error(field, "the name of a signal that can be caught, without SIG, such as TERM")

    def _check_with_approvable(self, field: str, value: object) -> None:
        if not learned.approvable(value):
            self._error(field, "a call that may be approved: docs/explanation/seccomp.md lists them")

    def _check_with_words(self, field: str, value: object) -> None:
        try:
            words = shlex.split(value) if isinstance(value, str) else value
        except ValueError as error:
            self._error(field, f"words as a shell would split them ({error})")
            return
        if not isinstance(words, list) or not words or not words[0]:
            self._error(field, "at least the program's path")
        elif not all(isinstance(word, str) and "\0" not in word for word in words):
            self._error(field, "texts without NUL")


@cache
def schema(name: str) -> Mapping[str, Any]:
    """Return the cerberus schema ``schemas/<name>.yaml``, ours and trusted."""
    loaded: Mapping[str, Any] = yaml.load(
        (SCHEMAS / f"{name}.yaml").read_text(),
        Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader),  # noqa: S506 - both are safe
    )
    return loaded


@cache
def _validator(name: str) -> _Validator:
    return _Validator(schema(name))


def problems(name: str, value: object) -> list[Problem]:
    """Return what is wrong with ``value`` against the schema ``name``, in document order."""
    if not isinstance(value, dict):
        return [((), "must be a mapping")]
    validator = _validator(name)
    if validator.validate(value, normalize=False):  # no schema has a default or a coercion
        return []
    return [problem for error in validator._errors for problem in _explain(name, error)]


def _explain(name: str, error: errors.ValidationError) -> Iterator[Problem]:
    if error.is_group_error:
        for child in error.child_errors:
            yield from _explain(name, child)
        return
    path = tuple(error.document_path)
    if error.code == errors.UNKNOWN_FIELD.code:
        yield path, f"unknown key {printable(path[-1])}{_instead(name, path)}"
    elif error.code == errors.REQUIRED_FIELD.code:
        yield path[:-1], f"the key {path[-1]} is missing"
    else:
        yield path, f"{_shown(error)}, {_allowed(error)}"


def _shown(error: errors.ValidationError) -> str:
    text = printable(error.value)
    if "keysrules" in error.schema_path:
        return f"the name {text if len(text) <= 80 else text[:77] + '...'} is not allowed"
    name = next((part for part in reversed(error.document_path) if isinstance(part, str)), "")  # not an item's number
    return f"{printable(name)}: {text if len(text) <= 60 else text[:57] + '...'} is not allowed"


def _allowed(error: errors.ValidationError) -> str:
    if error.code == errors.BAD_TYPE.code:
        types = error.constraint if isinstance(error.constraint, list | tuple) else [error.constraint]
        return "must be " + " or ".join(_TYPES[kind] for kind in types)
    if error.code == errors.NOT_NULLABLE.code:
        return "must not be empty"
    if error.code in (errors.UNALLOWED_VALUE.code, errors.UNALLOWED_VALUES.code):
        return "allowed: " + ", ".join(printable(value) or "blank" for value in error.constraint)
    if error.code == errors.REGEX_MISMATCH.code:
        return f"must match {error.constraint.removesuffix(chr(92) + 'Z')}"
    if error.code == errors.MIN_VALUE.code:
        return f"must be at least {error.constraint}"
    if error.code == errors.MAX_VALUE.code:
        return f"must be at most {error.constraint}"
    return "must be " + "; ".join(map(str, error.info))


def _instead(name: str, path: tuple[object, ...]) -> str:
    allowed = sorted(_keys_at(schema(name), path[:-1]))
    close = difflib.get_close_matches(str(path[-1]), allowed, 1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    return f"{meant}, allowed: {', '.join(allowed)}"


def _keys_at(rules: Mapping[str, Any], path: tuple[object, ...]) -> Mapping[str, Any]:
    """Return the keys, with their rules, that the schema knows for the mapping at ``path``."""
    rule: Mapping[str, Any] = {"schema": rules}
    for part in path:
        if isinstance(part, int):  # of a list: its schema is the items'
            rule = rule["schema"]
        else:
            rule = rule["schema"][part] if "schema" in rule else rule["valuesrules"]
    return dict(rule.get("schema", {}))
