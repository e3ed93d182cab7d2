"""Expressions: regular expressions out of a file that may be hostile, matched within a bounded time.

An expression goes to `re` where its parse tree shows that no name makes it backtrack for long; any other goes to the
package `regex`, which stops at a time limit. What all expressions of one adapter cost together is limited, too.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from math import prod
from typing import Any, final

from loralens.core.clock import PLAIN_SECONDS, Clock
from loralens.errors import FormatError

SECONDS = 1.0  # of processor time, for all expressions of an adapter that go to `regex`
LONGEST = 65_536  # characters; the longest that tools write are some thousands, and this long one compiles in 0.1 s
MOST_REPEATS = 2  # without a bound, in an expression for `re`
MANY = 16  # a repeat that may come this much oftener than it must is one without a bound
MOST_STEPS = 10**8  # of backtracking that one match by `re` may take at worst; that is about a second
NO_BOUND = 10 * MOST_STEPS
MOST_NODES = 100_000  # of a compiled expression: `regex` copies nested repeats into each other, and has no limit there
SIMPLER = "write it without nested repeats and optional parts, or list the modules' names"

# What `re` reads as plain letters and `regex` as a POSIX class or as approximate matching.
_READ_OTHERWISE = re.compile(r"\[:|\{(?![0-9]*(?:,[0-9]*)?\})")
_PLAIN = frozenset({"LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"})
_REPEATS = frozenset({"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"})


@final
class Allowance:
    """The processor time that the keys and expressions of one adapter may take, in common.

    Attributes
    ----------
    backtracking : Clock
        For expressions that go to `regex`.
    plain : Clock
        For all others.
    """

    __slots__ = ("backtracking", "plain")

    def __init__(self, backtracking: float = SECONDS, plain: float = PLAIN_SECONDS) -> None:
        self.backtracking, self.plain = Clock(backtracking), Clock(plain)


@final
@dataclass(frozen=True, slots=True)
class Effort:
    """What an expression may take.

    Attributes
    ----------
    repeats : int
        Those without a bound.
    choices : int
        In how many ways the rest may be tried, `NO_BOUND` where ways multiply with each repeat.
    nodes : int
        Of the compiled expression, each as often as it must be there.
    repeating : bool
        Some part may come more than once.
    """

    repeats: int = 0
    choices: int = 1
    nodes: int = 1
    repeating: bool = False

    def steps(self, length: int) -> int:
        """At worst, on a name of this length: every repeat may begin and end at every letter."""
        ways: int = (length + 2) ** min(self.repeats, MOST_REPEATS + 2)
        return self.choices * ways


@final
class Expression:
    r"""A regular expression of a configuration.

    Parameters
    ----------
    key : str
        As it stands in the configuration.
    field : str
        Of the configuration, for messages.
    allowance : Allowance
        Of the adapter.
    after_prefix : bool
        Matched as PEFT matches the keys of its patterns, by ``(.*\.)?(KEY)$``; else against the whole name.

    Raises
    ------
    FormatError
        It is no regular expression, or one that would take too long.
    """

    __slots__ = ("_allowance", "_bounded", "_effort", "_pattern", "_text", "_what")

    def __init__(self, key: str, field: str, allowance: Allowance, *, after_prefix: bool = False) -> None:
        self._what = f"{field} {_short(key)}"
        self._allowance = allowance
        self._text = rf"(.*\.)?({key})$" if after_prefix else key
        if len(key) > LONGEST:
            raise FormatError(f"{self._what} is {len(key):,} characters long", fix=SIMPLER)
        with allowance.plain.running(self._what, fix=SIMPLER):
            self._pattern = _compile(self._text)
            self._effort = _effort(self._text)
        if self._effort.nodes > MOST_NODES:
            raise FormatError(f"{self._what} repeats too much", fix=SIMPLER)
        most = MOST_REPEATS + after_prefix
        self._bounded = self._effort.repeats <= most and self._effort.choices < NO_BOUND

    def matches(self, path: str) -> bool:
        """Whether it matches a module's path.

        Raises
        ------
        FormatError
            The allowance is used up.
        """
        if not self._bounded or self._effort.steps(len(path)) > MOST_STEPS:
            return self._matches_in_time(path)
        with self._allowance.plain.running(self._what, fix=SIMPLER):
            return self._pattern.fullmatch(path) is not None

    def _matches_in_time(self, path: str) -> bool:
        """By `regex`, which looks at a clock while it matches."""
        clock = self._allowance.backtracking
        if not clock.left:
            raise clock.error(self._what, fix=SIMPLER)
        with clock.running(self._what, fix=SIMPLER):
            pattern = _compile_with_regex(self._text, self._what)
        try:
            with clock.running(self._what, fix=SIMPLER):
                return pattern.fullmatch(path, timeout=clock.left) is not None
        except TimeoutError as error:
            clock.spent = clock.limit
            raise clock.error(self._what, fix=SIMPLER) from error
        except MemoryError as error:
            raise FormatError(f"{self._what} takes too much memory to match", fix=SIMPLER) from error


def _short(key: str) -> str:
    return f"{key!r:.60}" + ("…" if len(key) > 60 else "")


@lru_cache(maxsize=10_000)
def _compile(text: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FutureWarning of `[[`: today it means what it has always meant
            return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(
            f"{_short(text)} is not a regular expression ({error})",
            fix="correct adapter_config.json, or save the adapter again",
        ) from error


@lru_cache(maxsize=1_000)
def _compile_with_regex(text: str, what: str) -> Any:
    """The expression for `regex`.

    Raises
    ------
    FormatError
        `regex` reads it otherwise than `re`, or cannot hold it.
    """
    import regex

    if _READ_OTHERWISE.search(text):
        raise FormatError(f"{what} is too complex, with '{{' or '[:' as plain letters", fix=SIMPLER)
    try:
        return regex.compile(text, regex.V0)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise FormatError(f"{what} cannot be matched within a bounded time ({error})", fix=SIMPLER) from error


@lru_cache(maxsize=10_000)
def _effort(text: str) -> Effort:
    """What an expression may take; too much, where it cannot be taken apart."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _sequence_effort(import_module("re._parser").parse(text))
    except (re.error, RecursionError):
        return Effort(choices=NO_BOUND, nodes=MOST_NODES + 1)


def _sequence_effort(parts: Iterable[tuple[Any, Any]]) -> Effort:
    """One part after the other: what may be tried multiplies."""
    efforts = [_part_effort(str(operator), argument) for operator, argument in parts]
    return Effort(
        sum(effort.repeats for effort in efforts),
        min(NO_BOUND, prod(effort.choices for effort in efforts)),
        sum(effort.nodes for effort in efforts),
        any(effort.repeating for effort in efforts),
    )


def _part_effort(operator: str, argument: Any) -> Effort:
    """One node of a parse tree, by the name of its operator."""
    if operator in _PLAIN:
        return Effort()
    if operator in _REPEATS:
        return _repeat_effort(*argument)
    if operator in {"SUBPATTERN", "ASSERT", "ASSERT_NOT"}:
        return _sequence_effort(argument[-1])
    if operator == "ATOMIC_GROUP":
        return _sequence_effort(argument)
    if operator == "BRANCH":
        branches = [_sequence_effort(branch) for branch in argument[1]]
        return replace(
            _alternatives_effort(branches), choices=min(NO_BOUND, sum(branch.choices for branch in branches))
        )
    if operator == "GROUPREF":
        return Effort(choices=NO_BOUND)
    if operator == "GROUPREF_EXISTS":
        return replace(
            _alternatives_effort([_sequence_effort(part) for part in argument[1:] if part]), choices=NO_BOUND
        )
    return Effort(choices=NO_BOUND, nodes=MOST_NODES + 1)  # of a Python that is newer than this table


def _alternatives_effort(efforts: Sequence[Effort]) -> Effort:
    """Of parts of which one at a time is tried, but for its choices."""
    return Effort(
        sum(effort.repeats for effort in efforts),
        1,
        1 + sum(effort.nodes for effort in efforts),
        any(effort.repeating for effort in efforts),
    )


def _repeat_effort(least: int, most: int, body: Any) -> Effort:
    """A repeat; what is inside one that may come twice must be the same each time, else nothing bounds the tries."""
    inside = _sequence_effort(body)
    nodes = 1 + inside.nodes * max(2, least + 1)  # what must be and what may be are two copies for `regex`
    if most <= 1:
        return replace(inside, choices=min(NO_BOUND, inside.choices + (least == 0)), nodes=1 + inside.nodes)
    if inside.repeating or inside.choices > 1:
        return Effort(inside.repeats + 1, NO_BOUND, nodes, repeating=True)
    if most - least > MANY:
        return Effort(1, 1, nodes, repeating=True)
    return Effort(0, most - least + 1, nodes, repeating=True)
