"""A YAML (or JSON) text as plain values, with the line and column of each.

Aliases are followed, but only so far: a text that expands to more than MAX_NODES
values, or nests deeper than MAX_DEPTH, is refused, and so is every tag that is not
plain data. Problems are collected, never raised one by one: what can't be used is
None in the value, and everything else is still there to be validated.
"""

from dataclasses import dataclass, field
from typing import Any, Self

import yaml

from isochamber.errors import printable
from isochamber.spec.model import Place

MAX_BYTES = 4 << 20
MAX_NODES = 250_000  # an alias bomb is noticed within a second; 5,000 tenants are 50,000
MAX_DEPTH = 24

_Path = tuple[object, ...]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # seven times faster where libyaml is there
_CORE = "tag:yaml.org,2002:"
_TRUE = frozenset({"true", "yes", "on"})
_KEYS = frozenset({"str", "int", "float", "bool", "null", "timestamp", "value"})  # read as the text that is written


@dataclass
class Document:
    """What was read: the value (mappings keyed by text), where each part of it stands, and what was wrong."""

    file: str
    value: Any = None
    places: dict[_Path, Place] = field(default_factory=dict)
    problems: list[tuple[Place, _Path, str]] = field(default_factory=list)
    unusable: set[_Path] = field(default_factory=set)  # where a value was refused: nothing more is to be said of it

    def place(self, path: _Path) -> Place:
        """Return where the value at ``path`` stands, or the nearest that holds it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, Place(self.file, 1, 1))


class _RefusedError(Exception):
    """The text as a whole can't be read on."""

    def __init__(self, place: Place, path: _Path, what: str) -> None:
        super().__init__(what)
        self.place, self.path, self.what = place, path, what


def parse(file: str, content: bytes) -> Document:
    """Return ``content`` as a document; what is wrong with it is in ``problems``."""
    document = Document(file)
    try:
        text = content.decode("utf-8")
        if len(content) > MAX_BYTES:
            raise _RefusedError(Place(file, 1, 1), (), f"is larger than {MAX_BYTES} bytes")
        _check_depth(file, text)
        node = yaml.compose(text, Loader=_LOADER)
        if node is not None:
            document.value = _Reader(document).read(node, (), 0)
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8", "replace").rpartition("\n")
        line = before[0].count("\n") + 1 + bool(before[1])
        document.problems.append((Place(file, line, len(before[2]) + 1), (), "is not UTF-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(file, mark.line + 1, mark.column + 1) if mark else Place(file, 1, 1)
        document.problems.append((place, (), f"is not YAML: {error.problem or error.context}"))
    except yaml.YAMLError as error:  # a character that YAML does not allow
        position = getattr(error, "position", 0)
        line = text[:position].count("\n") + 1
        document.problems.append((Place(file, line, 1), (), "is not YAML: a character that is not allowed"))
    except _RefusedError as error:
        document.problems.append((error.place, error.path, error.what))
    return document


def _check_depth(file: str, text: str) -> None:
    """Refuse what nests too deeply by its events: libyaml's composer recurses in C, and would end the process."""
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                mark = event.start_mark
                place = Place(file, mark.line + 1, mark.column + 1) if mark else Place(file, 1, 1)
                raise _RefusedError(place, (), f"is nested deeper than {MAX_DEPTH}")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _Reader:
    """Turns nodes into values."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._nodes = 0

    def read(self, node: yaml.Node, path: _Path, depth: int) -> Any:
        place = Place(self._document.file, node.start_mark.line + 1, node.start_mark.column + 1)
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _RefusedError(place, path, f"expands to more than {MAX_NODES} values (aliases?)")
        if depth > MAX_DEPTH:
            raise _RefusedError(place, path, f"is nested deeper than {MAX_DEPTH}")
        self._document.places.setdefault(path, place)
        if isinstance(node, yaml.MappingNode):
            self._check_tag(node, "map", path, place)
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, "seq", path, place)
            return [self.read(child, (*path, index), depth + 1) for index, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path, place)
        raise _RefusedError(place, path, "is not plain data")

    def _check_tag(self, node: yaml.Node, plain: str, path: _Path, place: Place) -> None:
        if node.tag != f"{_CORE}{plain}":
            self._refused(path, place, f"the tag {printable(node.tag)} is not allowed")

    def _mapping(self, node: yaml.MappingNode, path: _Path, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = Place(self._document.file, key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                self._document.problems.append((place, path, "a key must be a plain text"))
                continue
            key = str(key_node.value)
            if key_node.tag == f"{_CORE}merge":
                self._document.problems.append((place, path, "merge keys (<<) are not supported, write it out"))
            elif str(key_node.tag).removeprefix(_CORE) not in _KEYS:
                self._document.problems.append((place, path, f"the tag {printable(key_node.tag)} is not allowed"))
            elif key in values:
                self._document.problems.append((place, (*path, key), f"the key {printable(key)} stands twice"))
            else:
                self._document.places[(*path, key)] = place
                values[key] = self.read(value_node, (*path, key), depth + 1)
        return values

    def _scalar(self, node: yaml.ScalarNode, path: _Path, place: Place) -> Any:
        tag, text = str(node.tag).removeprefix(_CORE), str(node.value)
        if tag == "null":
            return None
        if tag == "bool":
            return text.lower() in _TRUE
        if tag == "int":
            try:
                if len(text) > 20:
                    return self._refused(path, place, "the number is too long")
                return int(text.replace("_", ""), 0)
            except ValueError:
                return text  # YAML 1.1 oddities such as 010 or 1:30 stay text, and the schema says so
        if tag in ("str", "float", "timestamp", "value"):
            return text if tag != "float" else _Float(text)
        return self._refused(path, place, f"the tag {printable(node.tag)} is not allowed")

    def _refused(self, path: _Path, place: Place, what: str) -> None:
        self._document.problems.append((place, path, what))
        self._document.unusable.add(path)


class _Float(float):
    """A number with a fraction: no key takes one, the schema says what it takes instead."""

    def __new__(cls, text: str) -> Self:
        try:
            return super().__new__(cls, text.replace("_", ""))
        except ValueError:
            return super().__new__(cls, "nan")
