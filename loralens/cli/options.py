"""Options that several commands share."""

from collections.abc import Callable, Container, Mapping
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loralens.cli.bases import warn_of_base
from loralens.cli.show import Rows
from loralens.cli.terminal import say
from loralens.core.shell import typed
from loralens.verbs.inputs.choices import FLOAT_TYPES, numpy_dtype

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.charts.spec import Figure
    from loralens.core.adapter import Adapter
    from loralens.core.structured import Updates
    from loralens.core.weights import Weights
    from loralens.formats.models.checkpoint import Checkpoint

ROUNDINGS = ("nearest", "stochastic", "feedback")  # of W + ΔW
DTYPES, dtype_of = FLOAT_TYPES, numpy_dtype  # of --dtype, for commands that are no functions yet

# Codes of findings about what is kept and not measured: of magnitudes, and of differences and weights in full.
DORA, DIFFERENCES = "use-dora", frozenset({"full-difference", "bias-difference", "set-weight"})

BASE_HELP = "The base model: a folder, a safetensors file, or a Hub id in the local cache."

F = TypeVar("F", bound=Callable[..., Any])
Held = TypeVar("Held")  # tensors, or their shapes


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
READING = ("format", "alpha", "scale", "allow_pickle", "once")  # what `reading` gives, for `load`

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


def as_typed(given: Mapping[str, Any]) -> str:
    """The options of `reading` that were given, as a user types them, to be repeated in another command."""
    words: list[str] = []
    for name, value in given.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return typed(*words)


def read_adapter(
    path: str, given: Mapping[str, Any], *, base: str | Path | None = None, whole: bool = False
) -> "Adapter":
    """The adapter at ``path``, read beside the base or model that the command was given; its findings go to stderr.

    ``whole``: the command applies all that the adapter carries, DoRA's magnitudes and full differences too, so that no
    finding is true that says what is left out of ΔW.
    """
    from loralens.core.carried import magnitudes
    from loralens.formats import load

    adapter = load(path, base=base, **given)
    if base is not None:
        warn_of_base(path, adapter, base)
    applied = DIFFERENCES | ({DORA} if magnitudes(adapter) else set()) if whole else ()
    warn(path, adapter, but=applied)
    return adapter


def load_if_unknown(path: str, given: Mapping[str, Any]) -> "Adapter":
    """The adapter at ``path``; --alpha and --scale count only where it does not say its own."""
    from loralens.formats import load

    adapter = load(path, **{**given, "alpha": None, "scale": None})
    stated = any(module.scaling.stated for module in adapter.modules.values())
    return adapter if stated else load(path, **given)


def warn(path: str, adapter: "Adapter", *, but: Container[str] = ()) -> None:
    """What the reader found, on stderr, ``but`` findings of these codes."""
    for finding in (one for one in adapter.findings if one.code not in but):
        say(f"{finding.level}: {path}: {finding.text}", err=True)
        if finding.fix:
            say(f"  fix: {finding.fix}", err=True)


def opened(path: str) -> "Checkpoint":
    """The checkpoint at ``path``, what its reader found said on stderr."""
    from loralens.formats.models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(Path(path))
    for note in checkpoint.notes:
        say(f"{note.level}: {path}: {note.text}", err=True)
    return checkpoint


def shown(stored: Mapping[str, Held], base: str) -> Mapping[str, Held]:
    """Tensors or shapes of the base at ``base``, with those of a head that it does not store: its embedding's."""
    from loralens.formats.models.checkpoint import model_config
    from loralens.merging.ties import find_ties

    return find_ties(stored, model_config(Path(base)) or {}).shown(stored)


def base_weights(base: str, modules: "Updates") -> "Weights":
    """The weights of the base at ``base`` that these modules adapt; errors say the base.

    A head that the base does not store, as it shares the embedding's weight, has that.
    """
    from loralens.core.weights import weights_of
    from loralens.errors import place
    from loralens.formats.models.checkpoint import stores_conv1d

    checkpoint = opened(base)
    with place(base):
        return weights_of(modules, shown(checkpoint.tensors, base), conv1d=stores_conv1d(Path(base)))


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
            decorated = _plot_option(plot)(decorated)
        if csv:
            decorated = click.option("--csv", "as_csv", is_flag=True, help=csv)(decorated)
        return click.option("--json", "as_json", is_flag=True, help=json)(decorated)

    return decorate


def _drawable(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that no figure can be written to, before any work."""
    del ctx, param
    if value:
        from loralens.charts.figure import check_suffix

        check_suffix(value)
    return value


def _plot_option(text: str) -> Callable[[F], F]:
    """The option of every command that draws a figure; ``text`` is its help."""
    return click.option("--plot", type=click.Path(path_type=Path), callback=_drawable, metavar="FILE", help=text)


plot = _plot_option


def draw(figure: "Figure", file: Path) -> None:
    """Write a figure, and say so on stderr."""
    from loralens.charts.figure import save

    save(figure, file)
    say(f"wrote {file}", err=True)


def weighted(text: str) -> tuple[str, float]:
    """``ADAPTER:0.7`` taken apart: what follows the last colon is a weight if it is a number and the rest exists."""
    from loralens.formats.files.location import existing

    path, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    existing(Path(path))
    if not isfinite(weight):
        raise click.BadParameter(f"{text}: the weight must be a finite number")
    return path, weight
