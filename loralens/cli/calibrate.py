"""The command ``loralens calibrate``: declares its options, calls the verb and shows the result."""

from typing import Any

import click

import loralens
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("calibrate")
@click.option("--adapter", metavar="A", required=True, help="The adapter: a file, a folder, or a Hub id.")
@options.output("FILE", "The .safetensors file to write.")
@options.running
# Off by default: a backward pass takes longer, and needs a loss, which not every model and text have.
@click.option(
    "--out-side",
    is_flag=True,
    help="Also measure the gradients at the outputs of every module, which takes a loss and a backward pass.",
)
@options.OVERWRITE
@options.DRY_RUN
@row_options(csv="module")
@options.reading
def command(adapter: str, rows: RowOptions, **keywords: Any) -> None:
    """Measure the second moments of real inputs in every module of an adapter: K = E[z zᵀ], z = A x.

    The model runs with the adapter switched on, so x are the inputs that its modules will see. `compress` takes the r ×
    r matrices as --activations, and keeps the directions that matter on such inputs. A few hundred texts like those of
    later use are enough. The same call on the same machine gives the same bytes.
    """
    # Here and not by click, as a dry run needs no target; and before the model is loaded.
    options.require_output(keywords)
    show(loralens.calibrate(adapter, **keywords), rows)
