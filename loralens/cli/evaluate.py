"""The command ``loralens evaluate``: declares its options, calls the verb and shows the result."""

from typing import Any, get_args

import click

import loralens
from loralens.choices import TaskName
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("evaluate")
# None is required: without an adapter the model is measured as it is.
@click.argument("adapters", nargs=-1, metavar="[ADAPTER]...")
@options.model()
@click.option("--task", type=click.Choice(get_args(TaskName)), required=True, help="The task that is measured.")
# A plain string and no path: it may be the name of a corpus.
@click.option(
    "--data",
    required=True,
    metavar="FILE",
    help="The texts, in a file as train reads it; or the name of a corpus, of which the held-out texts are taken.",
)
@options.LIMIT
# More than the 16 of `options.running`, since no hidden states are kept.
@options.batch(64)
@options.length("as the adapter was trained, else 256")
@options.MODEL_DEVICE
@options.MODEL_DTYPE
@options.THREADS
@options.output("FILE", "Also write the result to this .json file, for `report --evaluations`.")
@options.OVERWRITE
@row_options(csv="adapter")
@options.reading
def command(adapters: tuple[str, ...], rows: RowOptions, **keywords: Any) -> None:
    """Measure loss, accuracy and, for language models, perplexity: with each adapter, or without any.

    The labels of a classifier are taken from the adapter if it states them, else from the model if it knows the labels
    of the texts, else from the texts, sorted.
    """
    show(loralens.evaluate(*adapters, **keywords), rows)
