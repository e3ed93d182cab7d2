"""``loralens doctor``: options in, the verb called, its result shown."""

from pathlib import Path
from typing import Unpack, get_args

import click

from loralens.analysis.checks.diagnosis import LEVELS
from loralens.cli import options
from loralens.cli.show import Rows, show, wrote
from loralens.core.adapter import Level
from loralens.verbs.doctor import MergeDType, Rounding, doctor
from loralens.verbs.inputs.adapters import Reading


@click.command("doctor")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--base", metavar="MODEL", help=options.BASE_HELP)
@options.MODULES
@click.option("--dtype", type=click.Choice(get_args(MergeDType)), help="The dtype of a merge. [default: as the base]")
@click.option(
    "--rounding",
    type=click.Choice(get_args(Rounding)),
    default="nearest",
    show_default=True,
    help="How a merge would round; of error feedback only merging tells.",
)
@click.option(
    "--sarif", type=click.Path(path_type=Path), metavar="FILE", help="Write the findings as SARIF 2.1.0, for CI."
)
@click.option(
    "--fail-on", type=click.Choice(LEVELS), help="Exit 1 when there is a finding of this level or a worse one."
)
@options.rows(csv="One line a finding.", json="Machine-readable, one finding a module.")
@options.reading
@click.pass_context
def command(
    ctx: click.Context,
    adapters: tuple[str, ...],
    base: str | None,
    modules: tuple[str, ...],
    dtype: MergeDType | None,
    rounding: Rounding,
    sarif: Path | None,
    fail_on: Level | None,
    rows: Rows,
    **reading: Unpack[Reading],
) -> None:
    """Say what is wrong with adapters, most serious first, each finding with its evidence and what mends it.

    ADAPTER is a file, a folder that holds one, or a Hub id in the local cache; several are also compared with each
    other. A file that cannot be read is a finding too. Exit 0 whatever is found, unless --fail-on says otherwise.
    """
    result = doctor(
        *adapters,
        base=base,
        modules=modules,
        dtype=dtype,
        rounding=rounding,
        sarif=sarif,
        fail_on=fail_on,
        **reading,
    )
    if sarif:
        wrote(sarif)
    show(result, rows)
    if not result.answer:
        ctx.exit(1)
