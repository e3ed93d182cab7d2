"""Texts with their labels, for training and evaluation: from files, lists, and corpora that packages bring."""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from loralens.errors import OptionError, place
from loralens.formats.records.corpora import CORPORA, read_corpus
from loralens.verbs.inputs.texts import TextSource, read_texts, text_label

TaskName = Literal["classification", "causal-lm", "masked-lm"]
# At most 18 digits: such a number fits into 64 bits.
_WHOLE = re.compile(r"-?[0-9]{1,18}")


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Texts and, where the task has them, numbers of labels; the names of all labels, in the order of their numbers.

    ``digest`` is of texts and numbers of labels, not of their names: equal digests, the same to learn from.
    """

    name: str
    texts: Sequence[str]
    numbers: Sequence[int] | None
    labels: tuple[str, ...]

    def head(self, count: int | None) -> "Texts":
        """The first of them."""
        return replace(self, texts=self.texts[:count], numbers=self.numbers and self.numbers[:count])

    def numbered(self, labels: Sequence[str]) -> list[int]:
        """The numbers of the labels among others, by their names.

        Raises
        ------
        OptionError
            A label that is not among these.
        """
        assert self.numbers is not None
        unknown = sorted(set(self.labels) - set(labels))
        if unknown:
            raise OptionError(
                f"label {unknown[0]!r} is none that was trained", fix=f"these are {', '.join(list(labels)[:20])}"
            )
        return [labels.index(self.labels[number]) for number in self.numbers]

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal."""
        return sha256(json.dumps([list(self.texts), self.numbers and list(self.numbers)]).encode()).hexdigest()

    def ordered(self, labels: tuple[str, ...]) -> "Texts":
        """The same with the labels numbered as ``labels`` has them, if these are the same names."""
        if self.numbers is None or sorted(labels) != sorted(self.labels):
            return self
        return replace(self, numbers=self.numbered(labels), labels=labels)

    @property
    def record(self) -> dict[str, Any]:
        """What is kept with the adapter."""
        return {"name": self.name, "texts": len(self.texts), "sha256": self.digest}


def read_data(
    data: TextSource, evaluation: TextSource | None = None, *, labelled: bool, one_label: bool = False
) -> tuple[Texts, Texts | None]:
    """The texts to learn from, and those to evaluate on: those given, or what a corpus holds out.

    Parameters
    ----------
    data, evaluation : path, name of a corpus, or iterable
        What `loralens.verbs.inputs.texts.read_texts` takes; ``data`` may also be the name of a corpus.
    labelled : bool
        Whether every text must have a label.
    one_label : bool
        Whether it is enough that all texts have the same.

    Raises
    ------
    OptionError
        No such file, nor such a corpus; a label that is evaluated and was never learned.
    FormatError
        A line without a text, or without a label where the task needs one.
    """
    if isinstance(data, str | PathLike):
        name = str(data)
        # A file of that name wins over the corpus.
        if name in CORPORA and not Path(name).is_file():  # a folder of that name is an adapter that was trained on it
            split = read_corpus(name)
            learned = _corpus_texts(name, split.train, split.labels, labelled=labelled)
            held_out = _corpus_texts(f"{name} held out", split.held_out, split.labels, labelled=labelled)
            return learned, held_out if evaluation is None else _read(evaluation, learned.labels, labelled=labelled)
        if not Path(name).exists() and not Path(name).suffix:
            raise OptionError(
                f"{name}: no such file, and no corpus of that name", fix=f"give a file, or one of {', '.join(CORPORA)}"
            )
    learned = _read(data, (), labelled=labelled, one_label=one_label)
    return learned, None if evaluation is None else _read(evaluation, learned.labels, labelled=labelled)


def _corpus_texts(name: str, examples: Sequence[Any], labels: tuple[str, ...], *, labelled: bool) -> Texts:
    texts = [example.text for example in examples]
    return Texts(name, texts, [e.label for e in examples], labels) if labelled else Texts(name, texts, None, ())


def _read(source: TextSource, labels: tuple[str, ...], *, labelled: bool, one_label: bool = False) -> Texts:
    """The texts of a file or of a list; their labels must be among ``labels``, where these are known."""
    texts = read_texts(source, labelled=labelled)
    label = text_label(source)
    name = Path(label).name
    if not labelled:
        return Texts(name, [text.text for text in texts], None, ())
    names = labels or _order_labels({str(text.label) for text in texts})
    numbers = {name: i for i, name in enumerate(names)}
    for text in texts:
        if str(text.label) not in numbers:
            with place(label), place(f"{'line' if isinstance(source, str | PathLike) else 'text'} {text.line}"):
                raise OptionError(
                    f"label {str(text.label)!r} is none of the texts learned from",
                    fix=f"these are {', '.join(names[:20])}",
                )
    if len(names) < 2 and not one_label:
        with place(label):
            raise OptionError(f"all texts have the label {names[0]!r}", fix="give texts of at least two labels")
    return Texts(name, [text.text for text in texts], [numbers[str(text.label)] for text in texts], names)


def _order_labels(labels: Collection[str]) -> tuple[str, ...]:
    """Names in their order: by number where all are whole numbers."""
    if all(_WHOLE.fullmatch(name) for name in labels):
        return tuple(sorted(labels, key=lambda name: (int(name), name)))
    return tuple(sorted(labels))
