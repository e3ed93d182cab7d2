"""Messages to the user while a verb works: errors, warnings and notes.

They are records of the logger ``loralens`` with the levels ERROR, WARNING and INFO. The command line prints all of them
to standard error. A program that uses the library sees warnings and errors unless it configures logging differently,
and notes only if it enables them.
"""

import logging
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

from loralens.errors import visible

if TYPE_CHECKING:
    from loralens.core.adapter import Finding, Level

LOGGER = logging.getLogger("loralens")
LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "note": logging.INFO}


def tell(level: "Level", text: str, fix: str = "") -> None:
    """Log a message; control characters in it are escaped."""
    # `visible` escapes control characters, since texts from files could otherwise act on a terminal.
    LOGGER.log(LEVELS[level], "%s", visible(text) + (f"\n  fix: {visible(fix)}" if fix else ""))


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
            tell(finding.level, f"{place}: {finding.text}", finding.fix)
