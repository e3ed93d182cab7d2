"""Reads the texts on which a model is run: .jsonl, .txt, .csv, .tsv and .parquet files, or lists."""

import csv
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import takewhile
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from loralens.core.messages import note
from loralens.core.stored import parse_json
from loralens.errors import FormatError, MissingFileError, OptionError, place
from loralens.formats.files.outside import check_folder, open_stream, read_whole
from loralens.requirements import missing_packages

PARQUET = ".parquet"


# In a folder of `Dataset.save_to_disk`, and of `DatasetDict.save_to_disk` beside a folder of each split.
SAVED = ("dataset_info.json", "dataset_dict.json")


def is_saved(folder: Path) -> bool:
    """Whether a folder holds a data set that ``datasets`` has saved, or several splits of one."""
    return any((folder / name).is_file() for name in SAVED)


def parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a Parquet file as mappings, some at a time."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise missing_packages("reading Parquet", ("pyarrow",), error) from error
    try:
        with open_stream(path) as stream, ParquetFile(stream) as file:
            for batch in file.iter_batches():
                yield from map(_without_nulls, batch.to_pylist())
    except (ArrowException, OSError) as error:
        what = f"cannot be read as Parquet: {str(error).splitlines()[0]}"
        raise FormatError(what, fix="save the table again") from error


def saved_rows(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set that was saved to a folder."""
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise missing_packages("reading a folder of datasets", ("datasets",), error) from error
    check_folder(folder)
    try:
        dataset = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        what = f"cannot be read as a data set: {str(error).splitlines()[0]}"
        raise FormatError(what, fix="save it again: dataset.save_to_disk(…)") from error
    if not isinstance(dataset, Dataset):
        if len(dataset) != 1:
            fix = f"give the folder of one of them: {', '.join(str(folder / name) for name in dataset)}"
            raise FormatError("holds several splits of a data set", fix=fix)
        (dataset,) = dataset.values()
    yield from map(_without_nulls, dataset)


def _without_nulls(value: Any) -> Any:
    """A value without the keys whose values are null, at any depth.

    All rows of a column have the same keys: a message has the ``tool_calls`` of another one as null. A chat template
    that asks whether a message has any would find them.
    """
    if isinstance(value, Mapping):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


ROLE = "assistant"  # of the messages that are learned


_FIX = 'write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


# {"prompt": …, "completion": …} with two strings or two lists of messages, or {"messages": [{"role", "content"}, …]}.
Dialogue = dict[str, Any]


def is_conversation(text: "str | Dialogue") -> bool:
    """Whether a text is made of messages, which a chat template puts together."""
    return not isinstance(text, str) and not isinstance(text.get("prompt"), str)


SHAREGPT = {"human": "user", "user": "user", "gpt": ROLE, "assistant": ROLE, "system": "system", "tool": "tool"}


def dialogue_of(record: Mapping[Any, Any]) -> Dialogue | None:
    """The dialogue of a record that has no text; None if it is not a dialogue either, empty if its completion is.

    The records of ShareGPT (``conversations``) and of Alpaca (``instruction``, ``input``, ``output``) become messages.

    Raises
    ------
    FormatError
        Messages without a role or a content, or nothing to learn.
    """
    if record.get("text") is not None:
        return None
    messages, tools = record.get("messages"), record.get("tools")
    if messages is None and isinstance(turns := record.get("conversations"), list):
        messages = [
            {"role": SHAREGPT.get(str(turn["from"]), turn["from"]), "content": turn.get("value")}
            if isinstance(turn, Mapping) and "from" in turn
            else turn
            for turn in turns
        ]
        if isinstance(record.get("system"), str) and record["system"]:
            messages = [{"role": "system", "content": record["system"]}, *messages]
    # A table holds tools as JSON.
    tools = parse_json(tools) if isinstance(tools, str) and tools.strip() else tools or None
    more = {} if tools is None else {"tools": tools}
    if messages is not None:
        messages = _check_messages(messages, "messages")
        if not any(message["role"] == ROLE for message in messages):
            raise FormatError(f'"messages" has no message of the {ROLE}, which would be learned', fix=_FIX)
        return {"messages": messages, **more}
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        asked = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)
        prompt = [{"role": "user", "content": asked}]
        completion = [{"role": ROLE, "content": record["output"]}] if record["output"].strip() else ""
    if prompt is None or completion is None:
        return None
    if isinstance(completion, str) and not completion.strip():
        return {}
    if isinstance(prompt, str) != isinstance(completion, str):
        what = '"prompt" and "completion" are of two kinds'
        raise FormatError(what, fix="give two strings, or two lists of messages")
    if not isinstance(prompt, str):
        return {
            "prompt": _check_messages(prompt, "prompt"),
            "completion": _check_messages(completion, "completion"),
            **more,
        }
    for name, text in (("prompt", prompt), ("completion", completion)):
        _check_characters(text, name)
    return {"prompt": prompt, "completion": completion}


PAIR = ("prompt", "chosen", "rejected")  # the columns of preferences, which DPO learns


def preference_of(record: Mapping[Any, Any]) -> dict[str, Dialogue]:
    """The dialogues of a prompt with its chosen and with its rejected answer; empty if an answer is.

    Where both answers are whole conversations, the messages with which both begin are the prompt.

    Raises
    ------
    FormatError
        A column is missing, or the columns are of two kinds.
    """
    prompt: Any
    answers: list[Any]
    prompt, *answers = (record.get(name) for name in PAIR)
    if all(isinstance(messages, list) for messages in answers) and not isinstance(prompt, list):
        pairs = zip(*(messages[:-1] for messages in answers), strict=False)
        prompt = [one for one, other in takewhile(lambda pair: pair[0] == pair[1], pairs)] or prompt
        answers = [messages[len(prompt) :] if isinstance(prompt, list) else messages for messages in answers]
    for name, value in zip(PAIR, (prompt, *answers), strict=True):
        if value is None:
            fix = f"give every record {', '.join(PAIR)}: three texts, or three lists of messages"
            raise FormatError(f'has no "{name}"{_describe_keys(record)}, which --task dpo needs', fix=fix)
    dialogues = {}
    for name, answer in zip(PAIR[1:], answers, strict=True):
        with place(name):
            one = {"prompt": prompt, "completion": answer, "tools": record.get("tools")}
            dialogues[name] = dialogue_of(one) or {}
    return dialogues if all(dialogues.values()) else {}


def _check_messages(messages: Any, name: str) -> list[dict[str, Any]]:
    """The messages as dictionaries, after a check that each has a role and a content."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise FormatError(f'"{name}" is not a list of messages', fix=_FIX)
    checked = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise FormatError(f'message {number} of "{name}" has no "role"', fix=_FIX)
        content = message.get("content")
        # A call of a tool may have no content.
        content = "" if content is None and message.get("tool_calls") else content
        if not isinstance(content, str):
            raise FormatError(f'message {number} of "{name}" has no "content" that is a text', fix=_FIX)
        _check_characters(content, name)
        # What is null is not there; a chat template may take the null itself for content.
        checked.append({**{key: value for key, value in message.items() if value is not None}, "content": content})
    return checked


def _check_characters(text: str, name: str) -> None:
    # JSON can escape half of a surrogate pair, which no tokenizer accepts.
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        what = f'"{name}" has half a surrogate pair, which is not a character'
        raise FormatError(what, fix="write the text again, as UTF-8")


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


Columns = tuple[str, ...]  # those that every record needs
# A file; or texts, (text, label) pairs, or {"text": …, "label": …} mappings.
TextSource = str | PathLike[str] | Iterable[str | tuple[str, str | int | None] | Mapping[str, Any] | InputText]


def check_demo_texts(path: str) -> str:
    """The path itself, after a check that the texts of the demo are there."""
    if not Path(path).is_file():
        command = f"python examples/corpora.py reuters-r8 20newsgroups -o {Path(path).parent}"
        raise OptionError(f"{path}: no such file", fix=f"in a clone of loralens, write it with: {command}")
    return path


def text_label(source: TextSource) -> str:
    """The name of the texts in messages: the path of their file, if they are in one."""
    return str(source) if isinstance(source, str | PathLike) else "texts"


def read_texts(
    source: TextSource,
    *,
    limit: int | None = None,
    labelled: bool = False,
    dialogues: bool = False,
    pairs: bool = False,
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
    pairs : bool
        Whether every record is a prompt with a chosen and a rejected answer: its dialogue has these two.

    Raises
    ------
    OptionError
        The file does not exist or has another suffix; labels are needed, and the file is a ``.txt``.
    FormatError
        A line has no text, or not the label that is needed; the file has no texts, or is not UTF-8.
    """
    needed = PAIR if pairs else ("text", "label")[: 1 + labelled]
    if isinstance(source, str | PathLike):
        reader = _read_file(_check_text_file(Path(source), needed), needed)
    else:
        reader = _read_records(source, needed)
    with place(text_label(source)):
        texts: list[InputText] = []
        empty = 0
        # It reads no further than the limit: later lines may be wrong.
        while (limit is None or len(texts) < limit) and (text := next(reader, None)) is not None:
            if text.dialogue == {}:
                empty += 1
            else:
                texts.append(text)
        if empty:
            note(f"{text_label(source)}: {empty:,} with an empty completion left out")
        if not texts:
            raise FormatError("holds no texts", fix="give a file or a list with at least one text")
        if not dialogues and any(text.dialogue for text in texts):
            fix = "give texts; prompts, completions and messages are learned by train --task causal-lm"
            raise FormatError("holds dialogues, which this use of texts cannot take", fix=fix)
    return texts


def _check_text_file(path: Path, needed: Columns) -> Path:
    """The path itself, after a check that texts can be read from it."""
    if is_saved(path):
        return path
    if path.suffix not in SUFFIXES:
        folder = "; this folder is not one that datasets has saved" if path.is_dir() else ""
        what = f"{path}: texts are read from {', '.join(SUFFIXES)} files{folder}"
        raise OptionError(what, fix="give one of these, or a folder that Dataset.save_to_disk has written")
    if len(needed) > 1 and path.suffix == ".txt":
        named = " and ".join(f'"{name}"' for name in needed)
        what = "answers" if needed == PAIR else "labels"
        raise OptionError(f"{path}: a .txt file has no {what}", fix=f"give a .jsonl or .csv file with {named}")
    if not path.is_file():
        if not path.exists():
            raise MissingFileError(f"{path}: no such file", fix="check the path")
        raise OptionError(f"{path}: is not a regular file", fix="check the path")
    return path


def _read_records(items: Iterable[Any], needed: Columns, *, of: str = "text") -> Iterator[InputText]:
    """The texts of records, with their numbers, counted from 1, as line numbers; ``of`` is what a record is called."""
    for number, item in enumerate(items, start=1):
        with place(f"{of} {number}"):
            if isinstance(item, Mapping):
                record = item
            elif isinstance(item, InputText):
                record = item.dialogue or {"text": item.text, "label": item.label}
            elif isinstance(item, tuple | list) and len(item) in (2, 3):
                record = {"text": item[0], "label": item[1]}
            else:
                record = {"text": item}
            yield _check_record(record, number, needed)


def _read_file(path: Path, needed: Columns) -> Iterator[InputText]:
    if path.suffix == PARQUET or path.is_dir():
        return _read_records(saved_rows(path) if path.is_dir() else parquet_rows(path), needed, of="row")
    if path.suffix == ".txt":
        return (InputText(line.strip(), None, number) for number, line in _read_lines(path) if line.strip())
    return _read_json_lines(path, needed) if path.suffix.startswith(".json") else _read_table(path, needed)


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


def _read_json_lines(path: Path, needed: Columns) -> Iterator[InputText]:
    with open_stream(path) as stream:
        whole = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if whole:
        try:
            records = parse_json(read_whole(path))
        except ValueError as error:
            raise FormatError(
                f"is not JSON ({error})", fix="write a list of records, or one record per line"
            ) from error
        yield from _read_records(records, needed)
        return
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
            yield _check_record(record, number, needed)


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
        limit = csv.field_size_limit(_LONGEST)  # it holds for the whole process, so it is set back at once
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise FormatError(f"line {rows.line_num}: {error}", fix="save the table again") from error
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        # The parser has asked for more lines to end this row. It would return the rest of the file as one cell.
        if ended:
            raise FormatError(f"line {begun}: a quote is opened and never closed", fix=_QUOTES)
        if row:
            yield rows.line_num, row


def _read_table(path: Path, needed: Columns) -> Iterator[InputText]:
    rows = _read_rows(path)
    _, columns = next(rows, (0, []))
    if needed != PAIR and "text" not in columns and {"prompt", "completion"} <= set(columns):
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
            yield _check_record(row, line, needed)


def _check_record(record: Mapping[Any, Any], line: int, needed: Columns) -> InputText:
    """The text of one record; if a key is missing, the message has the other keys, one of which may be meant."""
    if needed == PAIR:
        return InputText("", None, line, preference_of(record))
    labelled, dialogue = "label" in needed, dialogue_of(record)
    if dialogue is not None and not labelled:
        return InputText("", None, line, dialogue)
    text, label = record.get("text"), record.get("label")
    if text is None:
        raise FormatError(f'has no "text"{_describe_keys(record)}', fix="give every line a text, or remove the line")
    if not isinstance(text, str) or not text.strip():
        what = "is empty" if isinstance(text, str) else "is not a string"
        raise FormatError(f'"text" {what}', fix="give every line a text, or remove the line")
    _check_characters(text, "text")
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


# At most 18 digits: such a number fits into 64 bits, while int() refuses some of thousands of digits.
_WHOLE = re.compile(r"-?[0-9]{1,18}")
LABELS = 20  # of those known, which a message lists; some data sets have hundreds


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Texts and, if the task has labels, the number of the label of each; and the names of all labels by number.

    A text may be a dialogue: a prompt with its completion, or messages.
    """

    name: str
    texts: Sequence[str | Dialogue]
    numbers: Sequence[int] | None
    labels: tuple[str, ...]

    def head(self, count: int | None) -> "Texts":
        """The first ``count`` texts."""
        return replace(self, texts=self.texts[:count], numbers=self.numbers and self.numbers[:count])

    def label_numbers(self, labels: Sequence[str]) -> list[int]:
        """The label of each text as its number in another list of labels.

        Raises
        ------
        OptionError
            A label is not in the other list.
        """
        assert self.numbers is not None
        unknown = sorted(set(self.labels) - set(labels))
        if unknown:
            raise OptionError(
                f"label {unknown[0]!r} was not trained", fix=f"the labels are {', '.join(list(labels)[:LABELS])}"
            )
        return [labels.index(self.labels[number]) for number in self.numbers]

    @property
    def digest(self) -> str:
        """The SHA-256 of the texts and the numbers of their labels, in hexadecimal.

        The names of the labels are not included: equal digests mean that the same is learned.
        """
        # As JSON, which separates the texts, so that no two lists give the same bytes.
        return sha256(json.dumps([list(self.texts), self.numbers and list(self.numbers)]).encode()).hexdigest()

    def ordered(self, labels: tuple[str, ...]) -> "Texts":
        """The texts with labels numbered in the order of ``labels``; unchanged if the names are not the same."""
        if self.numbers is None or sorted(labels) != sorted(self.labels):
            return self
        return replace(self, numbers=self.label_numbers(labels), labels=labels)

    @property
    def record(self) -> dict[str, Any]:
        """The record of the texts in the metadata of the adapter."""
        return {"name": self.name, "texts": len(self.texts), "sha256": self.digest}


def read_data(
    data: TextSource,
    evaluation: TextSource | None = None,
    *,
    labelled: bool,
    one_label: bool = False,
    dialogues: bool = False,
    pairs: bool = False,
) -> tuple[Texts, Texts | None]:
    """The texts for training, and those for evaluation; sources and errors are those of `read_texts`.

    A label of a text for evaluation must be one of those for training. ``one_label`` says whether all texts for
    training may have the same label.
    """
    kind = {"labelled": labelled, "dialogues": dialogues, "pairs": pairs}
    learned = _read(data, (), least=1 if one_label else 2, **kind)
    return learned, None if evaluation is None else _read(evaluation, learned.labels, **kind)


def _read(source: TextSource, labels: tuple[str, ...], *, labelled: bool, least: int = 1, **kind: bool) -> Texts:
    """The texts of a file or of a list. Their labels must be among ``labels``, or at least so many if that is empty."""
    texts = read_texts(source, labelled=labelled, **kind)
    label = text_label(source)
    # The name without its folder, since it is stored with the adapter.
    name = Path(label).name
    if not labelled:
        return Texts(name, [text.dialogue or text.text for text in texts], None, ())
    names = labels or _order_labels({str(text.label) for text in texts})
    numbers = {name: i for i, name in enumerate(names)}
    for text in texts:
        if str(text.label) not in numbers:
            with place(label), place(f"{'line' if isinstance(source, str | PathLike) else 'text'} {text.line}"):
                raise OptionError(
                    f"label {str(text.label)!r} is not among the labels of the texts for training",
                    fix=f"the labels are {', '.join(names[:LABELS])}",
                )
    # A classifier of one class has a loss of 0 from the start.
    if len(names) < least:
        with place(label):
            raise OptionError(f"all texts have the label {names[0]!r}", fix="give texts of at least two labels")
    return Texts(name, [text.text for text in texts], [numbers[str(text.label)] for text in texts], names)


def _order_labels(labels: Collection[str]) -> tuple[str, ...]:
    """The labels in order: by value if all are whole numbers, else by name."""
    if all(_WHOLE.fullmatch(name) for name in labels):
        # The name too, as 1 and 01 are different labels.
        return tuple(sorted(labels, key=lambda name: (int(name), name)))
    return tuple(sorted(labels))
