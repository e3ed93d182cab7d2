"""What a run learns from: a model with the head of its task, texts as tokens, and how they are evaluated."""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralens.errors import OptionError, place
from loralens.formats.records.corpora import CORPORA, read_corpus
from loralens.verbs.inputs.causality import CAUSAL, check_causal
from loralens.verbs.inputs.cut import Cut, count_cut
from loralens.verbs.inputs.loaded import Loaded
from loralens.verbs.inputs.models import labels_of, load_headed
from loralens.verbs.inputs.texts import read_texts

if TYPE_CHECKING:
    from torch import nn

    from loralens.training.tasks import Examples, Task

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


def data_of(
    data: str, evaluation: str | None, *, labelled: bool, one_label: bool = False
) -> tuple[Texts, Texts | None]:
    """The texts to learn from and those to evaluate on; whether one label is enough in a file.

    Raises
    ------
    OptionError
        No such file, nor such a corpus; a label that is evaluated and was never learned.
    FormatError
        A line without a text, or without a label where the task needs one.
    """
    if data in CORPORA and not Path(data).is_file():  # a folder of that name is an adapter that was trained on it
        split = read_corpus(data)
        learned = _of_corpus(data, split.train, split.labels, labelled=labelled)
        held_out = _of_corpus(f"{data} held out", split.held_out, split.labels, labelled=labelled)
        return learned, held_out if evaluation is None else _of_file(evaluation, learned.labels, labelled=labelled)
    if not Path(data).exists() and not Path(data).suffix:
        raise OptionError(
            f"{data}: no such file, and no corpus of that name", fix=f"give a file, or one of {', '.join(CORPORA)}"
        )
    learned = _of_file(data, (), labelled=labelled, one_label=one_label)
    return learned, None if evaluation is None else _of_file(evaluation, learned.labels, labelled=labelled)


def _of_corpus(name: str, examples: Sequence[Any], labels: tuple[str, ...], *, labelled: bool) -> Texts:
    texts = [example.text for example in examples]
    return Texts(name, texts, [e.label for e in examples], labels) if labelled else Texts(name, texts, None, ())


def _of_file(path: str, labels: tuple[str, ...], *, labelled: bool, one_label: bool = False) -> Texts:
    """The texts of a file; their labels must be among ``labels``, where these are known."""
    texts = read_texts(Path(path), labelled=labelled)
    if not labelled:
        return Texts(Path(path).name, [text.text for text in texts], None, ())
    found = labels or _ordered({str(text.label) for text in texts})
    number = {name: i for i, name in enumerate(found)}
    for text in texts:
        if str(text.label) not in number:
            with place(path), place(f"line {text.line}"):
                raise OptionError(
                    f"label {str(text.label)!r} is none of the texts learned from",
                    fix=f"these are {', '.join(found[:20])}",
                )
    if len(found) < 2 and not one_label:
        with place(path):
            raise OptionError(f"all texts have the label {found[0]!r}", fix="give texts of at least two labels")
    return Texts(Path(path).name, [text.text for text in texts], [number[str(text.label)] for text in texts], found)


def _ordered(labels: Collection[str]) -> tuple[str, ...]:
    """Names in their order: by number where all are whole numbers."""
    if all(_WHOLE.fullmatch(name) for name in labels):
        return tuple(sorted(labels, key=lambda name: (int(name), name)))
    return tuple(sorted(labels))


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """All that a run is made of.

    ``heads`` names the modules that are trained in full: the head of a classifier, and what the model's folder did not
    have. ``cut`` is what was left out of the texts learned from, ``evaluation_cut`` of those evaluated on.
    """

    task: "Task"
    loaded: Loaded
    learned: Texts
    held_out: Texts | None
    examples: "Examples"
    evaluated: "Examples | None"
    heads: tuple[str, ...]
    cut: Cut
    evaluation_cut: Cut | None

    def warn_of_cut(self) -> None:
        """Say on stderr what was left out of the texts."""
        self.cut.warn(self.learned.name)
        if self.held_out and self.evaluation_cut:
            self.evaluation_cut.warn(self.held_out.name)


def inputs(given: dict[str, Any], *, device: str) -> Inputs:
    """Read the data, load the model, and turn texts into tokens."""
    from loralens.training.tasks import task_named

    task = task_named(given["task"])
    learned, held_out = data_of(given["data"], given["evaluation"], labelled=task.labelled)
    if task.labelled:  # a classifier that knows these labels goes on from what it knows
        own = labels_of(given["model"])
        learned, held_out = learned.ordered(own), held_out and held_out.ordered(own)
    held_out = held_out.head(given["eval_limit"]) if held_out else None
    loaded = load_headed(
        given["model"],
        task.head,
        device=device,
        dtype=given["dtype"],
        threads=given["threads"],
        seed=given["seed"],
        labels=learned.labels if task.labelled else None,
    )
    encoded = partial(loaded.encoded, length=given["length"])
    with place(given["data"]):
        examples = encoded(learned.texts, labels=learned.numbers)
        _check_asked(task, examples)
    with place(given["evaluation"] or given["data"]):
        evaluated = encoded(held_out.texts, labels=held_out.numbers) if held_out else None
    if task.head == CAUSAL:
        with place(given["model"]):
            check_causal(loaded, examples)
    heads = heads_of(loaded.model, loaded.made, classifier=task.labelled)
    cut = count_cut(loaded, learned.texts, length=given["length"])
    held_out_cut = count_cut(loaded, held_out.texts, length=given["length"]) if held_out else None
    return Inputs(task, loaded, learned, held_out, examples, evaluated, heads, cut, held_out_cut)


def _check_asked(task: "Task", examples: "Examples") -> None:
    """Refuse texts of which a task of language asks nothing."""
    if task.labelled:
        return
    if all(len(one) < 2 for one in examples.tokens):
        raise OptionError(
            "no text has two tokens, and one alone teaches nothing of what goes with it",
            fix="give longer texts, or a larger --length",
        )
    if not task.asks(examples):
        raise OptionError(
            "no text has a token that can be hidden: all are special, or words that the tokenizer does not know",
            fix="give texts in the words of the tokenizer",
        )


def heads_of(model: "nn.Module", made: Sequence[str], *, classifier: bool) -> tuple[str, ...]:
    """The modules to train in full: those of the weights that were made, and of a classifier what is not its encoder.

    What is tied to other weights (the decoder of a masked language model to its embedding) is left out.
    """
    found = [key.rpartition(".")[0] for key in made]
    if classifier and (inner := getattr(model, "base_model_prefix", "")):
        found += [
            name for name, child in model.named_children() if name != inner and any(True for _ in child.parameters())
        ]
    return tuple(dict.fromkeys(part for name in found for part in _untied(model, name)))


def _untied(model: "nn.Module", name: str) -> list[str]:
    """A module, or the largest ones in it of which no parameter is also one of another module."""
    everywhere = model.named_parameters(remove_duplicate=False)
    outside = {id(parameter) for key, parameter in everywhere if not key.startswith(f"{name}.")}
    module = model.get_submodule(name)
    if not any(id(parameter) in outside for parameter in module.parameters()):
        return [name]
    children = [f"{name}.{child}" for child, inner in module.named_children() if any(True for _ in inner.parameters())]
    return [part for child in children for part in _untied(model, child)]
