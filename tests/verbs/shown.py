"""What a result shows, held against what it says to machines: for tests of every verb."""

import csv
import json
import re
from functools import partial
from io import StringIO
from typing import Any

import loralens
from loralens.tables import Tabular, lay_out
from loralens.tables.text import display_width

WIDTHS = (60, 80, 140)


def record_of(result: Any) -> dict[str, Any]:
    """The JSON of a result, as the command prints it."""
    return dict(json.loads(json.dumps({"loralens": loralens.__version__, **result.record()})))


def rows_of(result: Tabular) -> list[dict[str, str]]:
    """The CSV of a result, read again."""
    return list(csv.DictReader(StringIO(result.to_csv())))


def check_tables_fit(result: Tabular, *, widths: tuple[int, ...] = WIDTHS) -> None:
    """Every table fits, no cell but names is cut, and what is left out is named."""
    for table in result.tables():
        table, _ = table.brief()
        if not table.rows:
            continue
        for width in widths:
            layout = lay_out(table, width)
            assert max(map(display_width, [layout.heading, *layout.lines])) <= width, (width, layout.heading)
            for row, line in zip(table.rows, layout.lines, strict=True):
                numbers = {column.cell(row) for column in table.shown if column.align == "right"}
                names = [column.cell(row) for column in table.shown if column.align == "left"]
                for cell in re.split(r" {2,}", line.strip()):
                    assert cell in numbers or any(map(partial(_is_short_for, cell), names)), (width, cell)
            hidden = [column.title for column in table.shown if column.title.strip() not in layout.heading]
            assert all(title in layout.note for title in hidden)


def _is_short_for(cell: str, name: str) -> bool:
    """Whether a cell is a name, or what stands of it in this order where parts are left out."""
    return re.fullmatch(".*".join(map(re.escape, cell.split("…"))), name, re.DOTALL) is not None
