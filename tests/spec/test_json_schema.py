"""The JSON Schema for editors and the schema that validates say the same."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isochamber.spec import document, validate
from isochamber.spec import jsonschema as generator
from tests.conftest import PROJECT
from tests.properties import PROPERTY


def _pattern(
    _validator: object, pattern: str, instance: object, _schema: object
) -> Iterator[jsonschema.ValidationError]:
    """Read ``$`` as JSON Schema does (ECMA-262): the end, where Python's would also let a newline follow."""
    if isinstance(instance, str) and not re.search(re.sub(r"(?<!\\)\$", r"\\Z", pattern), instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


_Validator: Any = jsonschema.validators.extend(  # type: ignore[no-untyped-call] # the stubs leave it out
    jsonschema.Draft202012Validator, {"pattern": _pattern}
)
_VALIDATORS = {name: _Validator(generator.generate(name)) for name in ("tenants", "config")}


def _agree(name: str, value: object) -> bool:
    """Return the common verdict; they must not differ."""
    ours = validate.problems(name, value)
    theirs = [error.message for error in _VALIDATORS[name].iter_errors(value)]
    assert bool(ours) == bool(theirs), f"{value!r}\ncerberus: {ours}\nJSON Schema: {theirs}"
    return not ours


@pytest.mark.parametrize("name", ["tenants", "config"])
def test_the_file_on_disk_is_what_is_generated(name: str) -> None:
    on_disk = (validate.SCHEMAS / f"{name}.schema.json").read_text()
    assert on_disk == generator.text(name), "run python -m isochamber.spec.jsonschema"
    jsonschema.Draft202012Validator.check_schema(generator.generate(name))


# Values of every kind near what a rule takes; no float that is a whole number, which YAML never gives us as such.
_TEXTS = st.one_of(
    st.sampled_from(
        ["", "a", "A", "a\n", "none", "host", "required", "/x", "/x\n", "/", "/a/../b", "/a//b", "/a/./b", "/.a", "/a ",
         "64M", "16M", "15M", "16384K",
         "0", "0M", "99999G", "100000G", "99999999K", "100000000K", "99999999999999", "1\n", "5T", "-1",
         "bookworm", "mmdebstrap", "minbase", "-", "20250101T000000Z", "http://m/", "file:/m", "copy:///m", "httpx://m",
         "/home/x", "/home/", "home/x", "a b", "'", '"', "\\", "''", "'' a", "''a", ' "" b', "a\\", "a'b c'd", "\0",
         "a" * 63, "a" * 64, "bc", "b", "é", "A_B", "A=B", "1A"]
    ),
    st.text(max_size=6),
)  # fmt: skip
_INTEGERS = st.one_of(st.integers(-2, 1_048_577), st.sampled_from([15, 16, 604_801, 10**14 - 1, 10**14, 1 << 70]))
_NUMBERS = st.one_of(_INTEGERS, st.floats(0, 5000, exclude_min=True).filter(lambda number: not number.is_integer()))
_JUNK = st.one_of(st.none(), st.booleans(), st.just(1.5), st.just([]), st.just({}), _TEXTS, _INTEGERS)


def _near(rule: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return values that fit the cerberus ``rule`` more often than not."""
    kinds = rule["type"] if isinstance(rule["type"], list) else [rule["type"]]
    choices = [_JUNK] if rule.get("nullable") else []
    if "regex" in rule:
        choices.append(st.from_regex(rule["regex"], fullmatch=True))
    if "allowed" in rule:
        choices.append(st.sampled_from(rule["allowed"]))
    for kind in kinds:
        if kind == "dict" and "schema" in rule:
            choices.append(_mapping(rule["schema"]))
        elif kind == "dict":
            choices.append(
                st.dictionaries(_near(rule["keysrules"]).filter(_is_text), _near(rule["valuesrules"]), max_size=2)
            )
        elif kind == "list":
            choices.append(st.lists(_near(rule["schema"]) if "schema" in rule else _TEXTS, max_size=3))
        else:
            choices.append({"string": _TEXTS, "integer": _INTEGERS, "number": _NUMBERS, "boolean": st.booleans()}[kind])
    return st.one_of(*choices, *choices, *choices, _JUNK)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _mapping(rules: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    required = {key: _near(rule) for key, rule in rules.items() if rule.get("required")}
    optional = {key: _near(rule) for key, rule in rules.items() if not rule.get("required")}
    return st.fixed_dictionaries(required, optional={**optional, "unknown": _JUNK})


@PROPERTY
@given(st.one_of(_JUNK, _mapping(dict(validate.schema("tenants")))))
def test_both_accept_and_refuse_the_same_tenants_yaml(value: object) -> None:
    _agree("tenants", value)


@PROPERTY
@given(st.one_of(_JUNK, _mapping(dict(validate.schema("config")))))
def test_both_accept_and_refuse_the_same_config_json(value: object) -> None:
    _agree("config", value)


@pytest.mark.parametrize("file", [PROJECT / "tenants.yaml", *PROJECT.glob("examples/*/config.json")], ids=str)
def test_both_accept_the_projects_own(file: Path) -> None:
    value = document.parse(str(file), file.read_bytes()).value
    assert _agree(file.stem, value)
    assert not _agree(file.stem, {**value, "unknown": 1})


def _leaves(name: str) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield every key with its rule and how to make the smallest document that holds a value for it."""
    minimal = {"cname": "x", "init": "x"} if name == "config" else {}

    def walk(rules: dict[str, Any], trail: str, wrap: Any) -> Iterator[tuple[str, dict[str, Any], Any]]:
        for key, rule in rules.items():
            here = f"{trail}{key}"

            def put(value: object, key: str = key) -> object:
                return wrap({key: value})

            yield here, rule, put
            if "schema" in rule and rule["type"] == "dict":
                needed = {name: "x" for name, inner in rule["schema"].items() if inner.get("required")}
                yield from walk(rule["schema"], f"{here}.", lambda value, put=put, n=needed: put({**n, **value}))
            if "valuesrules" in rule and "schema" in rule["valuesrules"]:
                yield from walk(
                    rule["valuesrules"]["schema"], f"{here}.NAME.", lambda value, put=put: put({"n": value})
                )

    yield from walk(dict(validate.schema(name)), "", lambda value: {**minimal, **value})


# A tenant's keys are those of defaults, by an anchor of the schema's: tried once.
_LEAVES = {
    f"{name}: {trail}": (name, rule, put)
    for name in ("tenants", "config")
    for trail, rule, put in _leaves(name)
    if trail == "tenants.NAME.package" or not trail.startswith("tenants.NAME.")
}


@pytest.mark.parametrize("leaf", _LEAVES)
def test_both_agree_on_every_key(leaf: str) -> None:
    """Every rule by itself, so that one key's mistake can't hide another's."""
    name, rule, put = _LEAVES[leaf]

    @settings(PROPERTY, max_examples=30)
    @given(_near(rule))
    def agree(value: object) -> None:
        _agree(name, put(value))

    agree()


@PROPERTY
@given(st.text(alphabet="""ab \t\r\n'"\\é\0""", max_size=12))
def test_the_pattern_of_init_is_what_shlex_splits(text: str) -> None:
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    splits = bool(words) and bool(words[0]) and "\0" not in text
    assert (not validate.problems("config", {"cname": "x", "init": text})) == splits
    _agree("config", {"cname": "x", "init": text})
