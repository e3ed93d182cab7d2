r"""Patterns: how PEFT finds the rank and the α of a module in ``rank_pattern`` and ``alpha_pattern``.

By the first key, in order, for which the regular expression ``(.*\.)?(KEY)$`` matches the module's path; then by the
path itself.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

from loralens.errors import FormatError

RESTORE = "correct adapter_config.json, or save the adapter again"
_LITERAL = re.compile(r"[\w.-]+\Z")


class Pattern:
    """One of the two mappings: regular expression → value.

    Parameters
    ----------
    values : mapping of str to Any

    Raises
    ------
    FormatError
        A key is no regular expression.

    Notes
    -----
    Of keys that are letters, digits, hyphens and dots alone, a dot stands for any one letter. These are kept by their
    length and the places of their dots, so that those of a whole model, a key a module, are found as fast as one.
    """

    __slots__ = ("_expressions", "_keys", "_literal", "_values")

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values, self._keys = values, list(values)
        self._expressions: list[tuple[int, re.Pattern[str]]] = []  # place among the keys, and what it means
        self._literal: dict[tuple[int, ...], dict[str, int]] = {}  # length and places of dots → key → its place
        for place, key in enumerate(self._keys):
            if _LITERAL.match(key):
                dots = (i for i, letter in enumerate(key) if letter == ".")
                self._literal.setdefault((len(key), *dots), {})[key] = place
            else:
                self._expressions.append((place, regex(rf"(.*\.)?({key})$")))

    def find(self, path: str, default: Any) -> tuple[Any, str | None]:
        """The value for a path, and the key that gave it (None where the default did)."""
        place = min(self._places(path), default=None)
        if place is None:
            return (self._values[path], path) if path in self._values else (default, None)
        return self._values[self._keys[place]], self._keys[place]

    def _places(self, path: str) -> Iterator[int]:
        """The places of keys that match, of expressions the first alone: they are in order."""
        yield from islice((place for place, expression in self._expressions if expression.match(path)), 1)
        for (length, *dots), keys in self._literal.items():
            begin = len(path) - length
            if begin == 0 or (begin > 0 and path[begin - 1] == "."):
                tail = list(path[begin:])
                for i in dots:
                    tail[i] = "."
                if (key := "".join(tail)) in keys:
                    yield keys[key]


@lru_cache(maxsize=100_000)
def regex(text: str) -> re.Pattern[str]:
    """A regular expression of a configuration.

    Raises
    ------
    FormatError
        It is none.
    """
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(f"{text!r} is not a regular expression ({error})", fix=RESTORE) from error
