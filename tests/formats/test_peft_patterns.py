"""Patterns find what PEFT's own regular expression finds, by the letters of the key and not key by key."""

import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from loralens.formats.dialects.peft.config import Pattern

PARTS = st.sampled_from(["a", "b", "ab", "q", "a-b", "é", "10", "1"])
PATHS = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
LITERAL = st.lists(PARTS, min_size=1, max_size=3).map(".".join) | st.sampled_from([".", "..", ".a", "a.", "a..b", "-"])
EXPRESSIONS = st.sampled_from([r"a\.b", "^a", "a|q", ".*", "a+", "(a|b).q", r"\d+\.q", "a$"])


def by_expression(values: dict[str, int], path: str) -> tuple[Any, str | None]:
    """What PEFT does, key by key."""
    for key, value in values.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value, key
    return (values[path], path) if path in values else (0, None)


@given(st.dictionaries(LITERAL | EXPRESSIONS, st.integers(1, 9), max_size=8), st.lists(PATHS, min_size=1, max_size=8))
def test_the_first_key_that_matches_gives_the_value(values: dict[str, int], paths: list[str]) -> None:
    pattern = Pattern(values)
    for path in paths:
        assert pattern.find(path, 0) == by_expression(values, path)


def test_a_dot_of_a_key_stands_for_any_letter() -> None:
    pattern = Pattern({"a.q": 3})
    assert pattern.find("a-q", 0) == (3, "a.q")
    assert pattern.find("b.a_q", 0) == (3, "a.q")
    assert pattern.find("xa.q", 0) == (0, None)
    assert pattern.find("q", 0) == (0, None)
