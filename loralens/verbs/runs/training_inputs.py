"""The inputs of a training run: a model with the head for the task, and texts as tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralens.choices import Backend
from loralens.core.messages import note
from loralens.errors import OptionError, place
from loralens.formats.models.base_cache import base_digest
from loralens.formats.models.model_files import model_path
from loralens.tables.numbers import count
from loralens.verbs.models.loaded import Loaded
from loralens.verbs.models.models import ModelSource, digest_of_model, labels_of, load_headed, model_label
from loralens.verbs.models.texts import PAIR, Texts, is_conversation, read_data, text_label
from loralens.verbs.models.tokens import CAUSAL, Cut, check_causal, count_cut
from loralens.verbs.runs.training_options import TrainingOptions

if TYPE_CHECKING:  # torch takes a second
    from torch import nn

    from loralens.training.tasks import Examples, Task


@dataclass(frozen=True, slots=True, eq=False)
class TrainingInputs:
    """The task, the model and the texts of a run.

    Attributes
    ----------
    learned, held_out : Texts
        The texts for training and for evaluation.
    examples, evaluated : Examples
        The same texts as tokens.
    heads : tuple of str
        The modules that are trained in full by default: the head of a classifier, and modules whose weights are missing
        in the folder of the model.
    cut, evaluation_cut : Cut
        What was cut off the texts for training and for evaluation.
    backend : str
        What trains.
    rows, evaluated_rows : mapping of str to list, optional
        The columns for TRL: ``input_ids`` and ``labels``, and ``seq_lengths`` of packed rows; of pairs, which alone are
        evaluated by TRL, ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.
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
    backend: Backend = "core"
    rows: Mapping[str, Any] | None = None
    evaluated_rows: Mapping[str, Any] | None = None

    @property
    def count(self) -> int:
        """The number of examples: texts, packed rows, or pairs."""
        return len(next(iter(self.rows.values()))) if self.rows else len(self.examples)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of every example; of a pair those of the longer text."""
        if self.task.name == "dpo" and self.rows:
            return [len(prompt) + max(map(len, pair)) for prompt, *pair in zip(*self.rows.values(), strict=True)]
        return [len(tokens) for tokens in self.examples.tokens]

    def warn_of_cut(self) -> None:
        """Tell the user what was cut off the texts."""
        self.cut.warn(self.learned.name)
        lost = sum(not any(learned[1:]) for learned in self.examples.learned or ())
        if self.task.name == "dpo":
            lost = len(self.learned.texts) - self.count
        if lost:
            which = f"of {count(lost, 'dialogue')} nothing is learned, since what would be is cut off"
            note(f"{self.learned.name}: {which}")
        if self.held_out and self.evaluation_cut:
            self.evaluation_cut.warn(self.held_out.name, length=False)


def read_training_inputs(options: TrainingOptions, *, device: str) -> TrainingInputs:
    """Read the data, load the model, and turn texts into tokens."""
    from loralens.training.tasks import task_named  # torch takes a second

    task = task_named(options.task)
    pairs = task.name == "dpo"
    learned, held_out = read_data(
        options.data, options.eval, labelled=task.labelled, dialogues=task.head == CAUSAL, pairs=pairs
    )
    # A classifier that knows these labels keeps its head, so the labels must have its order.
    if task.labelled:
        own = labels_of(options.model)
        learned, held_out = learned.ordered(own), held_out and held_out.ordered(own)
    held_out = held_out.head(options.eval_limit) if held_out else None
    backend = options.backend_for(dialogues=any(is_conversation(text) for text in learned.texts))
    # The data comes first, since its labels give the size of the head, and an error in it is found in no time.
    loaded = load_headed(
        options.model,
        task.head,
        device=device,
        dtype=options.dtype or "f32",
        threads=options.threads,
        seed=options.seed,
        labels=learned.labels if task.labelled else None,
        loading=options.loading,
    )
    encode = partial(loaded.encode, length=options.length, mask_prompt=options.mask_prompt)
    texts, held_out_texts = _single_texts(learned), _single_texts(held_out)
    with place(text_label(options.data)):
        examples = encode(texts, labels=learned.numbers)
        _check_something_to_learn(task, examples)
    with place(text_label(options.data if options.eval is None else options.eval)):
        evaluated = encode(held_out_texts, labels=held_out.numbers) if held_out else None
    # A model that sees later tokens would only learn to copy them.
    if task.head == CAUSAL:
        with place(model_label(options.model)):
            check_causal(loaded, examples)
    rows: Mapping[str, Any] | None = None
    evaluated_rows: Mapping[str, Any] | None = None
    if pairs:
        rows, evaluated_rows = pair_rows(examples), pair_rows(evaluated) if evaluated else None
    elif backend == "trl":
        rows = trl_rows(examples, length=loaded.length(options.length), pack=options.pack)
    heads = heads_to_train(loaded.model, loaded.missing, classifier=task.labelled)
    # The texts are counted again, since the examples hold only what was kept of them.
    cut = count_cut(loaded, texts, length=options.length)
    held_out_cut = count_cut(loaded, held_out_texts, length=options.length) if held_out else None
    return TrainingInputs(
        task, loaded, learned, held_out, examples, evaluated, heads, cut, held_out_cut, backend, rows, evaluated_rows
    )


def digest_of_base(model: ModelSource) -> str:
    """A digest of the weights of a base, so that other weights under the same name make another run."""
    return digest_of_model(model[0]) if isinstance(model, tuple) else base_digest(model_path(Path(model)))


def _single_texts(texts: Texts | None) -> Sequence[Any]:
    """The texts; of pairs first all that are chosen, then all that are rejected."""
    pairs: Any = texts.texts if texts else ()
    if not pairs or isinstance(pairs[0], str) or PAIR[1] not in pairs[0]:
        return list(pairs)
    return [pair[name] for name in PAIR[1:] for pair in pairs]


def pair_rows(examples: "Examples") -> dict[str, list[list[int]]]:
    """The tokens of pairs as columns for TRL, without the pairs of which an answer is cut off."""
    assert examples.learned is not None
    rows: dict[str, list[list[int]]] = {f"{name}_ids": [] for name in PAIR}
    half = len(examples) // 2
    for chosen, rejected in ((n, n + half) for n in range(half)):
        masks = examples.learned[chosen], examples.learned[rejected]
        if not all(any(mask[1:]) for mask in masks):
            continue
        # A token that reaches over the end of the prompt belongs to the answers.
        size = min(mask.index(True) for mask in masks)
        parts = examples.tokens[chosen][:size], *(examples.tokens[each][size:] for each in (chosen, rejected))
        for column, part in zip(rows.values(), parts, strict=True):
            column.append(part)
    if not rows["prompt_ids"]:
        what = "nothing is left to learn: of every pair an answer is cut off"
        raise OptionError(what, fix="give a larger --length, or shorter prompts")
    return rows


def trl_rows(examples: "Examples", *, length: int, pack: bool) -> dict[str, list[Any]]:
    """Tokens and labels, of which −100 is not learned, as columns for TRL; packed into rows of at most ``length``."""
    from loralens.training.tasks import IGNORED

    masks = examples.learned or [[True] * len(tokens) for tokens in examples.tokens]
    columns = {
        "input_ids": list(examples.tokens),
        # The first token follows none, and TRL would count it.
        "labels": [
            [token if learned and place else IGNORED for place, (token, learned) in enumerate(zip(*text, strict=True))]
            for text in zip(examples.tokens, masks, strict=True)
        ],
    }
    if not pack:
        return columns
    import datasets

    pack_dataset: Any = import_module("trl").pack_dataset  # whose types are not exported
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    rows: dict[str, list[Any]] = pack_dataset(datasets.Dataset.from_dict(columns), length, "bfd").to_dict()
    if shown:
        datasets.enable_progress_bars()
    many = len(rows["input_ids"])
    share = f"{100 * sum(map(len, rows['input_ids'])) / (many * length):.0f} % of {length} tokens each"
    note(f"packed {count(len(examples), 'text')} into {count(many, 'row')}, {share}")
    return rows


def _check_something_to_learn(task: "Task", examples: "Examples") -> None:
    """Refuse texts in which a language task has nothing to predict."""
    if task.labelled:
        return
    if examples.learned is not None and not any(any(learned[1:]) for learned in examples.learned):
        raise OptionError(
            "nothing is left to learn: every completion and every answer is cut off",
            fix="give a larger --length, or shorter prompts",
        )
    if all(len(tokens) < 2 for tokens in examples.tokens):
        raise OptionError(
            "no text has two tokens, and a single token cannot be predicted from others",
            fix="give longer texts, or a larger --length",
        )


def heads_to_train(model: "nn.Module", missing: Sequence[str], *, classifier: bool) -> tuple[str, ...]:
    """The modules to train in full: those whose weights are missing, and for a classifier all but its encoder.

    Modules that share a parameter with others are left out.
    """
    names = [key.rpartition(".")[0] for key in missing]
    # The attribute of transformers that names the encoder inside a model with a head.
    if classifier and (inner := getattr(model, "base_model_prefix", "")):
        names += [name for name, child in model.named_children() if name != inner and [*child.parameters()]]
    everywhere = [(key, id(parameter)) for key, parameter in model.named_parameters(remove_duplicate=False)]

    def is_tied(name: str) -> bool:
        inside = {parameter for key, parameter in everywhere if key.startswith(f"{name}.")}
        return any(parameter in inside for key, parameter in everywhere if not key.startswith(f"{name}."))

    return tuple(name for name in dict.fromkeys(names) if not is_tied(name))
