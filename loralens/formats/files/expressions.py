"""Regular expressions from a file that may be hostile, matched by the package `regex`, which stops at a time limit."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from time import thread_time
from typing import Any, final

from loralens.errors import FormatError

LONGEST = 65_536  # characters; tools write some thousands at most, and an expression of this length compiles in 0.2 s
# `regex` copies nested repeats into each other and has no limit of its own: 62 characters took more than 1.4 GB.
MOST_NODES = 100_000  # of a compiled expression
SIMPLER = "write it without nested repeats and optional parts, or list the modules' names"

# `re` takes these as plain characters, `regex` as a POSIX class or as approximate matching.
_READ_OTHERWISE = re.compile(r"\[:|\{(?![0-9]*(?:,[0-9]*)?\})")
_ESCAPED = re.compile(r"\\.", re.DOTALL)
# An escaped letter, a class of letters, a group's ends, a repeat, or any other letter.
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|(?P<repeat>[*+]|\{(?P<counts>[0-9]*,?[0-9]*)\})|.", re.DOTALL)


# Real files need milliseconds; only files that are made to waste time reach the limit.
PLAIN_SECONDS = 5.0  # limit for work that takes long only with millions of pairs of names and patterns


@final
class Clock:
    """The processor time of this thread that was spent on a task, and its limit, in seconds."""

    __slots__ = ("limit", "spent")

    def __init__(self, limit: float = PLAIN_SECONDS) -> None:
        self.limit, self.spent = limit, 0.0

    @property
    def remaining(self) -> float:
        """The seconds that remain, at least 0."""
        return max(0.0, self.limit - self.spent)

    @contextmanager
    def running(self, what: str, *, fix: str) -> Iterator[None]:
        """Count the time of the block; ``what`` names the work in the message.

        Raises
        ------
        FormatError
            The limit is exceeded.
        """
        # Processor time of this thread, not wall time: a busy machine must not make a file unreadable.
        begin = thread_time()
        try:
            yield
        finally:
            self.spent += thread_time() - begin
        # This is outside of `finally`, so that an error inside the block is not replaced by this one.
        if self.spent > self.limit:
            raise self.error(what, fix=fix)

    def error(self, what: str, *, fix: str) -> FormatError:
        """The error for an exceeded limit."""
        return FormatError(
            f"{what} could not be matched with the modules' names within {self.limit:g} s of computing", fix=fix
        )


@final
class Expression:
    r"""A regular expression of a configuration.

    Parameters
    ----------
    key : str
        The expression as it is written in the configuration.
    field : str
        The field of the configuration that it is from, for messages.
    clock : Clock
        The time limit that all expressions of an adapter share.
    after_prefix : bool
        Match as PEFT matches the keys of its patterns, by ``(.*\.)?(KEY)$``; otherwise match the whole name.

    Raises
    ------
    FormatError
        It is not a regular expression, or it would take too long.
    """

    __slots__ = ("_clock", "_pattern", "_what")

    def __init__(self, key: str, field: str, clock: Clock, *, after_prefix: bool = False) -> None:
        self._what, self._clock = f"{field} {_short(key)}", clock
        # Checked before parsing, whose time and memory grow with the length.
        if len(key) > LONGEST:
            raise FormatError(f"{self._what} is {len(key):,} characters long", fix=SIMPLER)
        with clock.running(self._what, fix=SIMPLER):
            self._pattern = _compile(rf"(.*\.)?({key})$" if after_prefix else key, self._what)

    def matches(self, path: str) -> bool:
        """Whether the expression matches the path of a module.

        Raises
        ------
        FormatError
            The time of the adapter is used up.
        """
        clock = self._clock
        try:
            with clock.running(self._what, fix=SIMPLER):
                # A time limit of 0 would be none.
                return self._pattern.fullmatch(path, timeout=clock.remaining or 1e-9) is not None
        except TimeoutError as error:
            clock.spent = clock.limit  # else every further name would be tried for the remaining time
            raise clock.error(self._what, fix=SIMPLER) from error
        except MemoryError as error:
            raise FormatError(f"{self._what} takes too much memory to match", fix=SIMPLER) from error


def _short(key: str) -> str:
    return f"{key!r:.60}" + ("…" if len(key) > 60 else "")


@lru_cache(maxsize=10_000)
def _compile(text: str, what: str) -> Any:
    """Compile an expression with the package `regex`, if `re`, which PEFT uses, takes it and means the same."""
    import regex

    try:
        with warnings.catch_warnings():
            # Python warns that `[[` may get another meaning in the future. It has its old meaning until then.
            warnings.simplefilter("ignore")
            re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        fix = "correct adapter_config.json, or save the adapter again"
        raise FormatError(f"{what} is not a regular expression ({error})", fix=fix) from error
    # `re.escape` writes `\{` for a brace in a name, which both read alike.
    if _READ_OTHERWISE.search(_ESCAPED.sub("e", text)):
        raise FormatError(f"{what} is too complex, with '{{' or '[:' as plain letters", fix=SIMPLER)
    if _nodes(text) > MOST_NODES:
        raise FormatError(f"{what} repeats too much", fix=SIMPLER)
    try:
        return regex.compile(text, regex.V0)  # version 0 behaves as `re` does
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise FormatError(f"{what} cannot be matched within a bounded time ({error})", fix=SIMPLER) from error


def _nodes(text: str) -> int:
    """The nodes of a compiled expression that `re` takes, where what is repeated counts as often as it is copied."""
    groups, last = [0], 1  # the nodes in each open group so far, and those of the last letter or group
    for token in _TOKEN.finditer(text):
        if token["repeat"]:
            # A repeat without an end is stored as its required rounds and one that is repeated.
            count = max([2, *(int(count) for count in (token["counts"] or "").split(",") if count)])
            groups[-1] += last * (count - 1)
            last *= count
        elif token[0] == "(":
            groups.append(1)
        else:
            last = groups.pop() if token[0] == ")" else 1
            groups[-1] += last
    return groups[0]
