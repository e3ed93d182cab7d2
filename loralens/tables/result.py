"""The mixin of all results: renders their tables as CSV, data frame, LaTeX and HTML."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from os import PathLike
from pathlib import Path
from stat import S_IMODE
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

from loralens.errors import FormatError, target_exists, visible
from loralens.tables.table import Keys, Recorded, Table

if TYPE_CHECKING:
    from pandas import DataFrame

Item = TypeVar("Item")


# `tables.render` is imported in the methods that use it: it needs csv and html, which take 2 ms to import, and most
# commands print a table or JSON.


class Tabular(Recorded):
    """The base class of results, which renders their tables for notebooks, papers, spreadsheets and data frames.

    A result overrides `tables`, and `json_keys`, the keys of its JSON object. It overrides `listing` if the rows for
    machines are in other tables than those for people, `conclusion` for what is printed first, and `sentences` if
    something is printed below the tables. `ResultSequence` and `ResultMapping` are also what they hold.
    """

    # Results are frozen dataclasses with slots; a base class without slots would give them a __dict__ again.
    __slots__ = ()
    conclusion_leads: ClassVar[bool] = False  # whether a terminal shows it first, too

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

    def __repr__(self) -> str:
        return visible(f"{type(self).__name__}({' '.join(self.conclusion())})")

    def __str__(self) -> str:
        """What the command prints where there is no terminal."""
        from loralens.tables.text import lay_out

        parts = ["\n".join(map(visible, self.conclusion()))]
        for table in self.tables():
            shown, left_out = table.brief()
            parts.append("\n".join(filter(None, [str(lay_out(shown)).strip("\n") if shown.rows else "", left_out])))
        parts.append("\n".join(map(visible, self.sentences())))
        return "\n\n".join(filter(None, parts)) or repr(self)

    def to_csv(self, path: str | PathLike[str] | None = None, *, overwrite: bool = False) -> Any:
        """Return the listing as CSV, or write it to ``path``; with ``overwrite``, in place of a file that is there."""
        from loralens.tables import render

        return _returned_or_written(render.csv_text(*self.listing()), path, overwrite=overwrite)

    def to_frame(self) -> "DataFrame":
        """Return the listing as a data frame of pandas, which has to be installed."""
        from loralens.tables import render

        return render.frame(*self.listing())

    def to_latex(self, path: str | PathLike[str] | None = None, *, overwrite: bool = False) -> Any:
        """Return the tables as ``tabular`` environments of LaTeX, or write them to ``path``, as `to_csv` does.

        Every table stands below a comment with its title. No table needs a LaTeX package, also under pdflatex. If the
        result has no tables for people, the listing is returned.
        """
        from loralens.tables.render import latex

        return _returned_or_written("\n".join(map(latex, self._tables_for_documents())), path, overwrite=overwrite)

    def _repr_html_(self) -> str:
        from loralens.tables import render

        # The conclusion comes first, and the tables do not repeat what it says.
        conclusion = "".join(render.html_sentence(sentence) for sentence in self.conclusion())
        return conclusion + "".join(map(render.html_table, self._tables_for_documents()))

    def _tables_for_documents(self) -> list[Table[Any]]:
        """The tables for people; without any, those for machines, whose columns then get headings."""

        def headed(table: Table[Any]) -> Table[Any]:
            columns = [replace(column, title=column.title or column.name) for column in table.columns]
            return replace(table, columns=columns)

        return [table for table in self.tables() or map(headed, self.listing()) if table.rows]


class ResultOfSeveral(Tabular):
    """A result about several adapters: all that one has to show, and then the next."""

    __slots__ = ()

    adapters: Sequence[Tabular]

    @classmethod
    def json_keys(cls) -> Keys:
        """Return the only key, that of the adapters."""
        return ("adapters",)

    def tables(self) -> Sequence[Table[Any]]:
        """Return the tables of all adapters, one adapter after the other."""
        return [table for adapter in self.adapters for table in adapter.tables()]

    def listing(self) -> Sequence[Table[Any]]:
        """Return the modules of all adapters."""
        return [table for adapter in self.adapters for table in adapter.listing()]

    def conclusion(self) -> Sequence[str]:
        """Return the conclusions about all adapters."""
        return [sentence for adapter in self.adapters for sentence in adapter.conclusion()]

    def sentences(self) -> Sequence[str]:
        """Return the sentences about all adapters."""
        return [sentence for adapter in self.adapters for sentence in adapter.sentences()]


class ResultSequence(Tabular, Generic[Item]):
    """A result that has the length and the items of what stands at the path ``contents``."""

    __slots__ = ()

    contents: ClassVar[str]

    def __len__(self) -> int:
        return len(attrgetter(self.contents)(self))

    def __iter__(self) -> Iterator[Any]:
        return iter(attrgetter(self.contents)(self))

    def __getitem__(self, key: Any) -> Item:
        return cast("Item", attrgetter(self.contents)(self)[key])


class ResultMapping(ResultSequence[Item], Mapping[str, Item]):
    """A result that is also the mapping at the path ``contents``, from the names of modules."""

    __slots__ = ()

    contents: ClassVar[str] = "modules"


def _returned_or_written(text: str, path: str | PathLike[str] | None, *, overwrite: bool) -> str | None:
    if path is None:
        return text
    # As the files that commands write, which are on floors above this one: complete or not at all.
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if os.path.lexists(path) and not overwrite:
            raise target_exists(path)
        # On Windows too the lines of both formats end in \n.
        part.write_text(text, encoding="utf-8", newline="\n")
        if path.is_file():
            part.chmod(S_IMODE(path.stat().st_mode))
        part.replace(path)
    except OSError as error:
        fix = "check free space and permissions, or choose another place"
        raise FormatError(f"{path}: cannot be written: {error.strerror}", fix=fix) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return None
