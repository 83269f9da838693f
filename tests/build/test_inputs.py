"""The named list of inputs: its digest, and what it says of a change."""

import hashlib
import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from isochamber.build.inputs import DIGEST_HEX, Inputs
from tests.properties import PROPERTY

# Every text that can be, half characters included: names of files come with surrogates.
_TEXTS = st.text(st.characters(), max_size=8)
_LISTS = st.dictionaries(_TEXTS, _TEXTS, max_size=6)


@PROPERTY
@given(_LISTS, st.randoms())
def test_the_order_does_not_matter(values: dict[str, str], random: object) -> None:
    pairs = list(values.items())
    random.shuffle(pairs)  # type: ignore[attr-defined]
    assert Inputs.of(pairs) == Inputs.of(values)
    digest = Inputs.of(pairs).digest()
    assert digest == Inputs.of(values).digest()
    assert len(digest) == DIGEST_HEX
    assert set(digest) <= set("0123456789abcdef")


@PROPERTY
@given(_LISTS, _LISTS)
def test_the_digest_is_the_same_exactly_when_the_list_is(one: dict[str, str], two: dict[str, str]) -> None:
    assert (Inputs.of(one).digest() == Inputs.of(two).digest()) == (one == two)


@PROPERTY
@given(_LISTS, _TEXTS, _TEXTS, st.integers(0, 8), st.integers(0, 8))
def test_any_change_changes_the_digest_and_is_named(
    values: dict[str, str], name: str, value: str, cut: int, _other: int
) -> None:
    former, now = Inputs.of(values), Inputs.of({**values, name: value})
    assume(values.get(name) != value)
    assert now.digest() != former.digest()
    assert now.changed_from(former) == (f"{name} changed" if name in values else f"{name} is new",)
    back = former.changed_from(now)
    assert back == ((f"{name} changed",) if name in values else (f"{name} is gone",))
    # Moving the border between a name and its value, or between two pairs, is a change too.
    moved = {**values, name[:cut]: name[cut:] + value}
    assert (Inputs.of(moved).digest() == now.digest()) == (moved == {**values, name: value})


def test_half_characters_are_not_taken_for_whole_ones() -> None:
    """JSON's escapes would write both as the same twelve letters."""
    whole, halves = "\U0001f600", "\ud83d\ude00"
    assert json.dumps(whole) == json.dumps(halves)
    assert Inputs.of({"a": whole}).digest() != Inputs.of({"a": halves}).digest()


def test_a_digest_of_plain_text_is_what_it_always_was() -> None:
    """A change of the encoding would rebuild everything that everybody has."""
    text = '[["a","1"],["b","2"]]'
    assert Inputs.of({"b": "2", "a": "1"}).digest() == hashlib.sha256(text.encode()).hexdigest()[:40]


def test_a_name_that_stands_twice_is_a_bug() -> None:
    with pytest.raises(ValueError, match="named twice"):
        Inputs.of([("a", "1"), ("a", "2")])
