"""Runs a verb on one adapter or on several, shows the result, and chooses the exit code."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from loralens.cli.show import RowOptions, show, wrap_sentences
from loralens.cli.terminal import say

FAILED, NO = 2, 1  # exit codes: an adapter could not be processed, an answer is no


def run_verb(
    verb: Callable[..., Any], adapters: Sequence[str], rows: RowOptions, *arguments: Any, **keywords: Any
) -> None:
    """Call a verb with the adapters of the command line, show what it returns, and exit with its answer."""
    # Imported here, so that showing the help of a command does not import NumPy.
    from loralens.verbs.batches.batch import is_several

    source = adapters[0] if len(adapters) == 1 else list(adapters)
    several = is_several(source)
    # This is refused before any work.
    if rows.plot and several:
        raise click.UsageError("--plot draws one adapter, and there are several")
    with lines_shown(rows):
        result = verb(source, *arguments, **keywords)
    show_answer(result, rows, several=several)


@contextmanager
def lines_shown(rows: RowOptions) -> Iterator[None]:
    """Within the context, a line about each of several adapters appears on a terminal as soon as it is finished."""
    if not _is_live(rows):
        yield
        return
    from loralens.verbs.batches.batch import watch_lines

    with watch_lines(_print_line):
        yield


def _is_live(rows: RowOptions) -> bool:
    """Whether lines are for a reader who waits; programs get the complete result."""
    return sys.stdout.isatty() and not (rows.as_json or rows.as_csv or rows.quiet)


def show_answer(result: Any, rows: RowOptions, *, several: bool) -> None:
    """Show a result, and exit with its answer. If there were several adapters, it is a `BatchResult`.

    On a terminal the lines about several adapters stand there already, and what they say together comes last. Elsewhere
    the conclusion comes first, as of every result.
    """
    if several and _is_live(rows):
        say("", *wrap_sentences(result.conclusion()))
        if sentences := result.sentences():
            say("", *wrap_sentences([sentence.strip() for sentence in sentences]))
    else:
        show(result, rows)
    if several and rows.verbose and not (rows.as_json or rows.as_csv):
        say(*result.details())
    if getattr(result, "failed", None):
        click.get_current_context().exit(FAILED)
    # Results of verbs that answer no yes-or-no question have no `answer`; they count as yes.
    if not getattr(result, "answer", True):
        click.get_current_context().exit(NO)


def _print_line(line: str) -> None:
    first, *continued = wrap_sentences([line])
    say(first, *(f"  {part}" for part in continued))
