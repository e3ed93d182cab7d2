"""Shows results on standard output, as tables, JSON or CSV, and draws figures into files."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import click

from loralens.cli.terminal import raw_stream, say
from loralens.tables.result import Tabular
from loralens.tables.table import Table
from loralens.version import __version__


@dataclass(frozen=True, slots=True)
class RowOptions:
    """How a command shows its result: ``--json``, ``--csv``, ``--plot``."""

    as_json: bool = False
    as_csv: bool = False
    plot: Path | None = None


@runtime_checkable
class InPieces(Protocol):
    """A result whose JSON may be too large to be held: it gives the text piece by piece."""

    def json_pieces(self) -> Iterator[str]:
        """The text of the whole object, its version included."""
        ...


def show(result: Tabular, rows: RowOptions) -> None:
    """Print a result, and draw it where a file for its figure was named."""
    if rows.as_json and isinstance(result, InPieces):
        for piece in result.json_pieces():
            click.echo(piece, nl=False)
        click.echo()
    elif rows.as_json:
        show_json(result.record())  # type: ignore[attr-defined]  # every result has one
    elif rows.as_csv:
        click.echo(result.to_csv(), nl=False)
    else:
        show_tables(*result.tables())
        say(*result.sentences())
    if rows.plot:
        save_figure_of(result, rows.plot)


def show_json(record: dict[str, Any]) -> None:
    """One JSON object, with the version that wrote it."""
    click.echo(json.dumps({"loralens": __version__, **record}))


def show_tables(*tables: Table[Any]) -> None:
    """Tables as aligned text; on a terminal in its width, with bold headings; those without rows left out."""
    # Imported here, as --json needs neither: shutil alone brings the modules of three compressions with it.
    from shutil import get_terminal_size

    from loralens.tables.text import lay_out

    # A pipe or a file has no width: there whole tables are written, for grep and for other programs.
    width = get_terminal_size().columns if sys.stdout.isatty() else None
    for table in tables:
        # A heading without rows would look like an error.
        if not table.rows:
            continue
        layout = lay_out(table, width)
        _print_styled(layout.title, width, fg="cyan", bold=True)
        _print_styled(layout.heading, None, bold=True)
        for line in layout.lines:
            click.echo(line)
        if layout.note:
            _print_styled(layout.note, width, dim=True)
        click.echo()


def _print_styled(text: str, width: int | None, **style: Any) -> None:
    """Text in the style that is asked for, where standard output is a terminal; all text is `visible` already."""
    from loralens.tables.text import wrap

    for line in [text] if width is None else wrap(text, width):
        click.secho(line, file=raw_stream(sys.stdout), **style)


def save_figure_of(result: object, file: Path) -> None:
    """Write the figure of a result, and say so on stderr."""
    from loralens.charts.figure import save_figure
    from loralens.verbs.plot import figure_of

    save_figure(figure_of(result), file)
    tell_written(file)


def tell_written(file: Path) -> None:
    """Say on stderr that a file was written."""
    say(f"wrote {file}", err=True)
