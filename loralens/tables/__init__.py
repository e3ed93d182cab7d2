"""Tables: columns that are declared once, and rendered for a terminal, CSV, JSON, HTML, LaTeX or pandas."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.tables.result import Tabular
    from loralens.tables.table import Column, Table
    from loralens.tables.text import lay_out

__all__ = [
    "Column",
    "Table",
    "Tabular",
    "lay_out",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Column": "table",
        "Table": "table",
        "Tabular": "result",
        "lay_out": "text",
    },
)
