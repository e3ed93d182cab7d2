"""Reads texts with labels, for training and evaluation, from files, lists, and corpora that packages contain."""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

from loralens.errors import OptionError, place
from loralens.formats.records.corpora import CORPORA, read_corpus
from loralens.verbs.inputs.corpus.dialogues import Dialogue
from loralens.verbs.inputs.corpus.texts import TextSource, read_texts, text_label

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
) -> tuple[Texts, Texts | None]:
    """The texts for training, and those for evaluation, which are by default the held-out texts of a corpus.

    Parameters
    ----------
    data, evaluation : path, name of a corpus, or iterable
        As for `loralens.verbs.inputs.corpus.texts.read_texts`; ``data`` may also be the name of a corpus.
    labelled : bool
        Whether every text must have a label.
    one_label : bool
        Whether all texts may have the same label.
    dialogues : bool
        Whether there may be dialogues in place of texts.

    Raises
    ------
    OptionError
        There is no such file or corpus; the texts for evaluation have a label that those for training do not have.
    FormatError
        A line has no text, or not the label that the task needs.
    """
    if isinstance(data, str | PathLike):
        name = str(data)
        # A file of that name has precedence over the corpus, but a folder is probably an adapter trained on the corpus.
        if name in CORPORA and not Path(name).is_file():
            split = read_corpus(name)
            learned = _corpus_texts(name, split.train, split.labels, labelled=labelled)
            held_out = _corpus_texts(f"{name} held out", split.held_out, split.labels, labelled=labelled)
            return learned, held_out if evaluation is None else _read(
                evaluation, learned.labels, labelled=labelled, dialogues=dialogues
            )
        # A name without a suffix may be meant as a corpus; `read_texts` has the message for every other.
        if not Path(name).exists() and not Path(name).suffix:
            raise OptionError(
                f"{name}: no such file, and no corpus of that name", fix=f"give a file, or one of {', '.join(CORPORA)}"
            )
    learned = _read(data, (), labelled=labelled, one_label=one_label, dialogues=dialogues)
    return learned, None if evaluation is None else _read(
        evaluation, learned.labels, labelled=labelled, dialogues=dialogues
    )


def _corpus_texts(name: str, examples: Sequence[Any], labels: tuple[str, ...], *, labelled: bool) -> Texts:
    texts = [example.text for example in examples]
    return Texts(name, texts, [e.label for e in examples], labels) if labelled else Texts(name, texts, None, ())


def _read(
    source: TextSource, labels: tuple[str, ...], *, labelled: bool, one_label: bool = False, dialogues: bool = False
) -> Texts:
    """The texts of a file or of a list. Their labels must be among ``labels``, unless that is empty."""
    texts = read_texts(source, labelled=labelled, dialogues=dialogues)
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
    if len(names) < 2 and not one_label:
        with place(label):
            raise OptionError(f"all texts have the label {names[0]!r}", fix="give texts of at least two labels")
    return Texts(name, [text.text for text in texts], [numbers[str(text.label)] for text in texts], names)


def _order_labels(labels: Collection[str]) -> tuple[str, ...]:
    """The labels in order: by value if all are whole numbers, else by name."""
    if all(_WHOLE.fullmatch(name) for name in labels):
        # The name too, as 1 and 01 are different labels.
        return tuple(sorted(labels, key=lambda name: (int(name), name)))
    return tuple(sorted(labels))
