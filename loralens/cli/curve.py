"""``loralens curve``: options in, the verb called, its result shown."""

from typing import Unpack

import click

from loralens.cli import compress_rule, options
from loralens.cli.show import Rows, show
from loralens.verbs.curve import curve
from loralens.verbs.inputs.adapters import Reading
from loralens.verbs.inputs.choices import FLOAT_TYPES, FloatType
from loralens.verbs.outputs.form import TARGET_FORMATS, TargetFormat


@click.command("curve")
@click.argument("source")
@click.option("--to", type=click.Choice(TARGET_FORMATS), help="The dialect of the file. [default: the source's own]")
@click.option("--dtype", type=click.Choice(list(FLOAT_TYPES)), help="The dtype of the file. [default: as it is]")
@compress_rule.PROTECT
@compress_rule.ACTIVATIONS
@click.option("--base", metavar="MODEL", help=f"{options.BASE_HELP} For GGUF.")
@options.MODULES
@options.rows(json="Machine-readable.", csv="One line a rank.", plot="Draw it: .png, .svg or .pdf.")
@options.reading
def command(
    source: str,
    to: TargetFormat | None,
    dtype: FloatType | None,
    weights: str,
    activations: str | None,
    base: str | None,
    modules: tuple[str, ...],
    rows: Rows,
    **reading: Unpack[Reading],
) -> None:
    """Show rank against size against error: for one rank everywhere, and for ranks where they save most.

    Every line is a file that `loralens compress` would write: with --rank R, with a --size of the same bytes, and with
    that size and --to loralens-q (expected, not measured). Errors are those of truncation; rounding to bfloat16 adds
    about 0.2 % of ‖ΔW‖ in quadrature, float16 0.03 %. With --activations they are those on the data, and nothing is
    said of few bits.
    """
    result = curve(
        source,
        to=to,
        dtype=dtype,
        weights=weights,
        activations=activations,
        base=base,
        modules=modules,
        **reading,
    )
    show(result, rows)
