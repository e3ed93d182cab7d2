"""Clock: a limit to the processor time that names, globs and expressions out of one file may take."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import thread_time
from typing import final

from loralens.errors import FormatError

PLAIN_SECONDS = 5.0  # for what takes long only where there are millions of names times patterns


@final
class Clock:
    """Processor time of this thread that was spent on one thing, and its limit in seconds."""

    __slots__ = ("limit", "spent")

    def __init__(self, limit: float = PLAIN_SECONDS) -> None:
        self.limit, self.spent = limit, 0.0

    @property
    def left(self) -> float:
        """Seconds, 0 where all are spent."""
        return max(0.0, self.limit - self.spent)

    @contextmanager
    def running(self, what: str, *, fix: str) -> Iterator[None]:
        """Count the time of the block; ``what`` is at work in it.

        Raises
        ------
        FormatError
            The limit is passed, now or before.
        """
        begin = thread_time()
        try:
            yield
        finally:
            self.spent += thread_time() - begin
        if self.spent > self.limit:
            raise self.error(what, fix=fix)

    def error(self, what: str, *, fix: str) -> FormatError:
        """The error that says that the limit is passed."""
        return FormatError(
            f"{what} could not be matched with the modules' names within {self.limit:g} s of computing", fix=fix
        )
