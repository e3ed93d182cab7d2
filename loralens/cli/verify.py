"""``loralens verify``: options in, the verb called, its result shown, its answer the exit code."""

from typing import Unpack, get_args

import click

from loralens.cli import options
from loralens.cli.show import Rows, show
from loralens.merging.rounding import Mode
from loralens.verbs.inputs.adapters import Reading
from loralens.verbs.verify import verify


@click.command("verify")
@click.argument("merged")
@options.base(required=True)
@click.option(
    "--adapter",
    multiple=True,
    required=True,
    metavar="ADAPTER[:W]",
    help="An adapter that was merged, with weight W. Repeatable.",
)
@options.rounding(get_args(Mode))
@options.seed("stochastic rounding", least=None)
@options.untying(
    "Whether the merge gave the head a weight of its own. [default: as in MERGED, or if the adapter needs one]"
)
@options.device(note=options.SAME_BITS)
@options.MODULES
@options.rows(csv="module")
@options.reading
def command(
    merged: str,
    base: str,
    adapter: tuple[str, ...],
    rounding: Mode,
    seed: int,
    untie: bool | None,
    device: str,
    modules: tuple[str, ...],
    rows: Rows,
    **reading: Unpack[Reading],
) -> None:
    """Say of every module whether MERGED holds it: the merge is replayed and compared.

    exact: every bit is what loralens writes. rounded: it is there in full, rounded otherwise. partial: at another
    strength, below 0.9 or above 1.1 or not what the rounding predicts. absent: below 0.1, as in the base or another
    model. What rounding itself took counts like what is missing. Exit code 0 for exact and rounded, 1 for partial and
    absent; the whole is as good as its worst module.
    """
    result = verify(
        merged,
        base=base,
        adapter=[options.weighted(text) for text in adapter],
        rounding=rounding,
        seed=seed,
        untie=untie,
        device=device,
        modules=modules,
        **reading,
    )
    show(result, rows)
    if not result.answer:
        click.get_current_context().exit(1)
