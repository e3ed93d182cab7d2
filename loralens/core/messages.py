"""Messages to the user while a verb works (errors, warnings, notes), and commands in them as a user types them.

Messages are records of the logger ``loralens`` with the levels ERROR, WARNING and INFO. The command line prints all of
them to standard error. A program that uses the library sees warnings and errors unless it configures logging
differently, and notes only if it enables them.
"""

import logging
import os
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from shlex import quote
from typing import TYPE_CHECKING

from loralens.choices import Level
from loralens.errors import spell, visible

if TYPE_CHECKING:
    from loralens.core.adapter import Finding


LOGGER = logging.getLogger("loralens")
LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "note": logging.INFO}


def tell(level: Level, text: str, fix: str = "", *, place: str = "") -> None:
    """Log a message; control characters in it are escaped.

    ``place`` is the file that the message is about. The log record has the attribute ``place`` with this file and the
    attribute ``about`` with the rest of the message. A handler can so recognise a message that it has already shown for
    another file.
    """
    # `visible` escapes control characters, since texts from files could otherwise act on a terminal.
    about = visible(spell(text)) + (f"\n  fix: {visible(spell(fix))}" if fix else "")
    shown = visible(place)
    message = f"{shown}: {about}" if place else about
    LOGGER.log(LEVELS[level], "%s", message, extra={"place": shown, "about": about})


def note(text: str, fix: str = "") -> None:
    """Log a note, which the user may want to know."""
    tell("note", text, fix)


def warn(text: str, fix: str = "") -> None:
    """Log a warning about something that may change the meaning of a result."""
    tell("warning", text, fix)


def tell_findings(place: str, findings: "Iterable[Finding]", *, without: Container[str] = ()) -> None:
    """Log the findings of a reader about the file at ``place``, except those whose code is in ``without``."""
    for finding in findings:
        if finding.code not in without:
            tell(finding.level, finding.text, finding.fix, place=place)


def quote_word(word: str) -> str:
    """A word of a command in the form that a shell reads back unchanged.

    A word with a newline or another control character is written as bash's ``$'…'``.
    """
    if word.isprintable():
        return quote(word)
    plain = word.replace("\\", "\\\\").replace("'", "\\'")
    short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    # Bytes, not code points: names of files may hold bytes that are not text.
    escaped = [short.get(x) or "".join(f"\\x{byte:02x}" for byte in os.fsencode(x)) for x in plain]
    return f"$'{''.join(x if x.isprintable() else y for x, y in zip(plain, escaped, strict=True))}'"


def command_line(*words: str) -> str:
    """A command on one line, as a user types it."""
    return " ".join(map(quote_word, words))


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


@contextmanager
def messages_to(handler: logging.Handler) -> Iterator[None]:
    """Within the context, messages of all levels go to this handler alone."""
    # The logger belongs to the process, so that its settings are restored after the block.
    handlers, level, propagate = LOGGER.handlers, LOGGER.level, LOGGER.propagate
    LOGGER.handlers, LOGGER.propagate = [handler], False
    LOGGER.setLevel(LEVELS["note"])
    try:
        yield
    finally:
        LOGGER.handlers, LOGGER.propagate = handlers, propagate
        LOGGER.setLevel(level)
