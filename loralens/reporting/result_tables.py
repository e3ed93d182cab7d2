"""The tables that a page shares with the results of other verbs, whose columns each verb declares once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from loralens.analysis.amplification import KeptRank
from loralens.analysis.every_pair import Pairwise
from loralens.analysis.intruders import Intruders
from loralens.analysis.spectrum import Group, Outlier
from loralens.compression.plan import CurvePoint
from loralens.core.names import kind, natural_key
from loralens.formats.records.results import StoredEvaluation
from loralens.reporting.collection import CheckpointRun
from loralens.reporting.document import PageTable
from loralens.reporting.subject import Subject
from loralens.tables.table import Column, Table

Value = TypeVar("Value")


class ResultTables(NamedTuple):
    """Functions that turn the numbers of a report into tables with the rows and columns of other verbs' results.

    They are handed in because verbs lie above this room, and imports only go down.

    Attributes
    ----------
    modules : callable
        Adapter → every module measured, in natural order.
    ranks : callable
        Adapter → size and error, one rank per row.
    groups : callable
        ``"kind"`` or ``"block"``, and the groups → one group per row.
    outliers : callable
        Modules that differ from the others of their kind → one module per row.
    amplification, intruders : callable
        Kind → its modules → one kind per row.
    pairs : callable
        Labels of all adapters, and their comparison → one pair per row, the largest |cosine| first.
    checkpoints : callable
        Labels of all adapters, and their run → one checkpoint per row, in the order of steps.
    quality : callable
        An evaluation on texts → one adapter per row, with its measures.
    """

    # Some types of rows are defined in the verbs, which this room may not import: hence `Table[Any]`.
    modules: Callable[[Subject], Table[Any]]
    ranks: Callable[[Subject], Table[CurvePoint]]
    groups: Callable[[str, Sequence[Group]], Table[Group]]
    outliers: Callable[[Sequence[Outlier]], Table[Outlier]]
    amplification: Callable[[Mapping[str, Sequence[KeptRank]]], Table[Any]]
    intruders: Callable[[Mapping[str, Sequence[Intruders]]], Table[Any]]
    pairs: Callable[[Sequence[str], Pairwise], Table[Any]]
    checkpoints: Callable[[Sequence[str], CheckpointRun], Table[Any]]
    quality: Callable[[StoredEvaluation], Table[Any]]


def kinds_table(
    table: Callable[[Mapping[str, Sequence[Value]]], Table[Any]],
    values: Mapping[str, Value],
    numbers: Mapping[str, int],
) -> PageTable:
    """A table with one row per kind, made from the values of its modules.

    Parameters
    ----------
    table : callable
        Kind → the values of its modules → the table; kinds come in natural order.
    values : mapping of str
        Module name → its value.
    numbers : mapping of str to int
        Module name → its number on the page.
    """
    # The sort is stable: within a kind the modules keep their order, and so do their numbers.
    members: dict[str, list[str]] = {}
    for name in sorted(values, key=lambda name: natural_key(kind(name))):
        members.setdefault(kind(name), []).append(name)
    rows = {label: [values[name] for name in names] for label, names in members.items()}
    return PageTable(table(rows), [[numbers[name] for name in names] for names in members.values()])


def join_tables(labels: Sequence[str], tables: Sequence[PageTable]) -> list[PageTable]:
    """Tables of several adapters as one table, whose first column names the adapter; empty tables are left out.

    Side by side the tables of three adapters would be cut on a page of 1280 pixels. Tables whose headings differ, as
    those of files in two dialects do, are not joined. Each of them then has the name of its adapter in its title.
    """
    filled = [(label, part) for label, part in zip(labels, tables, strict=True) if part.table.rows]
    if len(labels) < 2 or not filled:
        return [part for _, part in filled]
    first = filled[0][1]
    if len({tuple(column.title for column in part.table.shown) for _, part in filled}) > 1:
        return [
            replace(part, table=replace(part.table, title=f"{part.table.title}: {label}")) for label, part in filled
        ]
    columns: list[Column[Any]] = [Column("adapter", lambda row: row[0], "adapter", align="left")]
    columns += [column.of(lambda row: row[1]) for column in first.table.columns]
    rows = [(label, row) for label, part in filled for row in part.table.rows]
    modules = [numbers for _, part in filled for _, numbers in part.lines]
    folded = any(part.folded for _, part in filled)
    return [PageTable(replace(first.table, columns=columns, rows=rows), modules, folded=folded)]
