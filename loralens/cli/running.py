"""Options of the commands that run a model on texts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from loralens.verbs.inputs.choices import FLOAT_TYPES

F = TypeVar("F", bound=Callable[..., Any])

RUNNING = (
    click.option(
        "--model", required=True, metavar="DIR", help="The base model: a transformers folder, a Hub id, or a package."
    ),
    click.option(
        "--data",
        required=True,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help='Real inputs: .jsonl of {"text": …}, .txt of one a line, .csv or .tsv with a column text.',
    ),
    click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N texts."),
    click.option(
        "--batch", type=click.IntRange(min=1), default=16, show_default=True, metavar="N", help="Texts at a time."
    ),
    click.option(
        "--length", type=click.IntRange(min=1), default=256, show_default=True, metavar="N", help="Tokens of a text."
    ),
    click.option("--device", default="auto", show_default=True, metavar="NAME", help="cpu, cuda, cuda:1, mps …"),
    click.option(
        "--dtype",
        type=click.Choice(list(FLOAT_TYPES)),
        default="f32",
        show_default=True,
        help="What the model computes in.",
    ),
    click.option(
        "--threads", type=click.IntRange(min=1), metavar="N", help="Of the CPU.  [default: all that it may use]"
    ),
)


def running(function: F) -> F:
    """The options of every command that runs a model on texts."""
    for option in reversed(RUNNING):
        function = option(function)
    return function
