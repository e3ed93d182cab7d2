"""Patterns of HTML, and the texts that are put into them."""

import re

from markupsafe import Markup

_UNIT = re.compile(r"(?<=\d) (?=(?:%|[kMGT]?B)(?!\w))")


def fill(pattern: str, **values: object) -> Markup:
    """A pattern of HTML with every value in it escaped, except for those that are markup already.

    Only the pattern itself is trusted, so it must be a constant of the program and never a text of a file.
    """
    return Markup(pattern).format(**values)  # noqa: S704  # the pattern is a constant


def join_units(text: str) -> str:
    """Text with no line breaks between a number and its unit."""
    return _UNIT.sub("\u00a0", text)
