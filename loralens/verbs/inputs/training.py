"""The inputs of a training run: its options, a model with the head of its task, and texts as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from loralens.errors import OptionError, place
from loralens.training.course import Optimiser, Schedule
from loralens.training.method import MethodName
from loralens.verbs.inputs.causality import CAUSAL, check_causal
from loralens.verbs.inputs.choices import FloatType, check_at_least, check_choice, check_counts
from loralens.verbs.inputs.cut import Cut, count_cut
from loralens.verbs.inputs.data import TaskName, Texts, read_data
from loralens.verbs.inputs.loaded import Loaded
from loralens.verbs.inputs.models import ModelSource, labels_of, load_headed, model_label
from loralens.verbs.inputs.texts import TextSource, text_label

if TYPE_CHECKING:  # torch takes a second
    from torch import nn

    from loralens.training.tasks import Examples, Task

# The factors are float32, and so is their scale.
LARGEST = 3.4e38  # in float32


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TrainingOptions:
    """The options of `loralens.train`, where each that was left out has its value."""

    model: ModelSource
    task: TaskName
    data: TextSource
    eval: TextSource | None
    eval_limit: int | None
    output: Path | None
    targets: tuple[str, ...]
    heads: tuple[str, ...]
    rank: int
    alpha: float
    method: MethodName
    dropout: float
    base_dropout: bool
    steps: int | None
    epochs: float | None
    batch: int
    accumulate: int
    length: int
    lr: float
    schedule: Schedule
    warmup: float
    optimiser: Optimiser
    weight_decay: float
    clip: float
    seed: int
    device: str
    dtype: FloatType
    threads: int | None
    checkpointing: bool
    shard: bool
    evaluate_every: int | None
    patience: int | None
    snapshots: int | None
    spectra: bool
    save_every: int
    resume: bool
    overwrite: bool
    dry_run: bool

    def check(self) -> None:
        """Refuse what can be seen to be wrong without the model and the texts.

        Raises
        ------
        OptionError
            A value that its option does not allow, or two options that exclude each other.
        """
        for name, allowed in (
            ("task", TaskName),
            ("method", MethodName),
            ("schedule", Schedule),
            ("optimiser", Optimiser),
            ("dtype", FloatType),
        ):
            check_choice(name, getattr(self, name), get_args(allowed))
        counts = ("eval_limit", "rank", "steps", "batch", "accumulate", "length", "threads", "save_every")
        check_counts(**{name: getattr(self, name) for name in (*counts, "evaluate_every", "patience", "snapshots")})
        check_at_least("seed", self.seed, 0)
        if self.steps and self.epochs:
            raise OptionError("--steps and --epochs exclude each other", fix="give --steps or --epochs, not both")
        if self.epochs is not None and not 0 < self.epochs < 1e6:
            raise OptionError(f"--epochs {self.epochs} is no number of rounds", fix="give a positive number: 1, 0.5")
        if isfinite(self.alpha) and abs(self.alpha) > LARGEST:
            what = f"--alpha {self.alpha:g} is more than float32 holds"
            raise OptionError(what, fix="give a number like the rank: 16, 32")
        if self.spectra and not self.snapshots:
            raise OptionError("--spectra looks at snapshots", fix="say how often: --snapshots N")
        if self.spectra and isinstance(self.model, tuple):
            raise OptionError(
                "--spectra compares ΔW with the weights of a folder, and the model is an object",
                fix="give the path of its folder, or leave spectra out",
            )

    @property
    def places(self) -> dict[str, str | PathLike[str] | None]:
        """What is read, in words and where it is; a Hub id, a package, the name of a corpus and objects are nowhere."""
        inputs = {"the model": self.model, "the texts": self.data, "the texts to evaluate on": self.eval}
        return {
            what: source
            for what, source in inputs.items()
            if isinstance(source, str | PathLike) and source and Path(source).exists()
        }


@dataclass(frozen=True, slots=True, eq=False)
class TrainingInputs:
    """All that a run is made of.

    Attributes
    ----------
    learned, held_out : Texts
        The texts to learn from, and to evaluate on.
    examples, evaluated : Examples
        The same as tokens.
    heads : tuple of str
        The modules that are trained in full: the head of a classifier, and what the model's folder did not have.
    cut, evaluation_cut : Cut
        What was left out of the texts learned from, and of those evaluated on.
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
        """Say what was left out of the texts."""
        self.cut.warn(self.learned.name)
        if self.held_out and self.evaluation_cut:
            self.evaluation_cut.warn(self.held_out.name)


def read_training_inputs(options: TrainingOptions, *, device: str) -> TrainingInputs:
    """Read the data, load the model, and turn texts into tokens."""
    from loralens.training.tasks import task_named  # torch takes a second

    task = task_named(options.task)
    learned, held_out = read_data(options.data, options.eval, labelled=task.labelled)
    if task.labelled:  # a classifier that knows these labels goes on from what it knows
        own = labels_of(options.model)
        learned, held_out = learned.ordered(own), held_out and held_out.ordered(own)
    held_out = held_out.head(options.eval_limit) if held_out else None
    loaded = load_headed(
        options.model,
        task.head,
        device=device,
        dtype=options.dtype,
        threads=options.threads,
        seed=options.seed,
        labels=learned.labels if task.labelled else None,
    )
    encode = partial(loaded.encoded, length=options.length)
    with place(text_label(options.data)):
        examples = encode(learned.texts, labels=learned.numbers)
        _check_something_to_learn(task, examples)
    with place(text_label(options.data if options.eval is None else options.eval)):
        evaluated = encode(held_out.texts, labels=held_out.numbers) if held_out else None
    if task.head == CAUSAL:
        with place(model_label(options.model)):
            check_causal(loaded, examples)
    heads = heads_to_train(loaded.model, loaded.missing, classifier=task.labelled)
    # Counted apart from the examples, which hold only what was kept.
    cut = count_cut(loaded, learned.texts, length=options.length)
    held_out_cut = count_cut(loaded, held_out.texts, length=options.length) if held_out else None
    return TrainingInputs(task, loaded, learned, held_out, examples, evaluated, heads, cut, held_out_cut)


def _check_something_to_learn(task: "Task", examples: "Examples") -> None:
    """Refuse texts of which a task of language asks nothing."""
    if task.labelled:
        return
    if all(len(one) < 2 for one in examples.tokens):
        raise OptionError(
            "no text has two tokens, and one alone teaches nothing of what goes with it",
            fix="give longer texts, or a larger --length",
        )
    if not task.predicts_any(examples):
        raise OptionError(
            "no text has a token that can be hidden: all are special, or words that the tokenizer does not know",
            fix="give texts in the words of the tokenizer",
        )


def heads_to_train(model: "nn.Module", missing: Sequence[str], *, classifier: bool) -> tuple[str, ...]:
    """The modules to train in full: those of missing weights, and of a classifier what is not its encoder.

    What is tied to other weights (the decoder of a masked language model to its embedding) is left out.
    """
    names = [key.rpartition(".")[0] for key in missing]
    if classifier and (inner := getattr(model, "base_model_prefix", "")):
        names += [
            name for name, child in model.named_children() if name != inner and any(True for _ in child.parameters())
        ]
    return tuple(dict.fromkeys(part for name in names for part in _untied_modules(model, name)))


def _untied_modules(model: "nn.Module", name: str) -> list[str]:
    """A module, or the largest ones in it of which no parameter is also one of another module."""
    everywhere = model.named_parameters(remove_duplicate=False)
    outside = {id(parameter) for key, parameter in everywhere if not key.startswith(f"{name}.")}
    module = model.get_submodule(name)
    if not any(id(parameter) in outside for parameter in module.parameters()):
        return [name]
    children = [f"{name}.{child}" for child, inner in module.named_children() if any(True for _ in inner.parameters())]
    return [part for child in children for part in _untied_modules(model, child)]
