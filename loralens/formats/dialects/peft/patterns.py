r"""Looking up the rank and the α of a module in ``rank_pattern`` and ``alpha_pattern`` as PEFT does.

PEFT takes the first key for which the regular expression ``(.*\.)?(KEY)$`` matches the path of the module, and then a
key that is the path itself.
"""

import re
from array import array
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from loralens.formats.files.expressions import SIMPLER, Clock, Expression

RESTORE = "correct adapter_config.json, or save the adapter again"
# Keys in which only dots are special. A backslash before punctuation makes it literal.
_LITERAL = re.compile(r"(?P<anchor>\^?)(?P<letters>(?:[\w.-]|\\[^\w\s])+)\$?\Z")

_DOT = re.compile(r"\.")


class Shape(NamedTuple):
    """The common properties of some literal keys: whether they are anchored, their length, and the places of dots.

    These dots are not escaped, so they match any letter.
    """

    anchored: bool
    length: int
    dots: bytes  # four bytes for each place; an array of integers would not be hashable


class Pattern:
    """One of the two mappings: regular expression → value.

    Parameters
    ----------
    values : mapping of str to Any
    field : str
        Its name in the configuration, for messages.
    clock : Clock, optional
        The time limit that all keys of the adapter share.

    Raises
    ------
    FormatError
        A key is not a regular expression, or it takes too long.

    Notes
    -----
    Most keys are literal: they consist of letters, digits, hyphens and dots, perhaps with ``^`` before, ``$`` after and
    backslashes before punctuation. A dot that is not escaped matches any letter. Literal keys are grouped by their
    length and the places of such dots, so that a lookup takes one step for each group, also if there is a key for every
    module of a model. Other keys are tried one after the other as regular expressions.
    """

    __slots__ = ("_clock", "_expressions", "_field", "_found", "_keys", "_literal", "_values")

    def __init__(self, values: Mapping[str, Any], field: str = "rank_pattern", clock: Clock | None = None) -> None:
        self._clock = clock or Clock()
        self._values, self._keys, self._field = values, list(values), field
        self._expressions: list[tuple[int, Expression]] = []  # the place of a key, and its expression
        self._literal: dict[Shape, dict[str, int]] = {}  # common properties → letters → place of the first such key
        self._found: dict[str, int | None] = {}  # a cache, path → place of its key: paths are looked up repeatedly
        for place, key in enumerate(self._keys):
            if literal := _LITERAL.match(key):
                shape, letters = _shape(literal["letters"], anchored=bool(literal["anchor"]))
                self._literal.setdefault(shape, {}).setdefault(letters, place)
            else:
                self._expressions.append((place, Expression(key, field, self._clock, after_prefix=True)))

    def find(self, path: str, default: Any) -> tuple[Any, str | None]:
        """The value for a path, and its key, which is None for the default.

        Raises
        ------
        FormatError
            The expressions of the adapter take too long.
        """
        # Without keys, as in most configurations, every path has the default.
        if not self._keys:
            return default, None
        if path not in self._found:
            self._found[path] = min(self._places(path), default=None)
        place = self._found[path]
        if place is None:
            return (self._values[path], path) if path in self._values else (default, None)
        return self._values[self._keys[place]], self._keys[place]

    def _places(self, path: str) -> Iterator[int]:
        """The places of keys that match; of expressions only the first one, because they are tried in order."""
        yield from islice((place for place, expression in self._expressions if expression.matches(path)), 1)
        with self._clock.running(f"{self._field} of {len(self._keys):,} keys", fix=SIMPLER):
            yield from self._literal_places(path)

    def _literal_places(self, path: str) -> Iterator[int]:
        for (anchored, length, dots), keys in self._literal.items():
            # PEFT's expression ends in `$` and begins after a dot or at the start.
            begin = len(path) - length
            if begin == 0 or (begin > 0 and not anchored and path[begin - 1] == "."):
                tail = list(path[begin:])
                for i in memoryview(dots).cast("I"):
                    tail[i] = "."
                if (letters := "".join(tail)) in keys:
                    yield keys[letters]


def _shape(letters: str, *, anchored: bool) -> tuple[Shape, str]:
    """The common properties of a literal key and others, and its letters without backslashes."""
    dots, escaped = array("I"), False
    if "\\" not in letters:
        dots.extend(match.start() for match in _DOT.finditer(letters))
        return Shape(anchored, len(letters), dots.tobytes()), letters
    plain: list[str] = []
    for letter in letters:
        if letter == "\\" and not escaped:
            escaped = True
            continue
        if letter == "." and not escaped:  # an escaped dot matches only a dot
            dots.append(len(plain))
        plain.append(letter)
        escaped = False
    return Shape(anchored, len(plain), dots.tobytes()), "".join(plain)
