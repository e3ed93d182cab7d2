"""Progress: how far a verb has come, for whoever displays it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

Step = Callable[[int], None]
Display = Callable[[str, int], AbstractContextManager[Step | None]]

_display: ContextVar[Display | None] = ContextVar("display", default=None)


@contextmanager
def progress(label: str, total: int) -> Iterator[Step | None]:
    """What to call with every amount of work that is done, of ``total`` in all; None where nobody looks."""
    display = _display.get()
    if display is None:
        yield None
        return
    with display(label, total) as step:
        yield step


@contextmanager
def displaying(display: Display) -> Iterator[None]:
    """Within the block, the progress of every verb is displayed by ``display``.

    Parameters
    ----------
    display : callable
        Given a label and the total amount of work, a context manager that gives the function to call with every amount
        that is done.
    """
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)
