"""What Python cannot say about commands: short letters, words for values, ranges, headings, and what rows stand for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from loralens.choices import TRAINING_NAMES
from loralens.exports import Options

# Parameters that are arguments of a command; everything else is an option.
ARGUMENTS = frozenset(
    ("adapter", "adapters", "first", "folder", "merged", "name", "run_file", "second", "server", "source", "sql")
)
# Options whose value may be a path, although it is passed on as a string: a Hub id or ``A:0.7`` is not a path.
PLACES = frozenset(
    ("activations", "adapter", "adapters", "base", "data", "eval", "first_a", "model", "start_from", "tuned")
)
# Parameter → the words of its option, where these are more than --parameter.
NAMES = {
    "as_csv": ("--csv",),
    "as_json": ("--json",),
    "as_metrics": ("--metrics",),
    "overwrite_plot": ("--overwrite",),
    "quiet": ("--quiet", "-q"),
    "rows_shown": ("--top",),
    "verbose": ("--verbose", "-v"),
    "consumer": ("--consumer", "--for"),
    "jobs": ("--jobs", "-j"),
    "k": ("-k",),
    "modules": ("--modules", "-m"),
    "output": ("-o", "--output"),
    "settings": ("--settings", "--set"),
    "strength": ("--strength", "--lambda"),
    "untie": ("--untie/--keep-tied",),
}
FIGURE = ("figure_title", "figure_size", "figure_dpi")
METAVARS = {
    "figure_title": "TEXT",
    "figure_size": "WxH",
    "figure_dpi": "N",
    "adapters": "ADAPTER",
    "first": "A",
    "second": "B",
    "folder": "DIR",
    "name": "COMMAND",
    "sql": '"SELECT …"',
    "adapter": "ADAPTER",
    "base": "MODEL",
    "block": "BLOCK",
    "block_weights": "WEIGHTS",
    "cache": "DIR",
    "cache_limit": "SIZE",
    "dask": "ADDRESS",
    "exclude": "GLOBS",
    "first_a": "ADAPTER",
    "fleet": "HOME",
    "grid": "OPTION=VALUES",
    "heads": "GLOBS",
    "like": "RUN",
    "model": "DIR",
    "modules": "GLOB",
    "output": "OUT",
    "prefix": "OLD=NEW",
    "rank": "R",
    "rank_pattern": "GLOB=R",
    "remove": "λ",
    "settings": "NAME=X",
    "size": "BYTES",
    "start_from": "ADAPTER",
    "take": "ADAPTER",
    "targets": "GLOBS",
    "trl": "NAME=VALUE",
    "tuned": "MODEL",
    "weights": "WHAT",
}
# The bounds are where an option has no meaning: an energy of 0 or an error of 1 would keep nothing, and for X below 1
# σ₁/X is above every singular value.
RANGES: dict[str, Any] = {
    "energy": click.FloatRange(min=0, max=1, min_open=True),
    "error": click.FloatRange(min=0, max=1, max_open=True),
    "sv_ratio": click.FloatRange(min=1),
    "sv_cumulative": click.FloatRange(min=0, max=1, min_open=True),
    "parameters": click.FloatRange(min=0, min_open=True),
    "tolerance": click.FloatRange(min=0),
    "threshold": click.FloatRange(0, 1, min_open=True),
    "samples": click.IntRange(min=0),
    "seed": click.IntRange(min=0),
}
# Options that most people need less, wherever they are, below the heading that `--help` gives them.
HEADINGS = {
    name: heading
    for heading, names in {
        "Writing": "to arch allow_loss allow_missing overwrite dry_run uniform drop_dead drop_extra force "
        "only_if_smaller take",
        "Computing": "jobs device seed batch length threads phi_rank directions no_top",
    }.items()
    for name in names.split()
}


class Setting(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # not generic in click 8.1
    """``NAME=VALUE``, where the value is a number: a setting of a method."""

    name = "setting"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """The name and the number; ``inf`` is a number too."""
        # click may convert a value twice, for example a default.
        if isinstance(value, tuple):
            return value
        name, equals, number = str(value).partition("=")
        try:
            return name.strip(), float(number)
        except ValueError:
            self.fail(f"{value!r} is not NAME=VALUE" if not equals else f"{number!r} is not a number", param, ctx)


class Inches(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # not generic in click 8.1
    """A width and a height in inches, such as 6.5x4."""

    name = "WIDTHxHEIGHT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        """Return the two numbers."""
        if isinstance(value, tuple):
            return value
        try:
            width, height = map(float, value.lower().split("x"))
        except ValueError:
            self.fail(f"{value!r:.100} is not a size: write it like 6.5x4, in inches", param, ctx)
        return width, height


RANGES |= {"settings": Setting(), "figure_size": Inches()}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOptions(Options):
    """Showing the result: on standard output, and as a figure. What is in braces comes from the `Row` of a command.

    Parameters
    ----------
    as_json
        Print the complete result as one JSON object.
    quiet
        Print the conclusion only.
    verbose
        {row.verbose}
    rows_shown
        Show only the first N rows of each table. Not with --quiet or --verbose.
    as_csv
        Print CSV with one row per {row.csv}.
    as_metrics
        Print {row.metrics} as one line in Prometheus's text format.
    plot
        Draw {row.plot} into FILE (.png, .jpg, .webp, .svg or .pdf).
    figure_title
        The title of the figure in place of its own; '' for none.
    figure_size
        Its width and height in inches, such as 6.5x4.
    figure_dpi
        Its dots per inch. [default: 150]
    overwrite_plot
        Replace the FILE of --plot.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    rows_shown: int | None = None
    as_csv: bool = False
    as_metrics: bool = False
    plot: Path | None = None
    figure_title: str | None = None
    figure_size: tuple[float, float] | None = None
    figure_dpi: float | None = None
    overwrite_plot: bool = False

    @property
    def figure(self) -> dict[str, Any]:
        """The keywords of `loralens.plot`."""
        return {name: getattr(self, name) for name in FIGURE}


@dataclass(frozen=True, slots=True)
class Row:
    """What Python cannot say about one command.

    Attributes
    ----------
    csv, metrics, plot : str
        What a row of ``--csv`` stands for, what ``--metrics`` prints and ``--plot`` draws; if empty, there is no such
        option.
    verbose : str
        What ``--verbose`` does.
    top : bool
        Whether there is a ``--top`` that limits the rows of tables; not for a command whose own ``--top`` chooses them.
    metavars : mapping of str to str
        Words for values that differ from `METAVARS`; an argument in brackets may be left out.
    options : sequence of str
        Parameters that are options although `ARGUMENTS` has them.
    types : mapping of str to type
        Types that differ from those of the signature.
    flag_values : mapping of str to str
        Option → the value that it has if none is given.
    shows : bool
        Whether the command has a result to show.
    aliases : mapping of str to str
        Words that other programs have for options, with underscores → the parameter.
    in_python : sequence of str
        Parameters that only Python has, as the shell says the same in another way.
    asks : bool
        Whether the answer of the result is that of the command: 1 is the exit code of no.
    """

    csv: str = ""
    plot: str = ""
    verbose: str = "Print all rows, not only those that fit and matter, and explain the columns."
    top: bool = True
    metavars: Mapping[str, str] = field(default_factory=dict)
    options: Sequence[str] = ()
    types: Mapping[str, Any] = field(default_factory=dict)
    flag_values: Mapping[str, str] = field(default_factory=dict)
    shows: bool = True
    aliases: Mapping[str, str] = field(default_factory=dict)
    in_python: Sequence[str] = ()
    asks: bool = True
    metrics: str = ""


ALSO_MODULES = "Also list the modules."
WEIGHTED = {"adapters": "ADAPTER[:W]...", "adapter": "ADAPTER[:W]"}
ROWS = {
    "amplify": Row("module and rank", "the amplification of every module"),
    "behave": Row("pair of versions"),
    "calibrate": Row("module", options=("adapter",)),
    "combine": Row("module", metavars=WEIGHTED | {"adapters": "[ADAPTER[:W]]..."}, in_python=("weights",)),
    "compress": Row("module", "the size and the error of every rank"),
    "convert": Row("module", verbose=ALSO_MODULES),
    "curve": Row("rank", "size and error against rank"),
    "doctor": Row("finding"),
    "drop": Row("module", verbose=ALSO_MODULES),
    "equal": Row("module"),
    "evaluate": Row("adapter", metavars={"adapters": "[ADAPTER]..."}),
    "explain": Row(
        "word of a list",
        "the words by their change and by the number of texts",
        metavars={"siblings": "ADAPTER"},
    ),
    # With a value of its own, --noise-edge alone means --noise-edge rounding.
    "extract": Row("module", flag_values={"noise_edge": "rounding"}),
    "inspect": Row("module"),
    "interpolate": Row("module", types={"at": click.FLOAT}),
    "intruders": Row("module", top=False),
    # Negative seeds too: the seed is hashed, so that any whole number will do.
    "merge": Row("module", metavars=WEIGHTED, types={"seed": click.INT}),
    "negate": Row("module"),
    # Without --csv and --top: the page has tables of many kinds, and the terminal gets sentences only.
    "prove": Row(
        "group of modules",
        "served against predicted changes of all tokens",
        "Print all rows and the strength in every block, and explain the columns.",
        metavars={
            "adapter": "[ADAPTER]",
            "against": "MODEL",
            "base_name": "NAME",
            "between": "NAME1 NAME2",
            "model": "NAME",
            "server": "URL",
            "siblings": "ADAPTER",
        },
        options=("model", "server"),
        metrics="strength and verdict",
    ),
    "report": Row(verbose="Also print the other sentences of the summary.", metavars={"adapters": "[ADAPTER...]"}),
    "scale": Row("module"),
    "schema": Row(shows=False),
    "served": Row("name", metavars={"server": "URL"}),
    "similarity": Row("module (of one adapter: pair of modules; of three and more: pair of adapters)", "φ(i, j)"),
    # Its own --top sorts the modules by their norm.
    "spectrum": Row("module", "the spectra", top=False),
    "subtract": Row("module"),
    "survey": Row("file", metavars={"html": "PAGE"}),
    "train": Row(verbose="Also print every evaluation.", metavars={"run_file": "[RUN.toml]"}, aliases=TRAINING_NAMES),
    "trajectory": Row("checkpoint", "the run over its steps", metavars={"adapters": "RUN|LOG|ADAPTER..."}),
    "unmerge": Row(verbose="Also list the tensors.", metavars=WEIGHTED, options=("adapter",), asks=False),
    "verify": Row("module", metavars=WEIGHTED, types={"seed": click.INT}, options=("adapter",)),
    "demo": Row(shows=False, metavars={"adapters": "DIR", "texts": "DIR"}),
    # Sub-commands of fleet
    "fleet index": Row("file that has changed", metavars={"output": "HOME"}),
    "fleet near": Row("neighbour"),
    "fleet copies": Row("copy"),
    "fleet runs": Row("adapter"),
    "fleet families": Row("adapter", types={"at": click.FloatRange(0.1, 1.0)}, metavars={"at": "COSINE"}),
    "fleet explain": Row(
        "word of a family", types={"at": click.FloatRange(0.1, 1.0)}, metavars={"at": "COSINE", "base": "MODEL"}
    ),
    "fleet bases": Row("adapter"),
    "fleet empty": Row("adapter with ΔW = 0 in a module"),
    "fleet stats": Row("rank"),
    "fleet rows": Row("row"),
}
