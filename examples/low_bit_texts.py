"""The texts of `low_bit_study.py`: three domains to train on, and text of none of them.

The folder that the environment variable LORALENS_TEXTS names may hold ``e2e_valid.txt`` and ``e2e_test.txt`` (E2E NLG
challenge, a line ``meaning||sentence``) and ``gsm8k_test.jsonl`` (GSM8K). Without it, texts of installed packages take
their place.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import TypeVar

from loralens.formats.records.corpora import read_corpus

FOLDER = "LORALENS_TEXTS"
PROBLEMS = 1000  # of GSM8K's 1,319 problems to learn from; the others are held out
Item = TypeVar("Item")
LONG = 80  # characters of a paragraph of Python's help
GENERAL = "20newsgroups"  # the general half of the texts on which moments are measured


@dataclass(frozen=True)
class Domain:
    """Texts of one kind in two parts that share no text.

    Attributes
    ----------
    source : str
        Where they come from, for the report.
    """

    source: str
    train: Sequence[str]
    held_out: Sequence[str]


def domain(name: str) -> Domain:
    """The texts of a domain: ``restaurants``, ``problems`` or ``news``."""
    return _DOMAINS[name]()


def general() -> list[str]:
    """Texts that no adapter is trained on or judged on; the moments are measured on them and on the task's."""
    return [example.text for example in read_corpus(GENERAL).train]


def elsewhere(count: int) -> list[str]:
    """Paragraphs of Python's help, spread evenly: no adapter is trained on them, and no moments are measured there."""
    paragraphs = [" ".join(part.split()) for topic in sorted(topics) for part in topics[topic].split("\n\n")]
    long = list(dict.fromkeys(part for part in paragraphs if len(part) >= LONG))
    return long[:: max(1, len(long) // count)][:count]


def _corpus(name: str) -> Domain:
    split = read_corpus(name)
    return Domain(name, *([example.text for example in part] for part in (split.train, split.held_out)))


def _restaurants() -> Domain:
    lines = e2e_lines()
    if lines is None:
        return _corpus("tweet-author")
    # One sentence for each meaning of the test set, and no such meaning in training.
    held_out = dict(lines[1])
    train = [(meaning, sentence) for meaning, sentence in lines[0] if meaning not in held_out]
    return Domain("E2E", *([f"{a} => {b}" for a, b in part] for part in (spread(train), spread(held_out.items()))))


def e2e_lines() -> tuple[list[tuple[str, str]], list[tuple[str, str]]] | None:
    """(meaning, sentence) of the validation and of the test set of the E2E NLG challenge, if the folder has them."""
    folder = _folder("e2e_valid.txt", "e2e_test.txt")
    if folder is None:
        return None

    def lines(file: str) -> list[tuple[str, str]]:
        rows = (line.partition("||") for line in (folder / file).read_text("utf-8").splitlines())
        return [(meaning, sentence) for meaning, bar, sentence in rows if bar]

    return lines("e2e_valid.txt"), lines("e2e_test.txt")


def _problems() -> Domain:
    folder = _folder("gsm8k_test.jsonl")
    if folder is None:
        return _corpus("tweet-sentiment")
    rows = [json.loads(line) for line in (folder / "gsm8k_test.jsonl").read_text("utf-8").splitlines()]
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    return Domain("GSM8K", texts[:PROBLEMS], texts[PROBLEMS:])


def _folder(*files: str) -> Path | None:
    """The folder with the files that are not in a package, if it has all of them."""
    folder = Path(os.environ.get(FOLDER, ""))
    return folder if os.environ.get(FOLDER) and all((folder / file).is_file() for file in files) else None


def spread(items: Iterable[Item]) -> list[Item]:
    """Every 97th, then those after them: neighbours in the file are sentences for one meaning."""
    listed = list(items)
    return [one for start in range(97) for one in listed[start::97]]


_DOMAINS: dict[str, Callable[[], Domain]] = {
    "restaurants": _restaurants,
    "problems": _problems,
    "news": lambda: _corpus("reuters-r8"),
}
