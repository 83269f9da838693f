"""JSON Schema (2020-12) for editors, generated from the cerberus schemas: one source, two readers.

python -m isochamber.spec.jsonschema        writes schemas/*.schema.json
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

from isochamber.spec import grants, validate

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TYPES = {
    "string": "string", "integer": "integer", "dict": "object", "list": "array",
    "boolean": "boolean", "number": "number",
}  # fmt: skip

# A text that shlex splits without an error, and whose first word is not empty: blanks, empty quotes, one piece
# that is not empty, then whatever is closed.
_PIECES = r"""[^\\'"{blank}\x00]|\\[^\x00]|'[^'\x00]{many}'|"([^"\\\x00]|\\[^\x00]){many}\""""
_FIRST = _PIECES.format(blank=r" \t\r\n", many="+")
_REST = _PIECES.format(blank="", many="*")
_WORDS = rf"""^[ \t\r\n]*(''|"")*({_FIRST})({_REST})*$"""
_WORD = {"type": "string", "pattern": r"^[^\x00]*$"}

# What the checks in code mean.
_CHECKS: Mapping[str, Mapping[str, Any]] = {
    "size": {"pattern": f"^{validate.SIZE}$", "minimum": 1, "maximum": validate.LARGEST_SIZE},
    "size_or_zero": {"pattern": f"^{validate.SIZE_OR_ZERO}$", "minimum": 0, "maximum": validate.LARGEST_SIZE},
    "memory": {
        "pattern": f"^{validate.MEMORY}$",
        "minimum": validate.LEAST_MEMORY,
        "maximum": validate.LARGEST_SIZE,
    },
    "capability": {"enum": list(grants.CAPABILITIES)},
    "device": {"pattern": f"^{grants.DEVICE}$"},
    "inside": {"pattern": f"^{validate.INSIDE}$"},
    "approvable": {"pattern": "^[a-z_0-9]+(:[A-Za-z0-9_:]+)?$"},
    "words": {"pattern": _WORDS, "minItems": 1, "prefixItems": [{**_WORD, "minLength": 1}], "items": _WORD},
    "restart": {"pattern": f"^{validate.RESTART}$", "not": {"const": True}},
    "signal": {"enum": list(validate.SIGNALS)},
    "mode": {"pattern": "^(none|bridge|host)$"},
    "stage": {"pattern": f"^({'|'.join(validate.STAGES)})$"},
}


def generate(name: str) -> dict[str, Any]:
    """Return the JSON Schema of ``schemas/<name>.yaml``."""
    return {"$schema": _DIALECT, "title": name, **_object(validate.schema(name))}


def _object(rules: Mapping[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {key: _rule(rule) for key, rule in rules.items()},
    }
    required = sorted(key for key, rule in rules.items() if rule.get("required"))
    if required:
        schema["required"] = required
    return schema


def _pattern(regex: str) -> str:
    return f"^{regex.removesuffix(chr(92) + 'Z')}$"


def _rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    if "meta" in rule:
        schema["description"] = rule["meta"]["description"]
    types = rule["type"] if isinstance(rule["type"], list) else [rule["type"]]
    names = [_TYPES[kind] for kind in types] + (["null"] if rule.get("nullable") else [])
    if "dict" in types and "schema" in rule:
        schema.update(_object(rule["schema"]))
    schema["type"] = names if len(names) > 1 else names[0]
    if "list" in types and "schema" in rule:
        schema["items"] = _rule(rule["schema"])
    if "valuesrules" in rule:
        schema["additionalProperties"] = _rule(rule["valuesrules"])
        schema["propertyNames"] = {
            key: value for key, value in _rule(rule["keysrules"]).items() if key != "description"
        }
    for ours, theirs in (("allowed", "enum"), ("min", "minimum"), ("max", "maximum")):
        if ours in rule:
            schema[theirs] = rule[ours]
    if "regex" in rule:
        schema["pattern"] = _pattern(rule["regex"])
    schema.update(_CHECKS.get(rule.get("check_with", ""), {}))
    return schema


def text(name: str) -> str:
    """Return the generated file's text."""
    return json.dumps(generate(name), indent=2) + "\n"


def main() -> None:
    """Write both files."""
    for name in ("tenants", "config"):
        (validate.SCHEMAS / f"{name}.schema.json").write_text(text(name))
        sys.stdout.write(f"schemas/{name}.schema.json\n")


if __name__ == "__main__":
    main()
