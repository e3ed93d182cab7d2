"""Names and paths for other programs, one per line."""

from collections.abc import Iterable

import click

from loralens.core.messages import warn
from loralens.tables.numbers import count


def as_argument(path: str) -> str:
    """A path that no program takes for an option: a folder may be called ``-rf``."""
    return f"./{path}" if path.startswith("-") else path


def print_lines(lines: Iterable[str], *, complete: str, key: str) -> None:
    """Print those lines that are printed as they are: a program that reads them must not be given another name.

    ``complete`` is a command that prints all of them as JSON, under ``key``.
    """
    left_out = 0
    for line in lines:
        if line.isprintable():
            click.echo(line)
        else:
            left_out += 1
    if left_out:
        warn(
            f"{count(left_out, 'path')} with a line end, a control character or a wrong encoding left out",
            fix=f"{complete} has them in {key}",
        )
