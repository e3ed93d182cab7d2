"""Shows results on standard output, as tables, JSON or CSV, and draws figures into files; the options for that."""

import json
import logging
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click

from loralens.cli.table import RowOptions
from loralens.cli.terminal import raw_stream, say
from loralens.core.messages import LOGGER
from loralens.errors import visible
from loralens.tables.result import Tabular
from loralens.tables.table import Table
from loralens.version import __version__

# Lines that are not wrapped: they hold a command, which is copied as a whole, or are set as they are.
_UNWRAPPED = re.compile(r"^ |\n|\b(loralens|pip|python3?) ")


def rows_of(values: dict[str, Any]) -> RowOptions:
    """Take the options that show a result out of the values of all options, and check them."""
    rows = RowOptions(**{each.name: values.pop(each.name, each.default) for each in fields(RowOptions)})
    if values.get("overwrite"):
        rows = replace(rows, overwrite_plot=True)
    # Both would be written to standard output.
    if rows.as_json and rows.as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    _check_no_file("--json" if rows.as_json else "--csv" if rows.as_csv else "", values.values())
    # They ask for the conclusion alone, for every row, and for some rows, so they contradict each other.
    if rows.quiet + rows.verbose + bool(rows.rows_shown) > 1:
        raise click.UsageError("--quiet, --verbose and --top exclude each other: give one of them")
    if rows.plot:
        # Imported here, since the renderers take long to import and few calls need them.
        from loralens.charts.figure_file import check_figure_file, check_suffix

        # Before any work.
        check_suffix(rows.plot)
        check_figure_file(rows.plot, overwrite=rows.overwrite_plot)
    if option := next((name for name, value in rows.figure.items() if value is not None), None):
        if rows.plot is None:
            raise click.UsageError(f"--{option.replace('_', '-')} changes a figure: give --plot too")
        from loralens.charts.figure_file import FigureStyle

        FigureStyle(**rows.figure).check()
    # Warnings may change what the conclusion means, and notes do not.
    if rows.quiet:
        LOGGER.setLevel(logging.WARNING)
    return rows


def _check_no_file(option: str, values: Iterable[Any]) -> None:
    """Refuse ``--csv out.csv``, where the file would be taken for an adapter that does not exist."""
    for value in values if option else ():
        for word in value if isinstance(value, tuple) else (value,):
            # A file that exists may be meant: the index of a model is JSON too.
            if isinstance(word, str) and word.lower().endswith(f".{option[2:]}") and not Path(word).exists():
                raise click.UsageError(f"{option} takes no file: to write {word}, end the command with > {word}")


def show(result: Tabular, rows: RowOptions) -> None:
    """Print a result, and draw its figure if there is a file for it."""
    # The JSON of a large collection takes more memory than its numbers, so it comes in pieces.
    if rows.as_json and hasattr(result, "json_pieces"):
        for piece in result.json_pieces():
            click.echo(piece, nl=False)
        click.echo()
    elif rows.as_json:
        show_json(result.record())
    elif rows.as_csv:
        # click would take the escapes of colours out of a name where the output is no terminal.
        click.echo(visible(result.to_csv(), keep="\n\t"), nl=False, color=True)
    else:
        _show_text(result, rows)
    # Last, so that the result is printed even if the figure cannot be written.
    if rows.plot:
        # Imported here, since matplotlib takes long to import.
        from loralens.charts.figure_file import save_figure
        from loralens.verbs.pages.plot import plot

        save_figure(plot(result, **rows.figure), rows.plot, overwrite=rows.overwrite_plot)
        tell_written(rows.plot)


def _show_text(result: Tabular, rows: RowOptions) -> None:
    """Print the conclusion of a result, then its tables, then what is said below them."""
    conclusion = result.conclusion()
    if rows.quiet:
        # A result without a conclusion is a few sentences, and these are then the answer.
        say(*(wrap_sentences(conclusion) or result.sentences()))
        return
    say(*wrap_sentences(conclusion))
    tables, sentences = result.tables(), result.sentences()
    # Some results say everything in sentences; their rows are shown only if the user asks for rows.
    if not tables and (rows.verbose or rows.rows_shown):
        tables = result.listing()
    # A table prints nothing if all its rows are uneventful and its sentence about them is empty.
    below = any(shown.rows or left_out for shown, left_out in (table.brief(rows.rows_shown) for table in tables))
    if conclusion and (sentences or below or (rows.verbose and any(table.rows for table in tables))):
        say("")
    show_tables(*tables, top=rows.rows_shown, every_row=rows.verbose)
    for sentence in sentences:
        say(*([sentence] if _UNWRAPPED.search(sentence) else wrap_sentences([sentence])))


def wrap_sentences(sentences: Sequence[str]) -> list[str]:
    """The sentences as lines that break between words, if standard output is a terminal."""
    # Programs that read the output get every sentence as one line.
    width = _terminal_width()
    if not (width and sentences):
        return list(sentences)
    from loralens.tables.text import wrap

    return [line for sentence in sentences for line in wrap(visible(sentence), width)]


def _terminal_width() -> int | None:
    """The columns of the terminal that is standard output.

    None for a pipe or a file: whole tables are written there, for grep and for other programs.
    """
    if not sys.stdout.isatty():
        return None
    from shutil import get_terminal_size  # imported here, as it brings the modules of three compressions with it

    return get_terminal_size().columns


def show_json(record: dict[str, Any]) -> None:
    """Print a record as one JSON object, with the version of loralens."""
    click.echo(json.dumps({"loralens": __version__, **record}))


def show_tables(*tables: Table[Any], top: int | None = None, every_row: bool = False) -> None:
    """Print tables as aligned text, on a terminal in its width and with bold headings; empty ones are left out.

    Parameters
    ----------
    top : int, optional
        The number of rows of each table that are shown at most.
    every_row : bool
        Show all rows, also those with nothing notable, and below a table what its columns mean.
    """
    from loralens.tables.text import lay_out  # imported here, as --json does not need it

    width = _terminal_width()
    explained: set[str] = set()
    for table in tables:
        # A heading without rows would look like an error.
        if not table.rows:
            continue
        shown, left_out = (replace(table, uneventful=None, most=None) if every_row else table).brief(top)
        # If no row is notable, only the sentence is printed.
        if not shown.rows:
            say(*([left_out, ""] if left_out else []))
            continue
        layout = lay_out(shown, width)
        _print_styled(layout.title, width, fg="cyan", bold=True)
        # Pairs of a word and its value need no headings.
        if layout.heading:
            _print_styled(layout.heading, None, bold=True)
        for line in layout.lines:
            click.echo(line)
        if left_out:
            _print_styled(f"{left_out} (--verbose shows every row)", width, dim=True)
        if layout.note:
            _print_styled(layout.note, width, dim=True)
        if every_row:
            for line in _meanings(shown, explained):
                _print_styled(line, width, dim=True)
        click.echo()


def _meanings(table: Table[Any], explained: set[str]) -> list[str]:
    """A line for each column that has an explanation, hidden columns too; ``explained`` holds those already shown."""
    # A dict, as several columns of a matrix may have one meaning.
    lines = dict.fromkeys(f"{column.title}: {column.about}" for column in table.shown if column.about)
    new = [line for line in lines if line not in explained]
    explained.update(new)
    return new


def _print_styled(text: str, width: int | None, **style: Any) -> None:
    """Print text in a style, if standard output is a terminal; the text must be `visible` already."""
    from loralens.tables.text import wrap

    # To the stream below, since the escapes of the style must act on the terminal.
    for line in [text] if width is None else wrap(text, width):
        click.secho(line, file=raw_stream(sys.stdout), **style)


def tell_written(file: Path) -> None:
    """Report on standard error that a file was written; standard output has only results."""
    say(f"wrote {file}", err=True)
