"""Tables: columns that are declared once, and rendered for a terminal, CSV, JSON, HTML, LaTeX or pandas."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.tables.numbers import percent as percent
    from loralens.tables.numbers import signed as signed
    from loralens.tables.numbers import size as size
    from loralens.tables.result import Tabular as Tabular
    from loralens.tables.table import Column as Column
    from loralens.tables.table import Table as Table
    from loralens.tables.text import lay_out as lay_out
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
