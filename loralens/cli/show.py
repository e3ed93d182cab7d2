"""Shows results on standard output, as tables, JSON or CSV, and draws figures into files; the options for that."""

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import click

from loralens.cli.command_table import RowOptions
from loralens.cli.terminal import COLOURS, lines_said, print_styled, say
from loralens.core.messages import LOGGER
from loralens.errors import visible
from loralens.tables.numbers import count, join_words
from loralens.tables.result import Tabular
from loralens.tables.table import Table
from loralens.version import __version__

_NARROWEST = 20  # columns; COLUMNS with fewer is no width
_LEAST = 6  # lines that tables and sentences get on the smallest screen
_FEW = 3  # rows; a table with fewer says nothing, and is named instead
# What a sentence that says whether all is well contains.
_VERDICT = re.compile(r"\b\d[\d,]* (error|warning|note)s?\b|\b[Nn]othing\b")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of output, which is `visible` already, and its style on a terminal."""

    text: str
    style: Mapping[str, Any] = field(default_factory=dict)


class _Screen(NamedTuple):
    """The size of a terminal. Without a number of lines the output is a pipe, without columns its lines are whole."""

    columns: int | None
    lines: int | None


class More(NamedTuple):
    """What a command shows besides its result: tables, sentences below them, and what comes last of all."""

    tables: Sequence[Table[Any]] = ()
    sentences: Sequence[str] = ()
    last: Sequence[str] = ()


def rows_of(values: dict[str, Any]) -> RowOptions:
    """Take the options that show a result out of the values of all options, and check them."""
    rows = RowOptions(**{each.name: values.pop(each.name, each.default) for each in fields(RowOptions)})
    if values.get("overwrite"):
        rows = replace(rows, overwrite_plot=True)
    # Both would be written to standard output.
    if rows.as_json + rows.as_csv + rows.as_metrics > 1:
        other = "--csv" if rows.as_csv else "--metrics"
        raise click.UsageError(f"{'--json' if rows.as_json else '--metrics'} and {other} exclude each other")
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


def show(result: Tabular, rows: RowOptions, more: More | None = None, *, of: int = 1) -> None:
    """Print a result, and draw its figure if there is a file for it. It is one ``of`` so many that share the screen."""
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
    elif rows.as_metrics:
        click.echo(getattr(result, "metrics")())  # noqa: B009  # only the results of commands with this option have it
    else:
        _show_text(result, rows, more or More(), of)
    # Last, so that the result is printed even if the figure cannot be written.
    if rows.plot:
        # Imported here, since matplotlib takes long to import.
        from loralens.charts.figure_file import save_figure
        from loralens.verbs.pages.plot import plot

        save_figure(plot(result, **rows.figure), rows.plot, overwrite=rows.overwrite_plot)
        tell_written(rows.plot)


def _show_text(result: Tabular, rows: RowOptions, more: More, of: int) -> None:
    """Print the conclusion of a result, its tables, and what is said below them.

    On a terminal the conclusion is last, next to the prompt, unless all else depends on it (`conclusion_leads`).
    """
    screen = _screen()
    conclusion = result.conclusion()
    if rows.quiet:
        # A result without a conclusion is a few sentences, and these are then the answer.
        _print_conclusion(result, screen, conclusion or result.sentences())
        return
    tables, sentences = [*result.tables(), *more.tables], [*result.sentences(), *more.sentences]
    # Some results say everything in sentences; their rows are shown only if the user asks for rows.
    if not tables and (rows.verbose or rows.rows_shown):
        tables = [*result.listing()]
    if screen.lines is None:
        _print_conclusion(result, screen, conclusion)
        body = _table_lines(tables, screen, top=rows.rows_shown, every_row=rows.verbose)
        if conclusion and (sentences or body):
            body.insert(0, Line(""))
        _print(body)
        _print(_wrapped(sentences, screen))
        # Tables end with an empty line, and sentences do not.
        _print(_wrapped([*([""] if sentences and more.last else []), *more.last], screen))
        return
    last = _wrapped([*conclusion, *more.last], screen)
    room = None
    if not (rows.verbose or rows.rows_shown):
        # Messages stand above, the prompt stands below, and an empty line before the conclusion.
        room = (screen.lines - 1 - lines_said()) // of - len(last) - 1
        room = max(room, _LEAST) if of == 1 else room
    # Of several results that share the screen, the conclusions say most.
    if room is not None and room < _LEAST:
        body = [Line("… details: -v shows all", {"dim": True})]
    else:
        body = _body(tables, sentences, screen, rows, room)
    while body and not body[-1].text:
        body.pop()
    between = [Line("")] if body and last else []
    if result.conclusion_leads:
        _print_conclusion(result, screen, conclusion)
        _print([*between, *body])
    else:
        _print([*body, *between])
        _print_conclusion(result, screen, conclusion)
    _print(_wrapped(more.last, screen))


def _print_conclusion(result: Tabular, screen: _Screen, conclusion: Sequence[str]) -> None:
    """Print the conclusion, whose verdict has a colour: that of the worst finding, or of the answer."""
    answer = False if getattr(result, "failed", None) else getattr(result, "answer", None)
    findings = getattr(result, "findings", None)
    levels = {getattr(finding, "level", None) for finding in findings or ()}
    if answer is False or "error" in levels:
        colour = COLOURS["error"]
    elif "warning" in levels:
        colour = COLOURS["warning"]
    else:
        colour = COLOURS["fine"] if answer or findings is not None else 0
    # The sentence with the verdict, which is not always the first.
    verdict = next((sentence for sentence in conclusion if _VERDICT.search(sentence)), next(iter(conclusion), ""))
    for sentence in conclusion:
        style = {"bold": True, "fg": colour} if colour and sentence == verdict else {"bold": True}
        _print([replace(line, style=style) for line in _wrapped([sentence], screen)])


def _body(
    tables: Sequence[Table[Any]], sentences: Sequence[str], screen: _Screen, rows: RowOptions, room: int | None
) -> list[Line]:
    """The lines of tables and sentences; with ``room`` no more than so many, and how many are left out."""
    below = _wrapped(sentences, screen)

    def lines_of(tables: Sequence[Table[Any]], top: int | None) -> list[Line]:
        return _table_lines(tables, screen, top=top, every_row=rows.verbose, foremost=room is not None)

    if room is None:
        return [*lines_of(tables, rows.rows_shown), *below]
    tables = [table for table in tables if table.rows]
    longest = max((len(table.rows) for table in tables), default=0)
    # All of it, if there are few rows: a table of thousands is not laid out for nothing.
    if longest <= room and len(body := [*lines_of(tables, None), *below]) <= room:
        return body
    # The first table keeps a few rows, and the sentences get what is left; then the tables get what these do not need.
    least = min(len(lines_of(tables[:1], _FEW)), room) if tables else 0
    below = _shortened(below, max(room - least, 2))
    left = room - len(below)
    for number in range(len(tables), 0, -1):
        names = [f"{_name(table)} ({count(len(table.rows), 'row')})" for table in tables[number:]]
        hidden = _wrapped([f"… {join_words(names)}: -v shows all"], screen) if names else []
        fewest = 1 if number == 1 else _FEW
        for top in range(min(left, longest), fewest - 1, -1):
            body = lines_of(tables[:number], top)
            # The first table is shown in any case, even if it is a matrix that does not fit.
            if len(body) + len(hidden) <= left or (number == 1 and top == 1):
                return [*body[: max(left - len(hidden), _FEW)], *hidden, *below]
    return below


def _name(table: Table[Any]) -> str:
    """The beginning of a title, which says what the rows are."""
    return re.split(r"[(;:,]", table.title)[0].strip() or "further rows"


def _shortened(lines: Sequence[Line], room: int) -> list[Line]:
    """Lines of sentences that fit, and how many are left out; a fix is not parted from what it belongs to."""
    if len(lines) <= room:
        return [*lines]
    end = room - 1
    while end > 1 and lines[end].text.startswith("    "):
        end -= 1
    return [*lines[:end], Line(f"… {count(len(lines) - end, 'more line')}, -v shows all", {"dim": True})]


def _wrapped(sentences: Sequence[str], screen: _Screen) -> list[Line]:
    """The sentences as lines, which break between words in the width of the screen."""
    if not screen.columns:
        return [Line(visible(sentence)) for sentence in sentences]
    from loralens.tables.text import wrap

    # Some sentences are several lines, which are set as they are.
    return [
        Line(line)
        for sentence in sentences
        for line in ([visible(sentence)] if "\n" in sentence else wrap(visible(sentence), screen.columns))
    ]


def wrap_sentences(sentences: Sequence[str]) -> list[str]:
    """The sentences as lines that break between words, if the output has a width."""
    return [line.text for line in _wrapped(sentences, _screen())]


def _screen() -> _Screen:
    """The columns and lines of the terminal that is standard output.

    A pipe or a file has no number of lines, and only those columns that COLUMNS asks for: whole tables are written
    there, for grep and for other programs.
    """
    if not sys.stdout.isatty():
        columns = os.environ.get("COLUMNS", "")
        return _Screen(int(columns) if columns.isdecimal() and int(columns) >= _NARROWEST else None, None)
    from shutil import get_terminal_size  # imported here, as it brings the modules of three compressions with it

    return _Screen(*get_terminal_size())


def show_json(record: dict[str, Any]) -> None:
    """Print a record as one JSON object, with the version of loralens."""
    click.echo(json.dumps({"loralens": __version__, **record}))


def _table_lines(
    tables: Iterable[Table[Any]],
    screen: _Screen,
    *,
    top: int | None = None,
    every_row: bool = False,
    foremost: bool = False,
) -> list[Line]:
    """Tables as lines of aligned text, each with an empty line below; empty tables are left out.

    ``top`` and ``foremost`` are those of `Table.brief`. With ``every_row`` also rows with nothing notable are shown,
    and below a table what its columns mean.
    """
    from loralens.tables.text import lay_out, wrap  # imported here, as --json does not need it

    width = screen.columns
    explained: set[str] = set()
    lines: list[Line] = []

    def add(text: str, **style: Any) -> None:
        lines.extend(Line(line, style) for line in (wrap(text, width) if width else [text]))

    for table in tables:
        # A heading without rows would look like an error.
        if not table.rows:
            continue
        shown, left_out = (replace(table, uneventful=None) if every_row else table).brief(top, foremost=foremost)
        # If no row is notable, only the sentence is printed.
        if not shown.rows:
            if left_out:
                add(left_out)
                lines.append(Line(""))
            continue
        layout = lay_out(shown, width)
        add(layout.title, bold=True)
        # Pairs of a word and its value need no headings.
        if layout.heading:
            lines.append(Line(layout.heading, {"underline": True}))
        lines += map(Line, layout.lines)
        if left_out:
            add(f"{left_out}, -v shows all", dim=True)
        if layout.note:
            add(layout.note, dim=True)
        if every_row:
            for line in _meanings(shown, explained):
                add(line, dim=True)
        lines.append(Line(""))
    return lines


def _meanings(table: Table[Any], explained: set[str]) -> list[str]:
    """A line for each column that has an explanation, hidden columns too; ``explained`` holds those already shown."""
    # A dict, as several columns of a matrix may have one meaning.
    lines = dict.fromkeys(f"{column.title}: {column.about}" for column in table.shown if column.about)
    new = [line for line in lines if line not in explained]
    explained.update(new)
    return new


def _print(lines: Iterable[Line]) -> None:
    for line in lines:
        print_styled(line.text, **line.style)


def tell_written(file: Path) -> None:
    """Report on standard error that a file was written; standard output has only results."""
    say(f"Wrote {file}.", err=True)
