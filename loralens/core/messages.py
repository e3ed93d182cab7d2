"""Messages: warnings and notes that a verb gives while it works.

They are records of the logger ``loralens``: an error at level ERROR, a warning at WARNING, a note at INFO. The command
line prints all of them to standard error; a program that calls the library sees warnings and errors unless it
configures logging otherwise, and notes if it asks for them.
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
    """Give a message; nothing in it is anything but text to a terminal."""
    LOGGER.log(LEVELS[level], "%s", visible(text) + (f"\n  fix: {visible(fix)}" if fix else ""))


def note(text: str, fix: str = "") -> None:
    """Something that is good to know."""
    tell("note", text, fix)


def warn(text: str, fix: str = "") -> None:
    """Something that may make a result mean something else than it seems to."""
    tell("warning", text, fix)


def tell_findings(place: str, findings: "Iterable[Finding]", *, without: Container[str] = ()) -> None:
    """What a reader noticed of the file at ``place``, but for findings of the codes in ``without``."""
    for finding in findings:
        if finding.code not in without:
            tell(finding.level, f"{place}: {finding.text}", finding.fix)
