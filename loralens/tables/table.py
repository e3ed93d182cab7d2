"""Columns and tables: one declaration serves people and machines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar, cast

from loralens.tables.numbers import as_text

Row = TypeVar("Row")
Outer = TypeVar("Outer")
# Any number above the priorities in use would do: lay_out only compares with it.
ALWAYS = 9  # the priority of columns that are never left out


@dataclass(frozen=True, slots=True)
class Column(Generic[Row]):
    """One quantity of every row.

    Attributes
    ----------
    key : str or tuple of str
        Its name in JSON, in CSV and in data frames. A tuple is a path into nested JSON objects; its parts are joined by
        underscores elsewhere.
    value : callable
        Row → what machines get: text, a number, a list, or None where the quantity is not defined.
    title : str
        Its heading for people. A column without one is for machines only.
    text : callable
        Value → what people read.
    align : str
        On which side of the column its cells stand. Only cells on the left are shortened, in their middle.
    priority : int
        Where a terminal is too narrow, columns of the lowest priority are left out first; `ALWAYS` never.
    json, csv : bool
        Whether JSON, and CSV and data frames, have the column.
    about : str
        What it is, where the heading does not say it: shown beside the heading on pages and in notebooks.
    bar : bool
        Its values are shares, in [0, 1], which pages show as bars too.
    """

    key: str | tuple[str, ...]
    value: Callable[[Row], Any]
    title: str = ""
    text: Callable[[Any], str] = as_text
    align: Literal["left", "right"] = "right"
    priority: int = 1
    json: bool = True
    csv: bool = True
    about: str = ""
    bar: bool = False

    @property
    def name(self) -> str:
        """Its name in CSV and in data frames."""
        return self.key if isinstance(self.key, str) else "_".join(self.key)

    def cell(self, row: Row) -> str:
        """What people read of a row."""
        return self.text(self.value(row))

    def of(self, inner: Callable[[Outer], Row | None]) -> "Column[Outer]":
        """The same column of rows that lead to a row of these; not defined where one leads to none."""

        def value(outer: Outer) -> Any:
            row = inner(outer)
            return None if row is None else self.value(row)

        return replace(cast("Column[Any]", self), value=value)


@dataclass(frozen=True, slots=True)
class Table(Generic[Row]):
    """Rows under columns, with a line above them that says what they are."""

    title: str
    columns: Sequence[Column[Row]]
    rows: Sequence[Row]

    @property
    def shown(self) -> list[Column[Row]]:
        """The columns for people."""
        return [column for column in self.columns if column.title]

    def record(self, row: Row) -> dict[str, Any]:
        """One row as a JSON object."""
        record: dict[str, Any] = {}
        for column in (column for column in self.columns if column.json):
            *outer, last = (column.key,) if isinstance(column.key, str) else column.key
            place = record
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = column.value(row)
        return record

    def records(self) -> list[dict[str, Any]]:
        """All rows as JSON objects."""
        return [self.record(row) for row in self.rows]
