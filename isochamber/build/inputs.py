"""The named list of what a product is made of: its digest, and why it was rebuilt.

A product's name on disk carries the digest of exactly its inputs; the list itself
is kept in the product's manifest, so that "why was this rebuilt" is answered by
comparing two lists.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# 160 bits: a tenant that can choose both inputs needs 2**80 work for a collision.
DIGEST_HEX = 40


@dataclass(frozen=True, slots=True)
class Inputs:
    """Ordered pairs (name, value); a value is text: a digest, a version, a setting."""

    items: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, values: Mapping[str, str] | Iterable[tuple[str, str]]) -> "Inputs":
        """Sort ``values`` by name; a name that stands twice is a bug (ValueError)."""
        pairs = tuple(sorted(values.items() if isinstance(values, Mapping) else values))
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("an input is named twice")
        return cls(pairs)

    def digest(self) -> str:
        """Return ``DIGEST_HEX`` hex digits of SHA-256 over an unambiguous encoding of the list."""
        text = json.dumps(self.items, ensure_ascii=False, separators=(",", ":"))
        # Not as escapes: two half characters (names that are not UTF-8) would read as one whole.
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST_HEX]

    def changed_from(self, former: "Inputs") -> tuple[str, ...]:
        """Say what differs, one phrase an input: ``X changed``, ``X is new``, ``X is gone``."""
        old, new = dict(former.items), dict(self.items)
        reasons = [
            f"{name} changed" if name in old else f"{name} is new"
            for name, value in self.items
            if old.get(name) != value
        ]
        return (*reasons, *(f"{name} is gone" for name in old if name not in new))
