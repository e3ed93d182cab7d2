"""Reads the texts on which a model is run: .jsonl, .txt, .csv, .tsv and .parquet files, or lists."""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from loralens.core.json_depth import parse_json
from loralens.errors import FormatError, OptionError, place
from loralens.formats.files.regular import open_stream
from loralens.verbs.inputs.corpus.columns import PARQUET, is_saved, parquet_rows, saved_rows
from loralens.verbs.inputs.corpus.dialogues import Dialogue, dialogue_of

SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv", PARQUET)
_QUOTES = "put texts with commas, tabs or line ends into quotes, and double the quotes in them"
# Characters of a cell. The csv module allows 131,072 by default; this is the most that a C long holds on every system.
_LONGEST = 2**31 - 1


class InputText(NamedTuple):
    """A text, its label if there is one, and the number of the line on which it ends, counted from 1."""

    text: str
    label: str | int | None = None
    line: int | None = None
    dialogue: Dialogue | None = None  # in place of a text


# A file; or texts, (text, label) pairs, or {"text": …, "label": …} mappings.
TextSource = str | PathLike[str] | Iterable[str | tuple[str, str | int | None] | Mapping[str, Any] | InputText]


def text_label(source: TextSource) -> str:
    """The name of the texts in messages: the path of their file, if they are in one."""
    return str(source) if isinstance(source, str | PathLike) else "texts"


def read_texts(
    source: TextSource, *, limit: int | None = None, labelled: bool = False, dialogues: bool = False
) -> list[InputText]:
    """The first ``limit`` texts of a file or of a list, in its order.

    A ``.jsonl`` file has one object per line with ``text`` and optionally ``label``, a ``.csv``, ``.tsv`` or
    ``.parquet`` file and a folder of ``datasets`` have columns of these names, and a ``.txt`` file has one text per
    line, where blank lines are skipped. Files are UTF-8.

    Parameters
    ----------
    source : path or iterable
        A file; or texts, (text, label) pairs, or mappings with ``text`` and optionally ``label``.
    limit : int, optional
    labelled : bool
        Whether every text must have a label, which is a name or a whole number.
    dialogues : bool
        Whether there may be prompts with completions, and messages, in place of texts.

    Raises
    ------
    OptionError
        The file does not exist or has another suffix; labels are needed, and the file is a ``.txt``.
    FormatError
        A line has no text, or not the label that is needed; the file has no texts, or is not UTF-8.
    """
    if isinstance(source, str | PathLike):
        reader = _read_file(_check_text_file(Path(source), labelled), labelled)
    else:
        reader = _read_list(source, labelled)
    with place(text_label(source)), _long_cells():
        # islice reads no further: lines behind the limit may be wrong.
        texts = list(islice(reader, limit))
        if not texts:
            raise FormatError("holds no texts", fix="give a file or a list with at least one text")
        if not dialogues and any(text.dialogue for text in texts):
            fix = "give texts; prompts, completions and messages are learned by train --task causal-lm"
            raise FormatError("holds dialogues, which this use of texts cannot take", fix=fix)
    return texts


def _check_text_file(path: Path, labelled: bool) -> Path:
    """The path itself, after a check that texts can be read from it."""
    if is_saved(path):
        return path
    if path.suffix not in SUFFIXES:
        folder = "; this folder is not one that datasets has saved" if path.is_dir() else ""
        what = f"{path}: texts are read from {', '.join(SUFFIXES)} files{folder}"
        raise OptionError(what, fix="give one of these, or a folder that Dataset.save_to_disk has written")
    if labelled and path.suffix == ".txt":
        raise OptionError(
            f"{path}: a .txt file has no labels", fix='give a .jsonl or .csv file with "text" and "label"'
        )
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "no such file"
        raise OptionError(f"{path}: {what}", fix="check the path")
    return path


def _read_columns(rows: Iterable[Mapping[str, Any]], labelled: bool) -> Iterator[InputText]:
    for number, row in enumerate(rows, start=1):
        with place(f"row {number}"):
            yield _check_record(row, number, labelled)


def _read_list(items: Iterable[Any], labelled: bool) -> Iterator[InputText]:
    """The texts of a list, with their numbers, counted from 1, as line numbers."""
    for number, item in enumerate(items, start=1):
        with place(f"text {number}"):
            if isinstance(item, Mapping):
                record = item
            elif isinstance(item, InputText):
                record = item.dialogue or {"text": item.text, "label": item.label}
            elif isinstance(item, tuple | list) and len(item) in (2, 3):
                record = {"text": item[0], "label": item[1]}
            else:
                record = {"text": item}
            yield _check_record(record, number, labelled)


def _read_file(path: Path, labelled: bool) -> Iterator[InputText]:
    if path.suffix == PARQUET or path.is_dir():
        return _read_columns(saved_rows(path) if path.is_dir() else parquet_rows(path), labelled)
    if path.suffix == ".txt":
        return (InputText(line.strip(), None, number) for number, line in _read_lines(path) if line.strip())
    return _read_json_lines(path, labelled) if path.suffix.startswith(".json") else _read_table(path, labelled)


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines and their numbers, counted from 1."""
    # Bytes are split at line feeds only; text would also be split at separators that JSON strings may contain.
    try:
        with open_stream(path) as file:
            for number, line in enumerate(file, start=1):
                with place(f"line {number}"):
                    try:
                        # utf-8-sig removes the byte order mark with which Excel begins a file.
                        yield number, line.decode("utf-8-sig")
                    except UnicodeDecodeError as error:
                        raise FormatError(
                            f"byte {line[error.start]:#04x} is not UTF-8", fix="save the file as UTF-8"
                        ) from error
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", fix="check the path and its permissions") from error


def _read_json_lines(path: Path, labelled: bool) -> Iterator[InputText]:
    for number, line in _read_lines(path):
        if not line.strip():
            continue
        with place(f"line {number}"):
            try:
                record = parse_json(line)
            except ValueError as error:
                raise FormatError(f"is not JSON ({error})", fix='write one object per line: {"text": "…"}') from error
            if not isinstance(record, dict):
                raise FormatError("is not a JSON object", fix='write one object per line: {"text": "…"}')
            yield _check_record(record, number, labelled)


@contextmanager
def _long_cells() -> Iterator[None]:
    """Within the context, cells of a table may have any length."""
    # The limit is a setting of the whole process, so that it is restored for other code.
    before = csv.field_size_limit(_LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table as lists of cells, each with the number of the line on which it ends; empty rows are skipped.

    A line ends with a line feed, a carriage return, or both.
    """
    ended = False

    def lines() -> Iterator[str]:
        nonlocal ended
        for _, line in _read_lines(path):
            # A carriage return alone ends a line too, but the csv module refuses one inside what it is given.
            yield from re.split(r"(?<=\r)(?!\n|$)", line)
        ended = True

    rows = csv.reader(lines(), dialect="excel" if path.suffix == ".csv" else "excel-tab")
    while True:
        begun = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise FormatError(f"line {rows.line_num}: {error}", fix="save the table again") from error
        if row is None:
            return
        # The parser has asked for more lines to end this row. It would return the rest of the file as one cell.
        if ended:
            raise FormatError(f"line {begun}: a quote is opened and never closed", fix=_QUOTES)
        if row:
            yield rows.line_num, row


def _read_table(path: Path, labelled: bool) -> Iterator[InputText]:
    rows = _read_rows(path)
    _, columns = next(rows, (0, []))
    needed = ("text", "label")[: 1 + labelled]
    if "text" not in columns and {"prompt", "completion"} <= set(columns):
        needed = ("prompt", "completion")
    for column in needed:
        if column not in columns:
            fix = f'call the column "{column}" in the first line'
            raise FormatError(f'has no column "{column}" (it has {", ".join(columns) or "none"})', fix=fix)
        if columns.count(column) > 1:
            raise FormatError(f'has {columns.count(column)} columns "{column}"', fix="give one of them another name")
    for line, cells in rows:
        with place(f"line {line}"):
            if len(cells) > len(columns):
                raise FormatError("has more cells than columns", fix="put texts with commas or tabs into quotes")
            row: dict[str, Any] = dict(zip(columns, cells, strict=False))
            row["label"] = row.get("label") or None  # an empty cell means that there is no label
            yield _check_record(row, line, labelled)


def _check_record(record: Mapping[Any, Any], line: int, labelled: bool) -> InputText:
    """The text of one record; if a key is missing, the message has the other keys, one of which may be meant."""
    dialogue = dialogue_of(record)
    if dialogue is not None and not labelled:
        return InputText("", None, line, dialogue)
    text, label = record.get("text"), record.get("label")
    if text is None:
        raise FormatError(f'has no "text"{_describe_keys(record)}', fix="give every line a text, or remove the line")
    if not isinstance(text, str) or not text.strip():
        what = "is empty" if isinstance(text, str) else "is not a string"
        raise FormatError(f'"text" {what}', fix="give every line a text, or remove the line")
    # JSON can escape half of a surrogate pair, which no tokenizer accepts.
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise FormatError(
            '"text" has half a surrogate pair, which is not a character', fix="write the text again, as UTF-8"
        )
    # bool is a subclass of int, but True is not meant as the label 1.
    if isinstance(label, bool) or not (label is None or isinstance(label, str | int)):
        raise FormatError(f'"label" is {label!r}', fix="write labels as names or whole numbers")
    if labelled and label is None:
        raise FormatError(f'has no "label"{_describe_keys(record)}', fix="give every line a label, or remove the line")
    if labelled and not str(label).strip():
        raise FormatError('"label" is empty', fix="give every line a label, or remove the line")
    return InputText(text, label, line)


def _describe_keys(record: Mapping[Any, Any]) -> str:
    """The keys that a record has, in brackets, for a message."""
    # A record of a data set may have dozens of keys; the first eight nearly always show what is meant.
    keys = [str(key) for key, value in record.items() if value is not None]
    return f" (it has {', '.join(keys[:8])}{' …' if len(keys) > 8 else ''})" if keys else ""
