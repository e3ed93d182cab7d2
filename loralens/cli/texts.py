"""Texts to run a model on: .jsonl, .txt, .csv and .tsv files."""

import csv
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from loralens.errors import FormatError, OptionError, place

SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv")
_UTF8 = "save the file as UTF-8"


class Text(NamedTuple):
    """One text, and its label where the file has one."""

    text: str
    label: str | int | None = None


def read_texts(path: Path, *, limit: int | None = None) -> list[Text]:
    """The texts of a file, in its order, the first ``limit`` of them.

    ``.jsonl``: an object a line with ``text`` and maybe ``label``; ``.csv`` and ``.tsv``: the same as named columns;
    ``.txt``: one text a line, blank lines left out. UTF-8.

    Raises
    ------
    OptionError
        No such file, or one of another suffix.
    FormatError
        A line without a text, a file without any, or one that is not UTF-8.
    """
    if path.suffix not in SUFFIXES:
        raise OptionError(f"{path}: texts are read from {', '.join(SUFFIXES)} files", fix="give one of these")
    if not path.is_file():
        raise OptionError(f"{path}: no such file", fix="check the path")
    with place(path):
        texts = list(islice(_reader(path), limit))
        if not texts:
            raise FormatError("holds no texts", fix="give a file with at least one")
    return texts


def _reader(path: Path) -> Iterator[Text]:
    if path.suffix == ".txt":
        return (Text(line.strip()) for _, line in _lines(path) if line.strip())
    return _json_lines(path) if path.suffix.startswith(".json") else _table(path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1; a line feed alone ends them, as JSON may hold other separators."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                with place(f"line {number}"):
                    yield number, _decoded(line)
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", fix="check the path and its permissions") from error


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"byte {line[error.start]:#04x} is not UTF-8", fix=_UTF8) from error


def _json_lines(path: Path) -> Iterator[Text]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        with place(f"line {number}"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise FormatError(f"is not JSON ({error})", fix='write one object a line: {"text": "…"}') from error
            if not isinstance(record, dict):
                raise FormatError("is no JSON object", fix='write one object a line: {"text": "…"}')
            yield _text(record.get("text"), record.get("label"))


def _table(path: Path) -> Iterator[Text]:
    lines = (line for _, line in _lines(path))
    rows = csv.DictReader(lines, dialect="excel" if path.suffix == ".csv" else "excel-tab")
    if "text" not in (rows.fieldnames or ()):
        found = ", ".join(rows.fieldnames or ()) or "none"
        raise FormatError(f'has no column "text" (it has {found})', fix="name the column in the first line")
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise FormatError(f"line {rows.line_num}: {error}", fix="save the table again") from error
        with place(f"line {rows.line_num}"):
            yield _text(row["text"], row.get("label"))


def _text(text: object, label: object) -> Text:
    if not isinstance(text, str) or not text.strip():
        what = 'has no "text"' if text is None else '"text" is empty' if isinstance(text, str) else '"text" is no text'
        raise FormatError(what, fix="give every line a text, or take it out")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise FormatError('"text" has half a surrogate pair, which is no letter', fix="write the text again, as UTF-8")
    if isinstance(label, bool) or not (label is None or isinstance(label, str | int)):
        raise FormatError(f'"label" is {label!r}', fix="write labels as names or whole numbers")
    return Text(text, label)
