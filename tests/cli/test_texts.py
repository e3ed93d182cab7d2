"""Texts from files: every form, and every line that is none."""

from pathlib import Path

import pytest

from loralens.cli.texts import Text, read_texts
from loralens.errors import FormatError, OptionError


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.jsonl", '{"text": "one é", "label": "x"}\n\n{"text": "two", "label": 3}', [("one é", "x"), ("two", 3)]),
        ("a.jsonl", '{"text": "a\u2028b", "other": 1}\r\n', [("a\u2028b", None)]),
        ("a.txt", "\ufeffone\n\n  two  \n", [("one", None), ("two", None)]),
        ("a.csv", 'label,text\nx,"one, and\nmore"\ny,two\n', [("one, and\nmore", "x"), ("two", "y")]),
        ("a.tsv", "text\nit's, fine\n", [("it's, fine", None)]),
    ],
)
def test_what_is_read(name: str, content: str, texts: list[tuple[str, object]], tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    assert read_texts(path) == [Text(*text) for text in texts]  # type: ignore[arg-type]
    assert len(read_texts(path, limit=1)) == 1


def test_lines_behind_the_limit_are_not_read(tmp_path: Path) -> None:
    assert len(read_texts(written(tmp_path, "a.jsonl", '{"text": "one"}\nnonsense'), limit=1)) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "holds no texts"),
        ("a.txt", "\n \n", "holds no texts"),
        ("a.csv", "text\n", "holds no texts"),
        ("a.csv", "", r'no column "text" \(it has none\)'),
        ("a.csv", "words,label\na,b\n", r'no column "text" \(it has words, label\)'),
        ("a.csv", "label,text\na\n", 'line 2: has no "text"'),
        ("a.jsonl", '{"text": "one"}\n{"txt": "two"}', 'line 2: has no "text"'),
        ("a.jsonl", '{"text": " "}', 'line 1: "text" is empty'),
        ("a.jsonl", '{"text": 3}', 'line 1: "text" is no text'),
        ("a.jsonl", r'{"text": "a \ud83d b"}', "line 1: .*half a surrogate pair"),
        ("a.jsonl", '["text"]', "line 1: is no JSON object"),
        ("a.jsonl", "{", "line 1: is not JSON"),
        ("a.jsonl", '{"text": "one", "label": true}', 'line 1: "label" is True'),
        ("a.txt", b"fine\ncaf\xe9\n", "line 2: byte 0xe9 is not UTF-8"),
        ("a.csv", b"text\ncaf\xe9\n", "line 2: byte 0xe9 is not UTF-8"),
    ],
)
def test_what_is_refused(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(FormatError, match=message) as error:
        read_texts(path)
    assert str(error.value).startswith(f"{path}: ")


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no such file"):
        read_texts(tmp_path / "nowhere.txt")
    with pytest.raises(OptionError, match="texts are read from"):
        read_texts(written(tmp_path, "a.parquet", "x"))
