"""Columns and tables: one declaration serves people and machines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial, reduce
from math import inf
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast

from loralens.tables.numbers import as_text, count, json_number, shape

Row = TypeVar("Row")
Outer = TypeVar("Outer")
# The priority of columns that are never left out. Columns in use have the priorities 0 to 8, and
# `lay_out` only compares with this number.
ALWAYS = 9


def follow(path: str) -> Callable[[Any], Any]:
    """Return a function that follows a path: ``module.shape.0``, ``phi.in`` of a dict, ``names.len``, ``listing.0``."""
    steps = path.split(".")
    return lambda row: reduce(_step, steps, row)


def _step(value: Any, name: str) -> Any:
    if value is None:
        return None
    if name == "len":
        return len(value)
    if name.isdigit():
        return value[int(name)]
    found = value.get(name) if isinstance(value, dict) else getattr(value, name)
    return found() if callable(found) else found


def plain(value: Any) -> Any:
    """Return a value as JSON has it: lists for tuples and arrays, objects for parts of results, text for the rest."""
    if value is None or value is ... or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return json_number(value)
    if hasattr(value, "record"):
        return value.record()
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return list(map(plain, value))
    # Arrays and numbers of NumPy.
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)


@dataclass(frozen=True, slots=True)
class Column(Generic[Row]):
    """One quantity of every row.

    Attributes
    ----------
    key : str or tuple of str
        The name of the column in JSON, CSV and data frames. A tuple is a path into nested JSON objects; CSV and data
        frames join its parts by underscores.
    source : callable or str
        Row → the quantity, or None where it is not defined. A text is a path of attributes, keys of dicts, indices and
        ``len``, such as ``module.shape.0``; its value is None where a part of the path is. By default it is the key.
    title : str
        The heading for people. A column without a heading is for machines only.
    text : callable
        Value → the text for people.
    align : str
        The side on which cells are aligned. Only texts that are aligned on the left are ever shortened.
    priority : int
        If a terminal is too narrow, columns of the lowest priority are left out first, and those of `ALWAYS` never.
    json, csv : bool
        Whether JSON contains the column, and whether CSV and data frames do.
    about : str
        An explanation of the heading, which pages and notebooks show when the pointer rests on it.
    bar : bool
        Whether pages draw the values, which are shares in [0, 1], as bars.
    distinct : bool
        Whether different texts stay different where they are shortened: other columns are left out before.
    sentence : bool
        Whether the text is a sentence, which is shortened at its end; a name is shortened in its middle.
    type : type, mapping or Rows, optional
        The type of the value in JSON, for its schema; by default that of the attributes, or what ``text`` takes.
    may_lack : bool
        Whether the key is missing in some JSON objects. A value of ``...`` leaves it out.
    shortest : int
        The width below which the text is not shortened, in columns of a terminal; 0 for that of `lay_out`.
    drawn : bool
        Whether the text is a drawing made of characters. LaTeX has no font for these, so the column is left out there.
    matters : str
        Which values of the column make a row matter: where a screen has no room for all rows, those are shown. At most
        one column of a table says so; without one, the first rows are shown. A column without a heading explains its
        order in ``about``.
    """

    key: str | tuple[str, ...]
    source: Callable[[Row], Any] | str = ""
    title: str = ""
    text: Callable[[Any], str] = as_text
    align: Literal["left", "right"] = "right"
    priority: int = 1
    json: bool = True
    csv: bool = True
    about: str = ""
    bar: bool = False
    distinct: bool = False
    sentence: bool = False
    shortest: int = 0
    drawn: bool = False
    matters: Literal["", "largest", "smallest", "strongest"] = ""
    type: Any = None
    may_lack: bool = False
    value: Callable[[Row], Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        source = self.source or self.name
        get = follow(source) if isinstance(source, str) else source
        if self.json or self.csv:
            as_json = self.type.records if isinstance(self.type, Rows) else plain
            object.__setattr__(self, "value", lambda row: as_json(get(row)))
        else:  # people see what JSON does not have, such as ∞
            object.__setattr__(self, "value", get)

    @property
    def name(self) -> str:
        """The name of the column in CSV and in data frames."""
        return self.key if isinstance(self.key, str) else "_".join(self.key)

    def cell(self, row: Row) -> str:
        """Return the text of one row for people."""
        return self.text(self.value(row))

    def of(self, inner: Callable[[Outer], Row | None]) -> "Column[Outer]":
        """Return this column for outer rows, in each of which ``inner`` finds a row of this one, or None."""

        def value(outer: Outer) -> Any:
            row = inner(outer)
            return None if row is None else self.value(row)

        # The cast is needed because `replace` keeps the type of the rows, and this type changes here.
        return replace(cast("Column[Any]", self), source=value)


# The columns of one kind of row.
Columns = Sequence[Column[Row]]


def label_column(key: str, title: str, source: Callable[[Row], str] | str = "", **options: Any) -> Column[Row]:
    """A column of texts that say what a row is; it is never left out."""
    return Column(key, source, title, align="left", priority=ALWAYS, **options)


def shape_columns(path: str, title: str = "", priority: int = 3) -> Columns[Any]:
    """The shape at a path: a list in JSON, two columns in CSV, and for people one, if it has a title."""
    return (
        Column("shape", path, title, shape, csv=False, priority=priority, type=list[int]),
        Column("out", f"{path}.0", json=False),
        Column("in", f"{path}.1", json=False),
    )


@dataclass(frozen=True, slots=True)
class Table(Generic[Row]):
    """Rows under columns, with a title that says what they are.

    Attributes
    ----------
    uneventful : callable, optional
        Row → whether it has nothing notable. A terminal shows one sentence for all such rows; machines get every row.
    sum_up : callable
        The number of such rows → that sentence, without a full stop.
    whole : bool
        Whether all rows belong together, as those of a matrix do, so that no number of rows limits them.
    """

    title: str
    columns: Sequence[Column[Row]]
    rows: Sequence[Row]
    uneventful: Callable[[Row], bool] | None = None
    sum_up: Callable[[int], str] = "{:,} rows with nothing notable".format
    whole: bool = False

    @property
    def shown(self) -> list[Column[Row]]:
        """The columns for people, which are those that have a heading."""
        return [column for column in self.columns if column.title]

    def brief(self, top: int | None = None, *, foremost: bool = False) -> tuple["Table[Row]", str]:
        """Return the table without uneventful rows, with at most ``top`` rows, and a sentence about those left out.

        These are the first rows, or with ``foremost`` those that matter most. The sentence is empty if no row was left
        out.
        """
        eventful = [row for row in self.rows if self.uneventful is None or not self.uneventful(row)]
        shown = eventful if self.whole else eventful[:top]
        sentences = []
        if len(shown) < len(eventful):
            sentences.append(f"… {count(len(eventful) - len(shown), 'more row')}")
            column = next((column for column in self.columns if column.matters), None)
            if foremost and column:
                rank = partial(_importance, column)
                shown = sorted(eventful, key=rank, reverse=True)[:top]
                why = f"these have the {column.matters} {column.title}" if column.title else column.about
                sentences[0] += f" ({why})"
        if len(eventful) < len(self.rows):
            sentences.append(self.sum_up(len(self.rows) - len(eventful)))
        # An empty text means that the conclusion says it already.
        return replace(self, rows=shown), "; ".join(filter(None, sentences))

    def recorder(self) -> Callable[[Row], dict[str, Any]]:
        """Return the function that makes a JSON object of a row; the columns are looked at once."""
        paths = [((column.key,) if isinstance(column.key, str) else column.key, column) for column in self.columns]
        steps = [(path[:-1], path[-1], column.value) for path, column in paths if column.json]

        def record(row: Row) -> dict[str, Any]:
            result: dict[str, Any] = {}
            for outer, last, value in steps:
                place = result
                for key in outer:
                    place = place.setdefault(key, {})
                if (found := value(row)) is not ...:
                    place[last] = found
            return result

        return record

    def records(self) -> list[dict[str, Any]]:
        """Return all rows as JSON objects."""
        return list(map(self.recorder(), self.rows))


def _importance(column: Column[Row], row: Row) -> float:
    """A number that is larger, the more a row matters by this column; a row without a value matters least."""
    value = column.value(row)
    if not isinstance(value, int | float) or value != value:
        return -inf
    return {"largest": value, "smallest": -value, "strongest": abs(value)}[column.matters or "largest"]


Keys = Sequence[str | Column[Any]]


class Rows(NamedTuple):
    """The type of a list of rows in JSON: the class of a row, or the path to a list of them, and the columns."""

    row: Any
    columns: Keys

    def records(self, rows: Any) -> list[dict[str, Any]]:
        """Return the rows as JSON objects; a table has columns of its own."""
        columns = [column for column in self.columns if not isinstance(column, str)]
        return (rows if isinstance(rows, Table) else Table("", columns, rows)).records()


def rows_key(key: str, columns: Keys, row: Any = None, source: Callable[[Any], Any] | str = "") -> Column[Any]:
    """A key of JSON whose value is a list of rows; ``source`` gives the rows, or a table that has columns of its own.

    ``row`` is the class of a row, as far as the annotation at the path ``source`` does not say it.
    """
    path = source or key
    return Column(key, path, type=Rows(row or (path if isinstance(path, str) else None), columns))


class Recorded:
    """The base of results and their parts: one declaration of their keys gives their JSON object and its schema."""

    __slots__ = ()

    @classmethod
    def json_keys(cls) -> Keys:
        """Return the keys of the JSON object, in order: names of attributes, and columns for everything else.

        The key ``*`` stands for further keys, which `record` adds. By default the keys are the fields.
        """
        return [field.name for field in fields(cast("Any", cls))]

    def record(self) -> dict[str, Any]:
        """Return everything as a JSON object."""
        return _recorder_of(self.json_keys)(self)


@cache
def _recorder_of(json_keys: Callable[[], Keys]) -> Callable[[Any], dict[str, Any]]:
    columns = [Column(key) if isinstance(key, str) else key for key in json_keys() if key != "*"]
    return Table("", columns, ()).recorder()
