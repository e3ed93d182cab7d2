"""Texts on which a model is run: .jsonl, .txt, .csv and .tsv files, or lists."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from loralens.errors import FormatError, OptionError, place

SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv")
# The fixes of several messages.
_UTF8 = "save the file as UTF-8"
_QUOTES = "put texts with commas, tabs or line ends into quotes, and double the quotes in them"
_LONGEST = 2**31 - 1  # letters of a cell: all that the parser can count everywhere, for its own 131,072


class InputText(NamedTuple):
    """One text, its label where the file has one, and the number of the line it ends on, from 1."""

    text: str
    label: str | int | None = None
    line: int | None = None


# A file; or texts, (text, label) pairs, or {"text": …, "label": …} mappings.
TextSource = str | PathLike[str] | Iterable[str | tuple[str, str | int | None] | Mapping[str, Any] | InputText]


def text_label(source: TextSource) -> str:
    """What texts are called in messages: by the path of their file."""
    return str(source) if isinstance(source, str | PathLike) else "texts"


def read_texts(source: TextSource, *, limit: int | None = None, labelled: bool = False) -> list[InputText]:
    """The texts of a file or of a list, in its order, the first ``limit`` of them.

    ``.jsonl``: an object a line with ``text`` and maybe ``label``; ``.csv`` and ``.tsv``: the same as named columns;
    ``.txt``: one text a line, blank lines left out. UTF-8.

    Parameters
    ----------
    source : path or iterable
        A file; or texts, (text, label) pairs, or mappings with ``text`` and maybe ``label``.
    limit : int, optional
    labelled : bool
        Whether every text must have a label, a name or a whole number.

    Raises
    ------
    OptionError
        No such file, or one of another suffix; a ``.txt`` where labels are needed.
    FormatError
        A line without a text, or without a label that is needed; a file without any text, or one that is not UTF-8.
    """
    if isinstance(source, str | PathLike):
        reader = _read_file(_check_text_file(Path(source), labelled), labelled)
    else:
        reader = _read_list(source, labelled)
    with place(text_label(source)), _long_cells():
        texts = list(islice(reader, limit))
        if not texts:
            raise FormatError("holds no texts", fix="give a file with at least one")
    return texts


def _check_text_file(path: Path, labelled: bool) -> Path:
    """The path, of a file that can be read as texts."""
    if path.suffix not in SUFFIXES:
        raise OptionError(f"{path}: texts are read from {', '.join(SUFFIXES)} files", fix="give one of these")
    if labelled and path.suffix == ".txt":
        raise OptionError(
            f"{path}: a .txt file has no labels", fix='give a .jsonl or .csv file with "text" and "label"'
        )
    if not path.is_file():
        raise OptionError(f"{path}: no such file", fix="check the path")
    return path


def _read_list(items: Iterable[Any], labelled: bool) -> Iterator[InputText]:
    """The texts of a list, with their numbers in place of lines."""
    for number, item in enumerate(items, start=1):
        with place(f"text {number}"):
            if isinstance(item, Mapping):
                record = item
            elif isinstance(item, tuple | list) and len(item) in (2, 3):
                record = {"text": item[0], "label": item[1]}
            else:
                record = {"text": item}
            yield _check_record(record, number, labelled)


def _read_file(path: Path, labelled: bool) -> Iterator[InputText]:
    if path.suffix == ".txt":
        return (InputText(line.strip(), None, number) for number, line in _read_lines(path) if line.strip())
    return _read_json_lines(path, labelled) if path.suffix.startswith(".json") else _read_table(path, labelled)


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1; a line feed alone ends them, as JSON may hold other separators."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                with place(f"line {number}"):
                    try:
                        yield number, line.decode("utf-8-sig")
                    except UnicodeDecodeError as error:
                        raise FormatError(f"byte {line[error.start]:#04x} is not UTF-8", fix=_UTF8) from error
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", fix="check the path and its permissions") from error


def _read_json_lines(path: Path, labelled: bool) -> Iterator[InputText]:
    for number, line in _read_lines(path):
        if not line.strip():
            continue
        with place(f"line {number}"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise FormatError(f"is not JSON ({error})", fix='write one object a line: {"text": "…"}') from error
            if not isinstance(record, dict):
                raise FormatError("is no JSON object", fix='write one object a line: {"text": "…"}')
            yield _check_record(record, number, labelled)


@contextmanager
def _long_cells() -> Iterator[None]:
    """Tables with cells of any length, inside the block."""
    before = csv.field_size_limit(_LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


class _Rows:
    """The rows of a table as lists of cells, with the number of the line that each begins on; empty ones left out.

    A line ends with a line feed, a carriage return, or both.
    """

    def __init__(self, path: Path) -> None:
        self._ended = False
        self._rows = csv.reader(self._lines(path), dialect="excel" if path.suffix == ".csv" else "excel-tab")
        self.line = 0  # of the last row, the one it ends on

    def _lines(self, path: Path) -> Iterator[str]:
        for _, line in _read_lines(path):
            yield from re.split(r"(?<=\r)(?!\n|$)", line)
        self._ended = True

    def __iter__(self) -> Iterator[list[str]]:
        while True:
            begun = self._rows.line_num + 1
            try:
                row = next(self._rows, None)
            except csv.Error as error:
                raise FormatError(f"line {self._rows.line_num}: {error}", fix="save the table again") from error
            if row is None:
                return
            if self._ended:  # the parser asked for more lines to end this row
                raise FormatError(f"line {begun}: a quote is opened and never closed", fix=_QUOTES)
            self.line = self._rows.line_num
            if row:
                yield row


def _read_table(path: Path, labelled: bool) -> Iterator[InputText]:
    rows = _Rows(path)
    columns = next(iter(rows), [])
    for column in ("text", "label")[: 1 + labelled]:
        if column not in columns:
            fix = f'call the column "{column}" in the first line'
            raise FormatError(f'has no column "{column}" (it has {", ".join(columns) or "none"})', fix=fix)
        if columns.count(column) > 1:
            raise FormatError(f'has {columns.count(column)} columns "{column}"', fix="give one of them another name")
    for cells in rows:
        with place(f"line {rows.line}"):
            if len(cells) > len(columns):
                raise FormatError("has more cells than columns", fix="put texts with commas or tabs into quotes")
            row: dict[str, Any] = dict(zip(columns, cells, strict=False))
            row["label"] = row.get("label") or None  # an empty cell
            yield _check_record(row, rows.line, labelled)


def _check_record(record: Mapping[Any, Any], line: int, labelled: bool) -> InputText:
    """One record, checked; its keys are named where one is missing, as another may hold what is meant."""
    text, label = record.get("text"), record.get("label")
    if text is None:
        raise FormatError(f'has no "text"{_describe_keys(record)}', fix="give every line a text, or take it out")
    if not isinstance(text, str) or not text.strip():
        what = "is empty" if isinstance(text, str) else "is no text"
        raise FormatError(f'"text" {what}', fix="give every line a text, or take it out")
    # JSON can escape half of a surrogate pair, which no tokenizer takes.
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise FormatError('"text" has half a surrogate pair, which is no letter', fix="write the text again, as UTF-8")
    if isinstance(label, bool) or not (label is None or isinstance(label, str | int)):
        raise FormatError(f'"label" is {label!r}', fix="write labels as names or whole numbers")
    if labelled and label is None:
        raise FormatError(f'has no "label"{_describe_keys(record)}', fix="give every line a label, or take it out")
    if labelled and not str(label).strip():
        raise FormatError('"label" is empty', fix="give every line a label, or take it out")
    return InputText(text, label, line)


def _describe_keys(record: Mapping[Any, Any]) -> str:
    """What a record holds instead, in brackets."""
    keys = [str(key) for key, value in record.items() if value is not None]
    return f" (it has {', '.join(keys[:8])}{' …' if len(keys) > 8 else ''})" if keys else ""
