"""The command ``loralens equal``: declares its options, calls the verb and shows the result."""

from typing import Any

import click

import loralens
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("equal")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
# Above the rounding of float32 factors, which is about 1e-7, and far below that of 16-bit ones, about 1e-3.
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    callback=options.refuse_non_finite,
    default=1e-6,
    show_default=True,
    help="The largest relative difference ‖ΔW₁−ΔW₂‖/‖ΔW‖ of equal modules.",
)
@options.base("Says the head counts for GGUF files, and how stacks of experts are ordered.")
@row_options(csv="module")
@options.reading
def command(first: str, second: str, rows: RowOptions, **keywords: Any) -> None:
    """Test whether two adapters are the same update, whatever their dialects, ranks or factors.

    Modules are matched by name; if that fails, dots and underscores are taken as the same. --alpha and --scale are used
    for the adapter that does not state its own. If one of two GGUF files states the head counts, they are used for
    both; otherwise --base is needed. The exit code is 0 if they are equal, 1 if not.
    """
    result = loralens.equal(first, second, **keywords)
    show(result, rows)
    # 1 is the answer no. Errors exit with 2, so that scripts can tell them apart.
    if not result.answer:
        click.get_current_context().exit(1)
