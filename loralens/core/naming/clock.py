"""`Clock`: a limit of the processor time for matching the names, globs and regular expressions of a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import thread_time
from typing import final

from loralens.errors import FormatError

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
