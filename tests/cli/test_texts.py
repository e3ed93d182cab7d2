"""Texts from files: every form, and every line that is none."""

from pathlib import Path

import pytest

from loralens import FormatError, OptionError
from loralens.verbs.models.texts import read_texts


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
        ("a.csv", "text,label\none,\ntwo,0\n", [("one", None), ("two", "0")]),
        ("a.csv", 'text,label\rone,x\r\r"t\rwo",y\r', [("one", "x"), ("t\rwo", "y")]),
        ("a.csv", 'text\n"closed at the very end"', [("closed at the very end", None)]),
        ("a.csv", f"text\n{'long ' * 40_000}end\n", [(f"{'long ' * 40_000}end", None)]),
    ],
)
def test_what_is_read(name: str, content: str, texts: list[tuple[str, object]], tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    assert [(one.text, one.label) for one in read_texts(path)] == texts
    assert len(read_texts(path, limit=1)) == 1


def test_lines_behind_the_limit_are_not_read(tmp_path: Path) -> None:
    assert len(read_texts(written(tmp_path, "a.jsonl", '{"text": "one"}\nnonsense'), limit=1)) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "holds no texts"),
        ("a.csv", "words,label\na,b\n", r'no column "text" \(it has words, label\)'),
        ("a.csv", "label,text\na\n", 'line 2: has no "text"'),
        ("a.jsonl", '{"text": "one"}\n{"txt": "two"}', 'line 2: has no "text"'),
        ("a.jsonl", '{"text": " "}', 'line 1: "text" is empty'),
        ("a.jsonl", '{"text": 3}', 'line 1: "text" is not a string'),
        ("a.jsonl", r'{"text": "a \ud83d b"}', "line 1: .*half a surrogate pair"),
        ("a.jsonl", "{", "line 1: is not JSON"),
        ("a.jsonl", '{"text": "one", "label": true}', 'line 1: "label" is True'),
        ("a.csv", "text\nfine\none, two\n", "line 3: has more cells than columns"),
        ("a.csv", 'text\nfine\n"one\ntwo\nthree\n', "line 3: a quote is opened and never closed\n  fix: put texts"),
        ("a.csv", "text,label,text\none,x,two\n", 'has 2 columns "text"\n  fix: give one of them another name'),
        ("a.txt", b"fine\ncaf\xe9\n", "line 2: byte 0xe9 is not UTF-8"),
    ],
)
def test_what_is_refused(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(FormatError, match=message) as error:
        read_texts(path)
    assert str(error.value).startswith(f"{path}: ")


def test_the_line_of_a_text(tmp_path: Path) -> None:
    lines = {
        "a.jsonl": '{"text": "one"}\n\n{"text": "two"}',
        "a.txt": "one\n\ntwo\n",
        "a.tsv": "text\none\n\ntwo\n",
        "a.csv": 'text\n"on\ne"\n"tw\no"\n',  # the last line of each
    }
    expected = {"a.jsonl": [1, 3], "a.txt": [1, 3], "a.tsv": [2, 4], "a.csv": [3, 5]}
    for name, content in lines.items():
        assert [one.line for one in read_texts(written(tmp_path, name, content))] == expected[name]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "one", "label": 1}\n\n{"text": "two"}', r'line 3: has no "label" \(it has text\)'),
        ("a.jsonl", '{"text": "one", "class": "x"}', r'line 1: has no "label" \(it has text, class\)'),
        ("a.jsonl", '{"text": "one", "label": " "}', 'line 1: "label" is empty'),
        (
            "a.csv",
            "text,sentiment\none,x\n",
            r'has no column "label" \(it has text, sentiment\)\n  fix: call the column',
        ),
        ("a.csv", "text,label\none,x\ntwo,\n", 'line 3: has no "label"'),
    ],
)
def test_labels_that_are_needed_and_missing(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(FormatError, match=message) as error:
        read_texts(path, labelled=True)
    assert str(error.value).startswith(f"{path}: ")
    assert "label" in str(error.value)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no such file"):
        read_texts(tmp_path / "nowhere.txt")
    with pytest.raises(OptionError, match="texts are read from"):
        read_texts(written(tmp_path, "a.xlsx", "x"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(OptionError, match="this folder is not one that datasets has saved"):
        read_texts(tmp_path / "folder")
