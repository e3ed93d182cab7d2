"""A SELECT of the user on the catalogue, which can neither write nor run without end."""

import os
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralens.errors import OptionError
from loralens.fleet.catalogue.schema import is_interrupted, open_to_read
from loralens.tables.numbers import count
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table

LONGEST_VALUE = 1 << 24  # bytes of one value, so that one function cannot fill the memory
MOST_BYTES = 1 << 28  # bytes of the whole answer
ROW_BYTES = 64  # bytes that a value takes besides its content
# What a SELECT does. Nothing else is allowed: no ATTACH, no PRAGMA, no writing.
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_FIX = (
    "give one SELECT on the tables adapters, unreadable, files and signatures, such as "
    '"SELECT name, rank FROM adapters"; "SELECT * FROM adapters LIMIT 1" shows the columns'
)

Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class RowsResult(Tabular):
    """The answer to a SELECT: names of columns, and rows; the result is a sequence of the rows."""

    columns: Sequence[str]
    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def conclusion(self) -> list[str]:
        """How many rows there are."""
        return [f"{count(len(self.rows), 'row')}."]

    def tables(self) -> list[Table[Row]]:
        """The rows."""
        return [Table("catalogue", [_column(i, name, self.rows) for i, name in enumerate(self.columns)], self.rows)]

    def record(self) -> dict[str, Any]:
        """The whole result as a JSON object."""
        return {"columns": list(self.columns), "rows": self.tables()[0].records()}


def _column(index: int, name: str, rows: Sequence[Row]) -> Column[Row]:
    def value(row: Row) -> Any:
        return row[index]

    # The first columns of a SELECT are those that its author wants most. Texts are shortened before one is left out.
    priority = max(ALWAYS - index, 0)
    is_text = any(isinstance(row[index], str) for row in rows)
    return Column(name, value, name, align="left" if is_text else "right", priority=priority, distinct=index == 0)


def select_rows(home: Path, sql: str) -> RowsResult:
    """Run one SELECT on the catalogue.

    Raises
    ------
    OptionError
        It is not one valid SELECT, or takes too long, or its answer is too large.
    """
    with open_to_read(home) as connection:
        connection.set_authorizer(_authorise)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
        # Names of files that are not text are bytes in the catalogue; so may be the results of functions.
        connection.text_factory = os.fsdecode
        try:
            cursor = connection.execute(sql)
            # There was nothing, or nothing but blanks and comments.
            if cursor.description is None:
                raise OptionError("the SELECT is empty", fix=_FIX)
            names = [description[0] for description in cursor.description]
            rows = _fetch(cursor)
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            if is_interrupted(error):
                raise
            raise _refusal(error) from error
    return RowsResult(_different(names), rows)


def _fetch(cursor: sqlite3.Cursor) -> list[Row]:
    rows: list[Row] = []
    total = 0
    for row in cursor:
        rows.append(tuple(os.fsdecode(value) if isinstance(value, bytes) else value for value in row))
        total += sum(ROW_BYTES + (len(value) if isinstance(value, str) else 0) for value in rows[-1])
        if total > MOST_BYTES:
            raise OptionError("the answer is larger than 256 MiB", fix="select fewer columns, or add a LIMIT")
    return rows


def _authorise(action: int, first: str | None, second: str | None, *_: object) -> int:
    del first
    forbidden = action not in _ALLOWED or (action == sqlite3.SQLITE_FUNCTION and second == "load_extension")
    return sqlite3.SQLITE_DENY if forbidden else sqlite3.SQLITE_OK


def _refusal(error: Exception) -> OptionError:
    if "not authorized" in str(error) or "prohibited" in str(error):
        return OptionError("the catalogue is only read here", fix=_FIX)
    return OptionError(f"the catalogue cannot answer that: {error}", fix=_FIX)


def _different(names: Sequence[str]) -> list[str]:
    """Names of columns that differ, since JSON and data frames need that."""
    uses: Counter[str] = Counter()
    different = []
    for name in names:
        uses[name] += 1
        different.append(f"{name}_{uses[name]}" if uses[name] > 1 else name or "column")
    return different
