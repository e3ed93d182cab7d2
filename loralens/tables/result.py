"""The mixin of all results: renders their tables as CSV, data frame, LaTeX and HTML."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loralens.tables.table import Table

if TYPE_CHECKING:
    from pandas import DataFrame


# `tables.render` is imported in the methods that use it: it needs csv and html, which take 2 ms to import, and most
# commands print a table or JSON.


class Tabular:
    """A result that says its tables, and so can be shown in a notebook, a paper, a spreadsheet or a data frame.

    A result defines `tables`, the main one first; `listing`, where the rows for machines are in other tables than those
    for people; and ``record``, everything as a JSON object.
    """

    __slots__ = ()

    def tables(self) -> Sequence[Table[Any]]:
        """The tables for people, the main one first; those without rows are not shown."""
        return ()

    def listing(self) -> Sequence[Table[Any]]:
        """The tables whose rows stand in ``--csv`` and in a data frame, all of the same columns."""
        return self.tables()[:1]

    def sentences(self) -> Sequence[str]:
        """What is said below the tables."""
        return ()

    def to_csv(self) -> str:
        """The listing as CSV."""
        from loralens.tables import render

        return render.csv_text(*self.listing())

    def to_frame(self) -> "DataFrame":
        """The listing as a data frame of pandas, which has to be installed."""
        from loralens.tables import render

        return render.frame(*self.listing())

    def to_latex(self) -> str:
        """The tables as ``tabular`` environments of LaTeX; of a result that speaks in sentences its listing."""
        from loralens.tables import render

        return "\n".join(render.latex(table) for table in self.tables() or self.listing() if table.rows)

    def _repr_html_(self) -> str:
        from loralens.tables import render

        return "".join(render.html_table(table) for table in self.tables() or self.listing() if table.rows)
