"""Options that several commands share."""

from collections.abc import Callable
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import click

from loralens.cli.show import Rows
from loralens.formats.files.location import existing_path

BASE_HELP = "The base model: a folder, a safetensors file, or a Hub id in the local cache."

F = TypeVar("F", bound=Callable[..., Any])


def finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Refuse NaN and infinity, as wrong usage."""
    del ctx
    if value is not None and not isfinite(value):
        raise click.BadParameter("must be a finite number", param=param)
    return value


ALLOW_PICKLE = click.option(
    "--allow-pickle", is_flag=True, help="Read .bin and .pt files, by an unpickler that builds only tensors."
)
ONCE = click.option(
    "--once", is_flag=True, help="Take the out_proj of an nn.MultiheadAttention once; PEFT adds it twice."
)
_READING = (
    click.option("--format", metavar="NAME", help="The dialect of the file, where its content could be several."),
    click.option("--alpha", type=float, callback=finite, help="α of a file that does not say it: scale = α/r."),
    click.option("--scale", type=float, callback=finite, help="Scale of a file that does not say it."),
    ALLOW_PICKLE,
    ONCE,
)


def require_output(output: Path | None, *, dry_run: bool) -> None:
    """Refuse to work for a target that was not given, as wrong usage."""
    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o': say where to write, or give --dry-run")


ALLOW_LOSS = click.option("--allow-loss", is_flag=True, help="Write even where rounding costs a module more than 1 %.")
MODULES = click.option(
    "--modules", "-m", metavar="GLOB", multiple=True, help="Only these: a glob over names or kinds. Repeatable."
)


def untying(text: str) -> Callable[[F], F]:
    """``--untie`` and ``--keep-tied``: whether weights that share numbers become weights of their own."""
    return click.option("--untie/--keep-tied", "untie", default=None, help=text)


DEVICE = click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Where products are made: cpu, cuda or cuda:N. The bits are the same.",
)


def reading(function: F) -> F:
    """The options of every command that reads an adapter."""
    for option in reversed(_READING):
        function = option(function)
    return function


def rows(
    *, csv: str = "", plot: str = "", json: str = "Machine-readable, everything."
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of every command that shows rows, which it is given as one `Rows`.

    Parameters
    ----------
    csv, plot, json : str
        Help texts of ``--csv``, ``--plot`` and ``--json``; without one there is no such option.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def gathered(
            *arguments: Any, as_json: bool = False, as_csv: bool = False, plot: Path | None = None, **given: Any
        ) -> None:
            if as_json and as_csv:
                raise click.UsageError("--json and --csv exclude each other")
            function(*arguments, rows=Rows(as_json, as_csv, plot), **given)

        decorated: Callable[..., None] = gathered
        if plot:
            decorated = click.option(
                "--plot", type=click.Path(path_type=Path), callback=_drawable, metavar="FILE", help=plot
            )(decorated)
        if csv:
            decorated = click.option("--csv", "as_csv", is_flag=True, help=csv)(decorated)
        return click.option("--json", "as_json", is_flag=True, help=json)(decorated)

    return decorate


def _drawable(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that no figure can be written to, before any work."""
    del ctx, param
    if value:
        from loralens.charts.figure import check_suffix  # with the renderers, which few commands need

        check_suffix(value)
    return value


def weighted(text: str) -> tuple[str, float]:
    """``ADAPTER:0.7`` taken apart: what follows the last colon is a weight if it is a number and the rest exists."""
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    existing_path(Path(path))
    if not isfinite(weight):
        raise click.BadParameter(f"{text}: the weight must be a finite number")
    return path, weight
