"""The mixin of all results: renders their tables as CSV, data frame, LaTeX and HTML."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loralens.tables.table import Table

if TYPE_CHECKING:
    from pandas import DataFrame


# `tables.render` is imported in the methods that use it: it needs csv and html, which take 2 ms to import, and most
# commands print a table or JSON.


class Tabular:
    """The base class of results, which renders their tables for notebooks, papers, spreadsheets and data frames.

    A result overrides `tables`. It overrides `listing` if the rows for machines are in other tables than those for
    people, `conclusion` for what is printed first, and `sentences` if something is printed below the tables. Its method
    ``record`` returns everything that it holds as a JSON object.
    """

    # Results are frozen dataclasses with slots; a base class without slots would give them a __dict__ again.
    __slots__ = ()

    def tables(self) -> Sequence[Table[Any]]:
        """Return the tables for people, the main one first. Tables without rows are not shown."""
        return ()

    def listing(self) -> Sequence[Table[Any]]:
        """Return the tables whose rows ``--csv`` and data frames contain. All of them have the same columns."""
        return self.tables()[:1]

    def conclusion(self) -> Sequence[str]:
        """Return one or two sentences that answer the question of the command; they are printed before everything."""
        return ()

    def sentences(self) -> Sequence[str]:
        """Return the sentences that are printed below the tables."""
        return ()

    def to_csv(self) -> str:
        """Return the listing as CSV."""
        from loralens.tables import render

        return render.csv_text(*self.listing())

    def to_frame(self) -> "DataFrame":
        """Return the listing as a data frame of pandas, which has to be installed."""
        from loralens.tables import render

        return render.frame(*self.listing())

    def to_latex(self) -> str:
        """Return the tables as ``tabular`` environments of LaTeX; without tables for people, its listing.

        Every one stands below a comment with its title. None needs a package, also under pdflatex.
        """
        from loralens.tables.latex import latex

        return "\n".join(map(latex, self._tables_for_documents()))

    def _repr_html_(self) -> str:
        from loralens.tables import render

        # The conclusion says what the tables then leave out.
        said = "".join(render.html_sentence(sentence) for sentence in self.conclusion())
        return said + "".join(map(render.html_table, self._tables_for_documents()))

    def _tables_for_documents(self) -> list[Table[Any]]:
        """The tables for people; without any, those for machines, whose columns then get headings."""
        tables = self.tables() or [table.with_headings() for table in self.listing()]
        return [table for table in tables if table.rows]
