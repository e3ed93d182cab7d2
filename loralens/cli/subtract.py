"""``loralens subtract``: options in, the verb called, its result shown."""

from typing import Unpack

import click

from loralens.cli import options
from loralens.cli.show import Rows, show
from loralens.verbs.outputs.writing import WritingAndReading
from loralens.verbs.subtract import subtract


@click.command("subtract")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@options.MODULES
@options.take("both")
@options.DROP_DEAD
@options.writing
def command(
    first: str,
    second: str,
    modules: tuple[str, ...],
    take: str | None,
    drop_dead: bool,
    rows: Rows,
    **files: Unpack[WritingAndReading],
) -> None:
    """Write A − B, exact; with --modules B is taken away only there.

    What is equal in both comes out as exact zeros.
    """
    show(subtract(first, second, modules=modules, take=take, drop_dead=drop_dead, **files), rows)
