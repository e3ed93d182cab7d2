"""The verb ``evaluate``: measures the quality of a model on held-out texts, with each of several adapters."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from loralens.choices import FloatType, TaskName
from loralens.core.adapter import Adapter
from loralens.core.attached import Attachment
from loralens.core.messages import progress, warn
from loralens.core.names import some
from loralens.core.stored import record_of
from loralens.errors import OptionError, place
from loralens.exports import takes_options
from loralens.formats.files.atomic import check_write_target
from loralens.formats.records.results import write_evaluation
from loralens.tables.numbers import count, number
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Keys, Table, rows_key
from loralens.verbs.models.loaded import Loaded
from loralens.verbs.models.models import ModelSource, in_floats, labels_of, load_headed, model_label, restore_settings
from loralens.verbs.models.texts import Texts, TextSource, read_data, text_label
from loralens.verbs.models.tokens import CAUSAL, DEFAULT_LENGTH, Cut, check_causal, count_cut
from loralens.verbs.shared.adapters import Source, labels, read_adapter, sources
from loralens.verbs.shared.options import Reading, check_choice, check_counts
from loralens.version import __version__

if TYPE_CHECKING:  # torch takes a second
    from loralens.training.tasks import Task


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One row: the measures of the model with an adapter.

    Attributes
    ----------
    path : str or None
        The name of the adapter; None for the model without one.
    measures : mapping of str to float
        ``loss``, ``accuracy`` and, for language models, ``perplexity``; NaN if there is nothing to predict.
    parameters : int or None
        The number of parameters in the pairs of the adapter.
    """

    path: str | None
    measures: Mapping[str, float]
    parameters: int | None = None


@dataclass(frozen=True, slots=True, repr=False)
class EvaluationResult(Tabular):
    """The quality of a model on a task, with each of several adapters.

    ``result["a"]`` gives the measures of the adapter ``a``.

    Attributes
    ----------
    texts : int
        The number of texts.
    evaluations : sequence of Evaluation
        The measures of each adapter, in the order in which they were given.
    cuts : sequence of Cut
        What was cut off the texts, for each length to which they were cut.
    output : Path or None
        The file that was written.
    """

    model: str
    task: str
    data: str
    texts: int
    evaluations: Sequence[Evaluation]
    cuts: Sequence[Cut]
    output: Path | None = None

    def __getitem__(self, path: str | None) -> Mapping[str, float]:
        for evaluation in self.evaluations:
            if evaluation.path == path:
                return evaluation.measures
        raise KeyError(path)

    def conclusion(self) -> list[str]:
        """The measures of the best adapter, or of the only version."""
        # Accuracy is what a task is about where there is one; every task has a loss, and less of it is better.
        accurate = all("accuracy" in each.measures for each in self.evaluations)
        finite = [each for each in self.evaluations if isfinite(each.measures["accuracy" if accurate else "loss"])]
        on = f"On {count(self.texts, 'text')} of {self.data}"
        if not finite:
            return [f"{on} there is nothing to measure."]
        best = max(finite, key=lambda row: row.measures["accuracy"] if accurate else -row.measures["loss"])
        names = ("accuracy", *(name for name in best.measures if name != "accuracy")) if accurate else best.measures
        measured = ", ".join(f"{name} {number(best.measures[name])}" for name in names)
        who = f"{self.model} as it is" if best.path is None else best.path
        return [f"{on}, {who} {'is best:' if len(self.evaluations) > 1 else 'has'} {measured}."]

    def tables(self) -> list[Table[Evaluation]]:
        """One table with a row for each adapter."""
        title = f"{self.model}, {self.texts} texts of {self.data}"
        return [quality_table(title, self.evaluations)]

    def sentences(self) -> list[str]:
        """The file that was written."""
        return [f"Wrote {self.output}."] if self.output else []

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "model",
            "task",
            "data",
            "texts",
            Column("cut", "cuts"),
            rows_key("adapters", (ADAPTER, PARAMETERS, "*"), Evaluation, "tables.0"),
        )


ADAPTER: Column[Evaluation] = Column(
    "path",
    "path",
    "adapter",
    lambda path: "(the model as it is)" if path is None else path,
    align="left",
    priority=ALWAYS,
)


# For machines and for pages; on a terminal the names of the measures need the room.
PARAMETERS: Column[Evaluation] = Column("parameters")


def quality_table(title: str, evaluations: Sequence[Evaluation]) -> Table[Evaluation]:
    """Adapters and their measures, which are those of the first."""
    return Table(title, (ADAPTER, PARAMETERS, *map(_measure_column, evaluations[0].measures)), evaluations)


def _measure_column(measure: str) -> Column[Evaluation]:
    return Column(measure, f"measures.{measure}", measure, number, priority=ALWAYS)


@takes_options
def evaluate(
    *adapters: Source,
    model: ModelSource,
    task: TaskName,
    data: TextSource,
    output: str | PathLike[str] | None = None,
    limit: int | None = None,
    batch: int = 64,
    length: int | None = None,
    device: str = "auto",
    dtype: FloatType = "f32",
    threads: int | None = None,
    overwrite: bool = False,
    reading: Reading,
) -> EvaluationResult:
    """Measure loss, accuracy and, for language models, perplexity: with each adapter, or without any.

    The labels of a classifier are taken from the adapter if it states them, else from the model if it knows the labels
    of the texts, else from the texts, sorted.

    Parameters
    ----------
    *adapters : path, Adapter or model
        Without any, the model itself is measured.
    model : path or (model, tokenizer)
        The base model: a transformers folder, a GGUF file, a Hub id in the local cache, or an installed package.

        The base: a transformers folder, a Hub id in the local cache, or a package; or a model of transformers and its
        tokenizer, which is left as it was. Beside adapters, quantised weights of a folder are decoded.
    task : str
        The task that is measured.
    data : path or iterable
        The texts, in a file as train reads it.

        Texts as for `loralens.train`.
    output : path, optional
        Also write the result to this .json file, for `report --evaluations`.
    limit : int, optional
        Use only the first N texts.
    batch : int
        The number of texts that the model sees at a time.
    length : int, optional
        The number of tokens after which a text is cut. [default: as the adapter was trained, else 256]
    device : str
        The device that runs the model: cpu, cuda, cuda:1, mps …, or auto for a GPU if there is one.
    dtype : str
        The dtype of the model's weights, in which it computes.
    threads : int, optional
        The number of CPU threads. [default: all that the process may use]
    overwrite : bool
        Replace what is already at the output path.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        The task, the device or the dtype does not exist; a file does not exist; torch is not installed; a text has a
        label that was not trained.
    FormatError
        An adapter, a model or texts cannot be read.
    MismatchError
        The adapter or the task does not fit the model.

    Examples
    --------
    $ loralens evaluate adapter --model model --task causal-lm --data texts.txt
    """
    check_choice("task", task, get_args(TaskName))
    check_counts(limit=limit, batch=batch, length=length, threads=threads)
    target = None if output is None else Path(output)
    # The target is checked before the model runs, which may take minutes.
    if target:
        _check_target(target, adapters, model, data, overwrite=overwrite)
    with restore_settings(model):
        from loralens.training.tasks import task_named  # torch takes a second

        row = task_named(task)
        texts, _ = read_data(data, labelled=row.labelled, one_label=True, dialogues=row.head == CAUSAL)
        texts = texts.head(limit)
        chosen = sources(adapters) if adapters else []
        names = labels(chosen)
        # A model that is an object has no files with which an adapter could be compared.
        base = None if isinstance(model, tuple) else model
        adapted = [
            read_adapter(source, reading, base=base, applies_all=True, label=name)
            for source, name in zip(chosen, names, strict=True)
        ]
        loading = {"device": device, "dtype": dtype, "threads": threads}
        evaluator = _Evaluator(model, row, texts, text_label(data), batch, length, loading)
        # Without adapters the model itself is measured, as one version.
        versions: list[tuple[str | None, Adapter | None]] = [*zip(names, adapted, strict=True)] or [(None, None)]
        with progress("evaluating", len(versions) * len(texts.texts)) as step:
            measured = [evaluator.measure(adapter, step) for _, adapter in versions]
    # Adapters that were trained with one length share a cut, of which the user is told once.
    cuts = list(dict.fromkeys(cut for _, cut in measured))
    for cut in cuts:
        cut.warn(texts.name)
    evaluations = [
        Evaluation(path, measures, adapter.parameters if adapter else None)
        for (path, adapter), (measures, _) in zip(versions, measured, strict=True)
    ]
    result = EvaluationResult(model_label(model), row.name, texts.name, len(texts.texts), evaluations, cuts, target)
    if target:
        write_evaluation({"loralens": __version__, **result.record()}, target)
    return result


def _check_target(
    target: Path, adapters: Sequence[Source], model: ModelSource, data: TextSource, *, overwrite: bool
) -> None:
    """Refuse a file that exists, or that is an input or lies inside one."""
    paths = [Path(source) for source in (*adapters, model, data) if isinstance(source, str | PathLike)]
    # The name of a package is not a path, and cannot be overwritten.
    inputs = [(str(path), path) for path in paths if path.exists()]
    with place(target):
        check_write_target(target, inputs, folder=False, overwrite=overwrite)


@dataclass(eq=False)
class _Evaluator:
    """A task on texts, and a model that is measured with one adapter after the other.

    Attributes
    ----------
    place : str
        The name of the texts in messages.
    batch, length
        The options of `evaluate`.
    loading : mapping
        Its options that say how a model is loaded.
    """

    model: ModelSource
    task: "Task"
    texts: Texts
    place: str
    batch: int
    length: int | None
    loading: Mapping[str, Any]
    # The loaded models by labels: adapters with other labels need another head, so the model is loaded again for them.
    _loaded: dict[tuple[str, ...] | None, Loaded] = field(default_factory=dict)

    def measure(self, adapter: Adapter | None, step: Callable[[int], None] | None) -> tuple[Mapping[str, float], Cut]:
        """The measures of the model with an adapter, and what was cut off the texts."""
        import torch

        label = model_label(self.model)
        record = (record_of(adapter) if adapter else None) or {}
        labels = self._labels(record.get("labels") or ()) if self.task.labelled else None
        if labels not in self._loaded:
            # Adapters are not applied to codes. Without any, the quantised model itself is measured.
            source = in_floats(self.model) if adapter else self.model
            self._loaded[labels] = load_headed(source, self.task.head, labels=labels, **self.loading)
        loaded = self._loaded[labels]
        # The default is the length of the training, so that texts are cut as they were there.
        length = self.length or record.get("length") or DEFAULT_LENGTH
        with place(self.place):
            numbers = None if labels is None else self.texts.label_numbers(labels)
            examples = loaded.encode(self.texts.texts, length=length, labels=numbers)
            cut = count_cut(loaded, self.texts.texts, length=length)
        with place(label):
            # With a model that sees later tokens the loss would be close to 0.
            if self.task.head == CAUSAL:
                check_causal(loaded, examples)
            attachment = Attachment(loaded.model, adapter) if adapter else None
        for key, why in attachment.left_out.items() if attachment else ():
            warn(f"{label}: {key} is not applied ({why})")
        # Measures of a random head look like those of a bad adapter.
        random = loaded.random(attachment.replaced if attachment else ())
        if random:
            neither = "neither the model nor the adapter has" if adapter else "the model does not have"
            warn(
                f"{label}: {neither} {some(sorted(random), 1)}: random here",
                "do not rely on numbers that depend on them; give an adapter with its head",
            )
        evaluation = self.task.evaluation(examples, size=self.batch, step=step)
        # The adapter is attached by hooks for the evaluation only, so that the same model serves the next one.
        with torch.no_grad(), attachment.on() if attachment else nullcontext():
            return dict(evaluation(loaded.model)), cut

    def _labels(self, trained: Sequence[str]) -> tuple[str, ...]:
        """The labels in the order of the head: those of the adapter, of the classifier, or of the texts, sorted."""
        own = labels_of(self.model)
        labels = tuple(trained) or (own if set(self.texts.labels) <= set(own) else self.texts.labels)
        if len(labels) < 2:
            raise OptionError(
                f"{self.place}: all texts have the label {labels[0]!r}, and the other labels are not known",
                fix="give texts of at least two labels, or an adapter that was trained on them",
            )
        return labels
