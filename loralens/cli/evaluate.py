"""``loralens evaluate``: options in, the verb called, its result shown."""

from typing import Unpack, get_args

import click

from loralens.cli import options
from loralens.cli.show import Rows, show
from loralens.verbs.evaluate import evaluate
from loralens.verbs.inputs.adapters import Reading
from loralens.verbs.inputs.choices import FloatType
from loralens.verbs.inputs.data import TaskName

COUNT = click.IntRange(min=1)


@click.command("evaluate")
@click.argument("adapters", nargs=-1, metavar="[ADAPTER]...")
@click.option("--model", required=True, metavar="DIR", help="The base: a transformers folder, a Hub id, or a package.")
@click.option("--task", type=click.Choice(get_args(TaskName)), required=True, help="What is asked of it.")
@click.option("--data", required=True, metavar="FILE", help="Texts as train takes them; of a corpus what it holds out.")
@click.option("--limit", type=COUNT, metavar="N", help="Only the first N texts.")
@click.option("--batch", type=COUNT, default=64, show_default=True, metavar="N", help="Texts at a time.")
@click.option("--length", type=COUNT, metavar="N", help="Tokens of a text.  [default: as it was trained, else 256]")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="cpu, cuda, mps …")
@click.option("--dtype", type=click.Choice(get_args(FloatType)), default="f32", show_default=True, help="Of the model.")
@click.option("--threads", type=COUNT, metavar="N", help="Of the CPU.  [default: all that it may use]")
@options.rows(csv="One line an adapter.", json="Machine-readable result.")
@options.reading
def command(
    adapters: tuple[str, ...],
    model: str,
    task: TaskName,
    data: str,
    limit: int | None,
    batch: int,
    length: int | None,
    device: str,
    dtype: FloatType,
    threads: int | None,
    rows: Rows,
    **reading: Unpack[Reading],
) -> None:
    """Measure loss, accuracy and, of language, perplexity: of the model with each adapter, or of the model as it is.

    A classifier's labels are those that the adapter was trained on, where it says so, else the model's own, where it
    knows those of the texts, else those of the texts, sorted.
    """
    result = evaluate(
        *adapters,
        model=model,
        task=task,
        data=data,
        limit=limit,
        batch=batch,
        length=length,
        device=device,
        dtype=dtype,
        threads=threads,
        **reading,
    )
    show(result, rows)
