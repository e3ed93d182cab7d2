"""Regular expressions from a file that may be hostile, matched within a bounded time.

An expression is matched by `re` if its parse tree shows that it cannot backtrack for long on any name. Every other one
is matched by the package `regex`, which stops at a time limit. The time of all expressions of one adapter together is
limited as well.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from math import prod
from typing import Any, final

from loralens.core.naming.clock import PLAIN_SECONDS, Clock
from loralens.errors import FormatError

SECONDS = 1.0  # of processor time, for all expressions of an adapter that go to `regex`
LONGEST = 65_536  # characters; tools write some thousands at most, and an expression of this length compiles in 0.1 s
# Unbounded repeats in an expression for `re`. Each multiplies the steps by the length of the name: two of them cost at
# most its square.
MOST_REPEATS = 2
MANY = 16  # a repeat whose highest count exceeds its lowest by more than this is treated as unbounded
MOST_STEPS = 10**8  # of backtracking that one match by `re` may take in the worst case, which is about a second
NO_BOUND = 10 * MOST_STEPS  # any integer above MOST_STEPS; it replaces larger products of choices
# Nodes of a compiled expression. `regex` copies nested repeats into each other and has no limit of its own: 62
# characters took more than 1.4 GB.
MOST_NODES = 100_000
SIMPLER = "write it without nested repeats and optional parts, or list the modules' names"

# `re` takes these as plain characters, `regex` as a POSIX class or as approximate matching.
_READ_OTHERWISE = re.compile(r"\[:|\{(?![0-9]*(?:,[0-9]*)?\})")
# Nodes that match one letter or a position in one way. Names of operators in Python's parser.
_PLAIN = frozenset({"LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"})
_REPEATS = frozenset({"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"})


@final
class Allowance:
    """The processor time that all keys and expressions of one adapter may take together.

    Attributes
    ----------
    backtracking : Clock
        For expressions that are matched by `regex`.
    plain : Clock
        For all others.
    """

    __slots__ = ("backtracking", "plain")

    def __init__(self, backtracking: float = SECONDS, plain: float = PLAIN_SECONDS) -> None:
        self.backtracking, self.plain = Clock(backtracking), Clock(plain)


@final
@dataclass(frozen=True, slots=True)
class Effort:
    """An upper bound of what matching an expression costs.

    Attributes
    ----------
    repeats
        The number of unbounded repeats.
    choices
        The number of ways to try everything else; `NO_BOUND` if these ways multiply with each round of a repeat.
    nodes
        The nodes of the compiled expression, where a repeat counts its content as often as it must occur.
    repeating
        Whether some part may occur more than once.
    """

    repeats: int = 0
    choices: int = 1
    nodes: int = 1
    repeating: bool = False

    def steps(self, length: int) -> int:
        """The steps on a name of this length in the worst case: every repeat may begin and end at every letter."""
        # `matches` does not ask for expressions with more repeats, so larger powers need not be computed.
        ways: int = (length + 2) ** min(self.repeats, MOST_REPEATS + 2)
        return self.choices * ways


@final
class Expression:
    r"""A regular expression of a configuration.

    Parameters
    ----------
    key : str
        The expression as it is written in the configuration.
    field : str
        The field of the configuration that it is from, for messages.
    allowance : Allowance
        The time limit of the adapter.
    after_prefix : bool
        Match as PEFT matches the keys of its patterns, by ``(.*\.)?(KEY)$``; otherwise match the whole name.

    Raises
    ------
    FormatError
        It is not a regular expression, or it would take too long.
    """

    __slots__ = ("_allowance", "_bounded", "_effort", "_pattern", "_text", "_what")

    def __init__(self, key: str, field: str, allowance: Allowance, *, after_prefix: bool = False) -> None:
        self._what = f"{field} {_short(key)}"
        self._allowance = allowance
        self._text = rf"(.*\.)?({key})$" if after_prefix else key
        # Checked before parsing, whose time and memory grow with the length.
        if len(key) > LONGEST:
            raise FormatError(f"{self._what} is {len(key):,} characters long", fix=SIMPLER)
        with allowance.plain.running(self._what, fix=SIMPLER):
            self._pattern = _compile(self._text)
            self._effort = _effort(self._text)
        if self._effort.nodes > MOST_NODES:
            raise FormatError(f"{self._what} repeats too much", fix=SIMPLER)
        most = MOST_REPEATS + after_prefix  # the prefix is an unbounded repeat itself
        self._bounded = self._effort.repeats <= most and self._effort.choices < NO_BOUND

    def matches(self, path: str) -> bool:
        """Whether the expression matches the path of a module.

        Raises
        ------
        FormatError
            The time of the adapter is used up.
        """
        if not self._bounded or self._effort.steps(len(path)) > MOST_STEPS:
            return self._matches_in_time(path)
        with self._allowance.plain.running(self._what, fix=SIMPLER):
            return self._pattern.fullmatch(path) is not None

    def _matches_in_time(self, path: str) -> bool:
        """`matches` by the package `regex`, which checks a time limit while it matches."""
        clock = self._allowance.backtracking
        if not clock.remaining:
            raise clock.error(self._what, fix=SIMPLER)
        with clock.running(self._what, fix=SIMPLER):
            pattern = _compile_with_regex(self._text, self._what)
        try:
            with clock.running(self._what, fix=SIMPLER):
                return pattern.fullmatch(path, timeout=clock.remaining) is not None
        except TimeoutError as error:
            clock.spent = clock.limit  # else every further name would be tried for the remaining time
            raise clock.error(self._what, fix=SIMPLER) from error
        except MemoryError as error:
            raise FormatError(f"{self._what} takes too much memory to match", fix=SIMPLER) from error


def _short(key: str) -> str:
    return f"{key!r:.60}" + ("…" if len(key) > 60 else "")


@lru_cache(maxsize=10_000)
def _compile(text: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            # Python warns that `[[` may get another meaning in the future. It has its old meaning until then.
            warnings.simplefilter("ignore")
            return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        what = f"{_short(text)} is not a regular expression ({error})"
        raise FormatError(what, fix="correct adapter_config.json, or save the adapter again") from error


@lru_cache(maxsize=1_000)
def _compile_with_regex(text: str, what: str) -> Any:
    """Compile an expression with the package `regex`.

    Raises
    ------
    FormatError
        `regex` understands it differently than `re`, or cannot compile it.
    """
    import regex

    if _READ_OTHERWISE.search(text):
        raise FormatError(f"{what} is too complex, with '{{' or '[:' as plain letters", fix=SIMPLER)
    try:
        return regex.compile(text, regex.V0)  # version 0 behaves as `re` does
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise FormatError(f"{what} cannot be matched within a bounded time ({error})", fix=SIMPLER) from error


@lru_cache(maxsize=10_000)
def _effort(text: str) -> Effort:
    """The effort of an expression; more than any limit if it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The parser is private, but is the only one that sees the expression as `re` does. Operators that a newer
            # Python adds are refused by `_part_effort`.
            return _sequence_effort(import_module("re._parser").parse(text))
    except (re.error, RecursionError):
        return Effort(choices=NO_BOUND, nodes=MOST_NODES + 1)


def _sequence_effort(parts: Iterable[tuple[Any, Any]]) -> Effort:
    """The effort of parts that follow each other: their choices multiply."""
    efforts = [_part_effort(str(operator), argument) for operator, argument in parts]
    return _total_effort(efforts, choices=prod(effort.choices for effort in efforts))


def _total_effort(efforts: Sequence[Effort], *, choices: int, nodes: int = 0) -> Effort:
    """The effort of several parts: ``choices`` are those of all parts together, ``nodes`` those of their operator."""
    return Effort(
        sum(effort.repeats for effort in efforts),
        min(NO_BOUND, choices),
        nodes + sum(effort.nodes for effort in efforts),
        any(effort.repeating for effort in efforts),
    )


def _part_effort(operator: str, argument: Any) -> Effort:
    """The effort of one node of a parse tree."""
    if operator in _PLAIN:
        return Effort()
    if operator in _REPEATS:
        return _repeat_effort(*argument)
    if operator in {"SUBPATTERN", "ASSERT", "ASSERT_NOT"}:
        return _sequence_effort(argument[-1])
    if operator == "ATOMIC_GROUP":
        return _sequence_effort(argument)
    if operator == "BRANCH":
        # One of the alternatives is tried at a time, so their choices add up.
        branches = [_sequence_effort(branch) for branch in argument[1]]
        return _total_effort(branches, choices=sum(branch.choices for branch in branches), nodes=1)
    # What a back-reference matches depends on the name, so the tries have no bound that the tree shows.
    if operator == "GROUPREF":
        return Effort(choices=NO_BOUND)
    if operator == "GROUPREF_EXISTS":
        return _total_effort([_sequence_effort(part) for part in argument[1:] if part], choices=NO_BOUND, nodes=1)
    return Effort(choices=NO_BOUND, nodes=MOST_NODES + 1)  # an operator of a newer Python: refuse the expression


def _repeat_effort(least: int, most: int, body: Any) -> Effort:
    """The effort of a repeat.

    If the content can match in several ways, each round multiplies them, and the tries have no bound.
    """
    inside = _sequence_effort(body)
    nodes = 1 + inside.nodes * max(2, least + 1)  # `regex` copies the required and the optional rounds separately
    if most <= 1:  # an optional part: with it or without it
        return replace(inside, choices=min(NO_BOUND, inside.choices + (least == 0)), nodes=1 + inside.nodes)
    if inside.repeating or inside.choices > 1:
        return Effort(inside.repeats + 1, NO_BOUND, nodes, repeating=True)
    if most - least > MANY:
        return Effort(1, 1, nodes, repeating=True)
    return Effort(0, most - least + 1, nodes, repeating=True)
