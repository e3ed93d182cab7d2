"""The options that several commands share: each is declared here once, with one help text."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import click

from loralens.choices import FLOAT_TYPES, TARGET_FORMATS
from loralens.cli.paths import EMPTY, FilledPath

Command = Callable[..., None]
F = TypeVar("F", bound=Callable[..., Any])

PATH = FilledPath(path_type=Path)
# Every number of something is at least 1: 0 is never useful, and is refused as wrong usage.
COUNT = click.IntRange(min=1)

_BASE_HELP = "The base model: a folder, a safetensors or GGUF file, or a Hub id in the local cache."


def refuse_non_finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Refuse NaN and infinity as wrong usage; Python's float accepts both as text."""
    del ctx
    if value is not None and not isfinite(value):
        raise click.BadParameter("must be a finite number", param=param)
    return value


def decorate(function: F, decorators: Sequence[Callable[[F], F]]) -> F:
    """The function with several options, which ``--help`` lists in the order of the sequence."""
    # Reversed, since click lists the option first whose decorator is applied last.
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


# ---- Which adapters, modules and base are read


# Twice is the default, because PEFT trains, runs and merges such a layer in this way.
ONCE = click.option(
    "--once",
    is_flag=True,
    help="Add the update of the out_proj of an nn.MultiheadAttention once; PEFT adds it twice.",
)
_READING = (
    click.option("--format", metavar="NAME", help="The dialect of the file, if its content fits several dialects."),
    click.option(
        "--alpha",
        type=float,
        callback=refuse_non_finite,
        help="The α to use if the file states none. The scale is then α/r.",
    ),
    click.option("--scale", type=float, callback=refuse_non_finite, help="The scale of a file that does not state it."),
    ONCE,
)
_MODULES = click.option(
    "--modules",
    "-m",
    metavar="GLOB",
    multiple=True,
    help="Only modules whose name or kind matches this glob pattern, or has it as whole parts. Repeatable.",
)
_BLOCK = click.option(
    "--block",
    metavar="BLOCK",
    multiple=True,
    help="Only modules in these blocks: 3, 4-8, or IN04 of an image model; with -m, what both choose. Repeatable.",
)

# docs/commands/scale.md lists the presets, and the blocks in their order. Both are plain strings: which presets and
# blocks there are depends on the model of the adapter, which is not read yet.
_BLOCKS = (
    click.option("--preset", metavar="NAME", help="Preset weights for the blocks of SD, SDXL or FLUX: OUTALL, MIDD …"),
    click.option(
        "--block-weights",
        metavar="WEIGHTS",
        help="Weights of blocks: IN04=0,MID=1, or all in their order, as block weight tools write them.",
    ),
)


def modules(function: F) -> F:
    """The options that choose modules."""
    return decorate(function, (_MODULES, _BLOCK))


def blocks(function: F) -> F:
    """The options that give the blocks of an image model weights."""
    return decorate(function, _BLOCKS)


def reading(function: F) -> F:
    """The options of every command that reads an adapter."""
    return decorate(function, _READING)


# A plain string and no path, as in `model`: it may also be a Hub id.
def base(purpose: str = "", *, required: bool = False) -> Callable[[F], F]:
    """``--base``; ``purpose`` is a sentence on why a command needs it, if it can also work without."""
    return click.option("--base", required=required, metavar="MODEL", help=f"{_BASE_HELP} {purpose}".rstrip())


def split_weight(text: str) -> tuple[str, float]:
    """``ADAPTER:0.7`` as path and weight: the text after the last colon is a weight if it is a number.

    A path that exists has no weight, since names of files may contain colons.
    """
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not path:
        raise click.BadParameter(f"{text}: the path before the weight {EMPTY}")
    # If the path before the colon does not exist, the error is about the path, not about the weight.
    # Imported here, since the help of commands, which imports this file, starts no NumPy.
    from loralens.formats.files.location import existing_path

    existing_path(Path(path))
    if not isfinite(weight):
        raise click.BadParameter(f"{text}: the weight must be a finite number")
    return path, weight


# ---- What is written, and where


OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace what is already at the output path.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Check everything, report what would be done, write nothing.")
ALLOW_LOSS = click.option(
    "--allow-loss", is_flag=True, help="Write even if rounding changes the update of a module by more than 1 %."
)
UNIFORM = click.option(
    "--uniform", is_flag=True, help="Give all modules the same rank, padded with zeros, as LoRAX and mlx-lm require."
)
FORCE = click.option("--force", is_flag=True, help="Combine adapters of different image models too.")
DROP_DEAD = click.option("--drop-dead", is_flag=True, help="Leave out modules whose update is zero.")


def output(metavar: str, text: str, *, required: bool = False) -> Callable[[F], F]:
    """``-o``: where a command writes; without a default, since nothing is written to a path that was not named."""
    # Most commands do not let click require this option, because a dry run needs no target; see `require_output`.
    return click.option("-o", "--output", type=PATH, metavar=metavar, required=required, help=text)


ADAPTER_OUTPUT = output("OUT", "The file or folder to write.")
TARGET_OR_FOLDER = "The file or folder to write; of several adapters, the folder for all of them."
JOBS = click.option(
    "--jobs",
    "-j",
    type=COUNT,
    metavar="N",
    help="The number of adapters that are processed at a time, each in its own process. [default: 1]",
)


def require_output(keywords: Mapping[str, Any]) -> None:
    """Refuse, as wrong usage and before any work, a call without a target; only a dry run needs none."""
    if keywords["output"] is None and not keywords["dry_run"]:
        raise click.UsageError("Missing option '-o': say where to write, or give --dry-run")


def to(source: str = "the source") -> Callable[[F], F]:
    """``--to``: the dialect that is written; ``source`` is the adapter whose dialect it is by default."""
    text = f"The dialect to write. [default: the dialect of {source}]"
    return click.option("--to", type=click.Choice(TARGET_FORMATS), help=text)


# Without a default, since the dtypes of the source may differ from module to module.
DTYPE = click.option(
    "--dtype",
    type=click.Choice(tuple(FLOAT_TYPES)),
    help="Round all factors to this dtype. [default: the dtypes of the source]",
)


def take(holders: str) -> Callable[[F], F]:
    """``--take``: the adapter whose fully trained tensors are written if ``holders`` have some."""
    text = f"The adapter whose heads and biases are written where {holders} have some; 'none' leaves them out."
    return click.option("--take", metavar="ADAPTER", help=text)


def writing(function: Command, *, several: bool = False) -> Command:
    """The options of every command that writes an adapter made from others, and the options of reading those.

    With ``several`` the command takes several adapters and writes each.
    """

    # wraps keeps the docstring, which is the text of --help.
    @wraps(function)
    def with_output(*arguments: Any, **keywords: Any) -> None:
        require_output(keywords)
        function(*arguments, **keywords)

    options: tuple[Callable[[Command], Command], ...] = (
        output("OUT", TARGET_OR_FOLDER) if several else ADAPTER_OUTPUT,
        to("each adapter" if several else "the first adapter"),
        base("Needed for DoRA, and for GGUF."),
        DTYPE,
        ALLOW_LOSS,
        OVERWRITE,
        DRY_RUN,
        reading,
    )
    decorated: Command = with_output
    return decorate(decorated, options)


# ---- How ranks are chosen


# The bounds are where a rule has no meaning: an energy of 0 or an error of 1 would keep nothing, and for X below 1 σ₁/X
# is above every singular value.
_RANK_RULES = (
    click.option("--rank", type=COUNT, metavar="R", help="Keep the R leading directions of every module."),
    click.option(
        "--energy",
        type=click.FloatRange(min=0, max=1, min_open=True),
        metavar="X",
        help="Keep the fewest directions of a module that hold this share of its energy Σσ², such as 0.99.",
    ),
    click.option(
        "--error",
        type=click.FloatRange(min=0, max=1, max_open=True),
        metavar="X",
        help="Keep the fewest directions of a module whose relative error ‖ΔW−ΔW'‖/‖ΔW‖ is at most this, such as 0.05.",
    ),
    click.option(
        "--sv-ratio",
        type=click.FloatRange(min=1),
        metavar="X",
        help="Keep the directions of a module whose singular value is above σ₁/X.",
    ),
    click.option(
        "--parameters",
        type=click.FloatRange(min=0, min_open=True),
        metavar="N",
        help="Keep as many directions as one budget for the whole adapter allows: a share of its parameters (0.5), or "
        "their number.",
    ),
    # The verb reads the unit, as it does in Python.
    click.option("--size", metavar="BYTES", help="The same budget in bytes of the file, such as 20MB or 512KiB."),
)
# A string, since it may also be the path of a file.
PROTECT = click.option(
    "--weights",
    default="absolute",
    show_default=True,
    metavar="WHAT",
    help="The error that a budget minimises: absolute, relative to each module, or weighted by a JSON file that "
    "maps globs to weights.",
)
# `report` has the same option for several files.
ACTIVATIONS_HELP = "A file of `loralens calibrate`: the second moments of real inputs."
ACTIVATIONS = click.option("--activations", metavar="FILE", help=f"{ACTIVATIONS_HELP} Errors are measured on them.")


def rank_rules(function: F) -> F:
    """The options that choose the ranks; a command needs one of them."""
    return decorate(function, _RANK_RULES)


# ---- Merging, and arithmetic on weights of the base


def untying(text: str) -> Callable[[F], F]:
    """``--untie`` and ``--keep-tied``: whether tied weights become separate weights."""
    # None if neither is given: the verb then decides by the adapter.
    return click.option("--untie/--keep-tied", "untie", default=None, help=text)


def rounding(modes: Sequence[str]) -> Callable[[F], F]:
    """``--rounding``: how merged weights are rounded; ``modes`` are the choices, as `doctor` cannot predict all."""
    text = "How a merge rounds the new weights to their dtype."
    return click.option("--rounding", type=click.Choice(modes), default="nearest", show_default=True, help=text)


def seed(purpose: str, *, least: int | None = 0, default: int | None = 0) -> Callable[[F], F]:
    """``--seed``: the seed of the random numbers for ``purpose``.

    ``least`` is None where the seed is hashed, so that any whole number will do.
    """
    return click.option(
        "--seed",
        type=click.INT if least is None else click.IntRange(min=least),
        default=default,
        show_default=default is not None,
        metavar="N",
        help=f"Seed of the random numbers for {purpose}.",
    )


def device(default: str | None = "cpu", *, note: str = "") -> Callable[[F], F]:
    """``--device``: where matrices as large as W are computed; `MODEL_DEVICE` is where a model runs."""
    # Without a default the verb can tell whether the option was given.
    hint = "" if default else " [default: cpu]"
    text = f"The device for computations on W: cpu, cuda or cuda:N.{note}{hint}"
    return click.option("--device", default=default, show_default=default is not None, metavar="NAME", help=text)


def cache(what: str) -> Callable[[F], F]:
    """``--cache``, ``--cache-limit`` and ``--no-cache``: where ``what`` of base weights is kept between runs."""
    text = f"The folder in which {what} of W are kept between runs. [default: in the user's cache folder]"
    limit = "If the folder is larger than this, its oldest entries are deleted."
    return lambda function: decorate(
        function,
        (
            click.option("--cache", type=PATH, metavar="DIR", help=text),
            # U and V of a whole SVD take 8 bytes for every number of a square weight: 20 GB hold 2.5 billion numbers.
            click.option("--cache-limit", default="20GB", show_default=True, metavar="SIZE", help=limit),
            click.option("--no-cache", is_flag=True, help=f"Neither use nor keep {what} of earlier runs."),
        ),
    )


SAME_BITS = " The result has the same bits on every device."


# ---- Running models on texts


def model(*, required: bool = True) -> Callable[[F], F]:
    """``--model``: the model that is run."""
    text = "The base model: a transformers folder, a GGUF file, a Hub id in the local cache, or an installed package."
    return click.option("--model", required=required, metavar="DIR", help=text)


LIMIT = click.option("--limit", type=COUNT, metavar="N", help="Use only the first N texts.")
MODEL_DEVICE = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="The device that runs the model: cpu, cuda, cuda:1, mps …, or auto for a GPU if there is one.",
)
MODEL_DTYPE = click.option(
    "--dtype",
    type=click.Choice(list(FLOAT_TYPES)),
    default="f32",
    show_default=True,
    help="The dtype of the model's weights, in which it computes.",
)
THREADS = click.option(
    "--threads", type=COUNT, metavar="N", help="The number of CPU threads. [default: all that the process may use]"
)


def batch(default: int) -> Callable[[F], F]:
    """``--batch`` of commands that run a model without training it."""
    text = "The number of texts that the model sees at a time."
    return click.option("--batch", type=COUNT, default=default, show_default=True, metavar="N", help=text)


def length(default: int | str) -> Callable[[F], F]:
    """``--length``: where texts are cut. A default that is a string is a description of how the verb chooses it."""
    text = "The number of tokens after which a text is cut."
    if isinstance(default, str):
        return click.option("--length", type=COUNT, metavar="N", help=f"{text} [default: {default}]")
    return click.option("--length", type=COUNT, default=default, show_default=True, metavar="N", help=text)


_RUNNING = (
    model(),
    click.option(
        "--data",
        required=True,
        type=PATH,
        metavar="FILE",
        help='Real inputs: a .jsonl file of {"text": …}, a .txt file of one text per line, or a .csv or .tsv file with '
        "a column named text.",
    ),
    LIMIT,
    # Fewer than `evaluate` takes, since hidden states are kept for a whole batch.
    batch(16),
    length(256),
    MODEL_DEVICE,
    MODEL_DTYPE,
    THREADS,
)


def running(function: F) -> F:
    """The options of every command that observes a model while it runs on texts."""
    return decorate(function, _RUNNING)
