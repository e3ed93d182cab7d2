"""The command ``loralens fleet``: the functions of this file declare its sub-commands, which `Fleet` answers."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from os import PathLike
from typing import Any

import click

from loralens.choices import FloatType
from loralens.cli.command_table import ROWS
from loralens.cli.commands import UNDECIDED
from loralens.cli.derive import DerivedGroup, derive, read_function
from loralens.cli.show import rows_of, show
from loralens.core.messages import warn
from loralens.exports import Options
from loralens.tables.numbers import count

HOME = str | PathLike[str]

# Sub-command → its line in the help of the group.
SUBCOMMANDS = {
    "index": "Make or update the index of all adapters under a folder.",
    "near": "Find the adapters that are most like an example.",
    "copies": "Find copies, and the files that can be deleted.",
    "runs": "Group the adapters that began from the same random A.",
    "families": "Group the adapters whose updates are alike.",
    "explain": "Show the words that set the families apart from each other.",
    "bases": "Show which base model each adapter is for.",
    "empty": "List the adapters that change no weight.",
    "stats": "Count adapters, ranks and dialects.",
    "rows": "Show what the catalogue answers to a SELECT.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Home(Options):
    """Options: the index that answers.

    Parameters
    ----------
    fleet
        The index, or the folder that holds .loralens-fleet.
    """

    fleet: HOME = "."


def index(
    folder: HOME, *, output: HOME | None = None, jobs: int | None = None, dask: str | None = None, once: bool = False
) -> None:
    """Make or update the index of all adapters under DIR.

    Only files that are new or have changed are read. A file that cannot be read is listed with the reason. The exit
    code is 0 whatever is there. A run that is interrupted or killed goes on from there when it is called again.

    Parameters
    ----------
    output
        The folder of the index. [default: .loralens-fleet in DIR]
    jobs
        Measure the files in N processes. [default: one for each processor from 400 files on, else threads]
    dask
        Measure the files on the workers of this Dask scheduler; they need the disk.
    once
        Add the update of the out_proj of an nn.MultiheadAttention once; PEFT adds it twice.

    Examples
    --------
    $ loralens fleet index folder
    """


def near(adapter: HOME, *, k: int = 10, sketch: bool = False, exact: bool = False, home: Home) -> None:
    """Find the adapters of a fleet whose updates are most like ADAPTER.

    ADAPTER is a file, a folder that holds one, or the name of an adapter in the fleet. Sketches propose adapters, and
    the nearest of them are read and compared exactly. The cosine is that of the whole updates, where a module that one
    of them lacks counts as 0; `common` is the cosine over the modules that both have.

    Parameters
    ----------
    k
        The number of neighbours.
    sketch
        Compare sketches only, and read no file of the fleet.
    exact
        Compare every adapter exactly that has a module of the example.

    Examples
    --------
    $ loralens fleet near adapter --fleet folder
    """


def copies(*, home: Home, paths: bool = False) -> None:
    """Find adapters that are the same update as another, and say which files can be deleted.

    Copies in another dialect, dtype or rank and with other factors are found too, and every copy is confirmed by
    reading both files. One file of each group stays, and so does every target of a link, and a copy that names another
    base. Paths that lead to one file through a link are not copies, and checkpoints of different steps are not either.

    Parameters
    ----------
    paths
        Print only the files that can be deleted without a loss, one per line.

    Examples
    --------
    $ loralens fleet copies --fleet folder
    """


def runs(*, home: Home, sketch: bool = False) -> None:
    """Group the adapters that began from the same random A: checkpoints of one run, and runs with one seed.

    Parameters
    ----------
    sketch
        State cosines by sketches, and read no file of the fleet.

    Examples
    --------
    $ loralens fleet runs --fleet folder
    """


def families(*, at: float = 0.5, home: Home, sketch: bool = False) -> None:
    """Group the adapters whose updates are alike, by average linkage of their cosines.

    Parameters
    ----------
    at
        The smallest mean cosine within a family. 0.2 also joins adapters of one task by different authors.
    sketch
        State cosines by sketches, and read no file of the fleet.

    Examples
    --------
    $ loralens fleet families --fleet folder
    """


def explain(
    *,
    base: HOME,
    home: Home,
    at: float = 0.5,
    forward: bool = False,
    limit: int = 16,
    device: str = "auto",
    dtype: FloatType = "f32",
    threads: int | None = None,
) -> None:
    """Show the words that set the families of a fleet apart from each other, on a base model that they fit.

    Up to three adapters of every family are averaged, and what the other families do is subtracted. An adapter that is
    in no family stands for itself. Only words beyond those of random updates are listed, and they are a hint and no
    proof. The exit code is 3 if no family has one.

    Parameters
    ----------
    base
        The base model: a transformers folder, a GGUF file, a Hub id in the local cache, or an installed package.
    at
        The smallest mean cosine within a family.
    forward
        Run the model on neutral texts. This also finds topics that differ within one style, and takes longer.
    limit
        The number of families and single adapters that are read, the largest families first.
    device
        The device that runs the model: cpu, cuda, cuda:1, mps …, or auto for a GPU if there is one.
    dtype
        The dtype of the model's weights, in which it computes.
    threads
        The number of CPU threads. [default: all that the process may use]

    Examples
    --------
    $ loralens fleet explain --base model --fleet folder
    """


def bases(*, home: Home) -> None:
    """Show which base model each adapter is for: the one that it names, or the one that it shows.

    If a file names no base, the names and shapes of its modules show it, or other adapters of the fleet that are like
    it. If several bases fit, the base is unknown. Adapters that name a base whose weights they do not fit are listed.

    Examples
    --------
    $ loralens fleet bases --fleet folder
    """


def empty(*, home: Home) -> None:
    """List the adapters that change no weight, because ΔW is 0 in all their modules.

    Examples
    --------
    $ loralens fleet empty --fleet folder
    """


def stats(*, home: Home, above: int | None = None) -> None:
    """Count adapters, ranks and dialects, and say which rank a server must allow.

    Parameters
    ----------
    above
        Print only the names of the adapters with a module of a rank above R, one per line.

    Examples
    --------
    $ loralens fleet stats --fleet folder
    """


def rows(sql: str, *, home: Home) -> None:
    """Show what the catalogue answers to a SELECT.

    The tables are adapters, unreadable, files (both, and files without LoRA pairs) and signatures. The catalogue is
    opened for reading only.

    Examples
    --------
    $ loralens fleet rows "SELECT path, rank FROM adapters" --fleet folder
    """


def _print_lines(lines: Iterable[str], *, complete: str, key: str) -> None:
    """Print those lines that are printed as they are: a program that reads them must not be given another name.

    ``complete`` is a command that prints all of them as JSON, under ``key``.
    """
    left_out = 0
    for line in lines:
        if line.isprintable():
            click.echo(line)
        else:
            left_out += 1
    if left_out:
        warn(
            f"{count(left_out, 'path')} with a line end, a control character or a wrong encoding left out",
            fix=f"{complete} has them in {key}",
        )


@cache
def _subcommand(name: str) -> click.Command:
    row = ROWS[f"fleet {name}"]

    def run(values: dict[str, Any], given: set[str]) -> None:
        del given
        shown = rows_of(values)
        # Imported here, since the help of a command needs no NumPy.
        from loralens.verbs.fleets.fleet_verbs import index_fleet, open_fleet

        if name == "index":
            if values["dask"] and values["jobs"]:
                what = "--jobs and --dask exclude each other: the workers of Dask are as many as were started"
                raise click.UsageError(what)
            show(index_fleet(**values), shown)
            return
        opened = open_fleet(values.pop("fleet"))
        paths, above = values.pop("paths", False), values.pop("above", None)
        result = getattr(opened, name)(**values)
        if paths:
            # No program may take a path for an option: a folder may be called ``-rf``.
            lines = [f"./{path}" if str(path).startswith("-") else str(path) for path in result.safe_to_delete]
            _print_lines(lines, complete=opened.command("copies", "--json"), key="safe_to_delete")
        elif above is not None:
            _print_lines(result.above(above), complete=opened.command("stats", "--json"), key="above")
        else:
            show(result, shown)
            if getattr(result, "undecided", False):
                click.get_current_context().exit(UNDECIDED)

    return derive(name, read_function(__name__, name, row), row, run)


@click.group("fleet", cls=DerivedGroup, find=_subcommand, groups={"Commands": SUBCOMMANDS})
def fleet() -> None:
    """Index thousands of adapters, and search and group them.

    The index holds a catalogue of the files and a sketch of every update. All questions are answered from it, and files
    are read again only where exact numbers are needed.
    """
