"""Progress of a verb, and the function that displays it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

Step = Callable[[int], None]
Display = Callable[[str, int], AbstractContextManager[Step | None]]

# A context variable, so that threads and nested calls do not see each other's display.
_display: ContextVar[Display | None] = ContextVar("display", default=None)


@contextmanager
def progress(label: str, total: int) -> Iterator[Step | None]:
    """A function to call with each amount of work that is done, out of ``total``; None if nothing displays it."""
    display = _display.get()
    # Without a display the work is not counted, which saves a call for every module; and no bar shows no work.
    if display is None or total < 1:
        yield None
        return
    with display(label, total) as step:
        yield step


@contextmanager
def display_progress(display: Display | None) -> Iterator[None]:
    """Let ``display`` show the progress of every verb within the block.

    Parameters
    ----------
    display : callable or None
        Takes a label and the total amount of work, and returns a context manager, which gives the function to call with
        each amount of work that is done. None: nothing is shown; a batch that shows its own progress uses this.
    """
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)
