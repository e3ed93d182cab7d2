"""``loralens amplify``: options in, the verb called, its result shown."""

from typing import Unpack

import click

from loralens.cli import options
from loralens.cli.show import Rows, show
from loralens.verbs.amplify import amplify
from loralens.verbs.inputs.adapters import Reading


@click.command("amplify")
@click.argument("adapter", metavar="ADAPTER")
@click.option("--base", required=True, metavar="MODEL", help=options.BASE_HELP)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="R",
    help="Leading directions of ΔW to keep. Repeatable. [default: all]",
)
@click.option("--no-top", is_flag=True, help="Leave out the leading directions of W: one pass over the base.")
@click.option(
    "--directions", type=click.IntRange(min=1), metavar="N", help="How many of W. [default: as many as of ΔW]"
)
@click.option("--exact", is_flag=True, help="Dense SVD of W: minutes and more memory for a big one.")
@click.option("--phi-rank", type=click.IntRange(min=1), default=16, show_default=True, help="Largest i, j of φ shown.")
@click.option("--device", default="cpu", show_default=True, help="Where to work on W: cpu, cuda or cuda:N.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the sketch and the start.")
@options.MODULES
@options.rows(
    csv="One line a module and rank.",
    plot="Draw it: .png, .svg or .pdf.",
    json="Machine-readable, with curves, directions and φ.",
)
@options.reading
def command(
    adapter: str,
    base: str,
    rank: tuple[int, ...],
    no_top: bool,
    directions: int | None,
    exact: bool,
    phi_rank: int,
    device: str,
    seed: int,
    modules: tuple[str, ...],
    rows: Rows,
    **reading: Unpack[Reading],
) -> None:
    """Show what ΔW amplifies of W: ‖ΔW‖/‖UᵀWV‖ with U, V the singular directions of ΔW (Table 7 of the LoRA paper).

    Beside it what uniform directions would catch of W, the excess over that with its z-score, and the most that any
    directions could. Weights of MODEL are read one at a time.
    """
    result = amplify(
        adapter,
        base=base,
        rank=rank,
        no_top=no_top,
        directions=directions,
        exact=exact,
        phi_rank=phi_rank,
        device=device,
        seed=seed,
        modules=modules,
        **reading,
    )
    show(result, rows)
