"""``loralens equal``: options in, the verb called, its result shown."""

from typing import Unpack

import click

from loralens.cli import options
from loralens.cli.show import Rows, show
from loralens.verbs.equal import equal
from loralens.verbs.inputs.adapters import Reading


@click.command("equal")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    callback=options.finite,
    default=1e-6,
    show_default=True,
    help="The largest relative difference ‖ΔW₁−ΔW₂‖/‖ΔW‖ of equal modules.",
)
@options.base("Needed for the head counts of GGUF files.")
@options.rows(csv="module")
@options.reading
def command(
    first: str, second: str, tolerance: float, base: str | None, rows: Rows, **reading: Unpack[Reading]
) -> None:
    """Say whether A and B are the same update, whatever their dialects, ranks or gauge. Exit 0 if so, else 1.

    Modules are matched by name, else with dots and underscores taken as the same. --alpha and --scale go to whichever
    of the two does not say its own. Of two GGUF files one may say the head counts for both; else --base does.
    """
    result = equal(first, second, tolerance=tolerance, base=base, **reading)
    show(result, rows)
    if not result.answer:
        click.get_current_context().exit(1)
