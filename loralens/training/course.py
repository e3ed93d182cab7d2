"""What decides how a run learns: its course with the optimiser, and the method, a combination of five axes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from math import cos, inf, pi
from numbers import Integral, Real
from typing import Any, cast, final, get_args

import torch
from torch.optim import SGD, AdamW, Optimizer

from loralens.choices import Optimiser, ScaleRule, Schedule, StartName
from loralens.core.lowrank import ScaleFormula
from loralens.core.names import row_named
from loralens.errors import OptionError


def as_int(value: object) -> int | None:
    """A whole number of any type as an int; None for everything else, truth values included."""
    # bool is a subclass of int, but rank=True is a mistake.
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def as_float(value: object) -> float | None:
    """A real number of any type as a float; None for everything else, truth values included."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    # An int of Python may be larger than the largest float64.
    except OverflowError:
        return None


# LoRA+ multiplies the rate of B, and the optimisers of torch compute in float32, whose largest number is 3.4e38.
LARGE = 1e36
ADAM = ("beta1", "beta2", "epsilon")  # fields of a course that are options of AdamW
DEFAULTS = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}  # of torch


# Names of fields, the type and the range of their values, and what a message says of these.
LIMITS: tuple[tuple[tuple[str, ...], Callable[[object], Any], Callable[[Any], bool], str, str], ...] = (
    (("steps", "accumulate"), as_int, lambda n: n >= 1, "a whole number of 1 or more", "give 1, 2 …"),
    (("lr",), as_float, lambda x: 0 < x < LARGE, f"a number between 0 and {LARGE:g}", "give 1e-4, 5e-3 …"),
    (("weight_decay", "warmup"), as_float, lambda x: 0 <= x < 1, "a number in [0, 1)", "give 0, 0.05 …"),
    (("beta1", "beta2"), as_float, lambda x: 0 <= x < 1, "a number in [0, 1)", "give 0.9, 0.999 …"),
    (("epsilon",), as_float, lambda x: 0 < x < 1, "a number between 0 and 1", "give 1e-8, 1e-6 …"),
    (("clip",), as_float, lambda x: 0 <= x < inf, "a norm", "give 1, or 0 for no clipping"),
)


@final
@dataclass(frozen=True, slots=True)
class Course:
    """Everything that decides how a run learns, except for the model, the data and the adapter.

    Attributes
    ----------
    steps : int
        Number of updates of the parameters.
    lr : float
        Highest learning rate. The default is ten times 5e-5, which is a common rate for full fine-tuning: the best rate
        for LoRA is about ten times that of full fine-tuning and hardly depends on the rank (Schulman et al. 2025, "LoRA
        Without Regret").
    optimiser : str
        ``adamw``; ``sgd`` without momentum, whose update is linear in the gradient, so that runs can be compared up to
        rounding; ``muon`` of torch for the factors, beside AdamW for everything else.
    weight_decay : float
        The decoupled weight decay of ``adamw`` and ``muon``, in [0, 1). It applies to all parameters that are trained.
    beta1, beta2, epsilon : float
        The β₁, β₂ and ε of AdamW.
    schedule : str
        The learning rate after the warm-up: ``constant``, or ``linear`` or ``cosine``, which reach 0 after the last
        step.
    warmup : float
        The share of the steps, in [0, 1), over which the learning rate rises from 0.
    accumulate : int
        Number of batches in one step, on every process.
    clip : float
        The norm above which the gradient is scaled down; 0 never scales it.
    base_dropout : bool
        Whether the model's own dropout is switched on. Without it the model computes as in evaluation; the dropout of
        the adapter is separate.
    checkpointing : bool
        Whether the activations of the model's blocks are computed again in the backward pass instead of being kept.
    autocast : bool, optional
        Whether to compute in 16 bits under torch's autocast: in bfloat16, or in float16 if the weights are that or the
        GPU has no bfloat16. By default only on CUDA: on a CPU it is slower.

    Raises
    ------
    OptionError
        A field has a value that is not of its type or not in its range.
    """

    steps: int
    lr: float = 5e-4
    optimiser: Optimiser = "adamw"
    weight_decay: float = 0.0  # decay of the factors pulls ΔW towards 0, not W + ΔW
    # A constant rate and a short warm-up are that paper's recipe.
    schedule: Schedule = "constant"
    warmup: float = 0.05
    accumulate: int = 1
    clip: float = 1.0  # the default of transformers' Trainer
    base_dropout: bool = False
    checkpointing: bool = False
    autocast: bool | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        for names, kind, allows, what, fix in LIMITS:
            for name in names:
                number = kind(value := getattr(self, name))
                if number is None or not allows(number):
                    raise OptionError(f"{name} {value!r} is not {what}", fix=fix)
                object.__setattr__(self, name, number)  # the dataclass is frozen, and JSON holds Python's own numbers
        for name, choices in (("optimiser", get_args(Optimiser)), ("schedule", get_args(Schedule))):
            _one_of(name, getattr(self, name), choices)
        # An option without effect would look as if it had one.
        for name in ADAM if self.optimiser not in ("adamw", "muon") else ():
            if getattr(self, name) != DEFAULTS[name]:
                raise OptionError(f"{name} is an option of AdamW, and not of {self.optimiser}", fix=f"leave {name} out")

    def factor(self, step: int) -> float:
        """The factor of the learning rate in a step, where the first step is 0; it is in (0, 1]."""
        # The number is rounded, so a warm-up of less than half a step has no step.
        rising = round(self.warmup * self.steps)
        if step < rising:
            # The first step has the factor 1/(rising + 1) and not 0, so that it learns too.
            return (step + 1) / (rising + 1)
        # It falls from 1 to 1/(steps − rising) in the last step, and not to 0, so that the last step learns too.
        remaining = (self.steps - step) / (self.steps - rising)
        return {"constant": 1.0, "linear": remaining, "cosine": (1 - cos(pi * remaining)) / 2}[self.schedule]

    @property
    def record(self) -> dict[str, Any]:
        """The fields, as JSON holds them."""
        # Options of AdamW that have its defaults are left out, as in the records of older releases.
        always = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ADAM}
        other = {name: getattr(self, name) for name in ADAM if getattr(self, name) != DEFAULTS[name]}
        return always | other


Groups = list[dict[str, Any]]
FACTORS = ("A", "B")  # the names of the groups whose parameters are matrices of pairs


def make_optimiser(groups: Groups, course: Course, *, device: torch.device, shard: bool = False) -> Optimizer:
    """The optimiser of a course for the parameter groups of an injection.

    Raises
    ------
    OptionError
        This torch has no Muon.
    """
    if course.optimiser == "sgd":
        return SGD(groups, lr=course.lr)
    # One kernel for all parameters on a GPU of CUDA. Not for shards, which not every torch can fuse; there torch itself
    # updates all parameters together (foreach). On a CPU the numbers stay those of torch's plain loop.
    adamw = partial(
        AdamW,
        lr=course.lr,
        betas=(course.beta1, course.beta2),
        eps=course.epsilon,
        weight_decay=course.weight_decay,
        fused=True if device.type == "cuda" and not shard else None,
    )
    return adamw(groups) if course.optimiser == "adamw" else _muon(groups, course, adamw)


def _muon(groups: Groups, course: Course, adamw: Callable[[Groups], Optimizer]) -> Optimizer:
    """Muon for the factors, and AdamW for magnitudes and heads, which are no matrices that it is meant for."""
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        what = f"torch {torch.__version__} has no Muon"
        raise OptionError(what, fix="install torch 2.9 or newer, or choose --optimiser adamw")
    factors = [group for group in groups if group["name"] in FACTORS]
    other_groups = [group for group in groups if group["name"] not in FACTORS]
    # Steps of the length that AdamW's have, so that one learning rate serves both.
    first = muon(factors, lr=course.lr, weight_decay=course.weight_decay, adjust_lr_fn="match_rms_adamw")
    if not other_groups:
        return cast(Optimizer, first)
    return Together([first, adamw(other_groups)])


class Together(Optimizer):
    """Several optimisers as one: each updates its own parameters."""

    def __init__(self, optimisers: Sequence[Optimizer]) -> None:
        self.optimisers = list(optimisers)
        super().__init__([group for one in self.optimisers for group in one.param_groups], {})
        # The groups themselves, since each optimiser reads the learning rate of its own.
        self.param_groups = [group for one in self.optimisers for group in one.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take a step with each."""
        for optimiser in self.optimisers:
            optimiser.step(closure)


def optimisers_of(optimiser: Optimizer) -> list[Optimizer]:
    """The optimisers that are one, or the optimiser itself."""
    return getattr(optimiser, "optimisers", [optimiser])


FORMULAS: Mapping[ScaleRule, ScaleFormula] = {"lora": "alpha/r", "rslora": "alpha/sqrt(r)"}
# The starts whose product B₀A₀ is not 0. It is subtracted in the forward pass, so that the model starts as it is.
SUBTRACTED: tuple[StartName, ...] = ("pissa", "olora", "lora-ga")
MOST_RATIO = 1e6  # of two learning rates; times the largest rate of a course it is below the largest float32


@final
@dataclass(frozen=True, slots=True)
class TrainingMethod:
    """A combination of the axes in which methods of LoRA training differ.

    Attributes
    ----------
    name : str
    scale_rule : str
        How the scale follows from α and r: ``lora`` (α/r) or ``rslora`` (α/√r).
    start : str
        How the first factors are made: one is drawn and the other is 0 (``kaiming``, ``gaussian``); or both come from W
        (``pissa``, ``olora``) or from the first gradient (``lora-ga``); see `loralens.training.initialisation`.
    magnitude : bool
        Whether every output has a trained length: W' = m · (W + ΔW)/‖W + ΔW‖, see `loralens.training.layers`.
    frozen : bool
        Whether A (for embeddings the B that is drawn at random) is not trained.
    ratio : float
        The learning rate of B divided by that of A.
    """

    name: str
    scale_rule: ScaleRule = "lora"
    start: StartName = "kaiming"
    magnitude: bool = False
    frozen: bool = False
    ratio: float = 1.0

    @property
    def formula(self) -> ScaleFormula:
        """The formula of the scale."""
        return FORMULAS[self.scale_rule]

    @property
    def subtracted(self) -> bool:
        """Whether the pair does not start with the product 0, so that its start is subtracted."""
        return self.start in SUBTRACTED


METHODS: tuple[TrainingMethod, ...] = (
    TrainingMethod("lora"),  # Hu et al. 2021, arXiv:2106.09685
    TrainingMethod("rslora", scale_rule="rslora"),  # Kalajdzievski 2023, arXiv:2312.03732
    # Hayou et al. 2024, arXiv:2402.12354, whose suggested default is 2⁴.
    TrainingMethod("lora+", ratio=16.0),
    TrainingMethod("dora", magnitude=True),  # Liu et al. 2024, arXiv:2402.09353
    TrainingMethod("pissa", start="pissa"),  # Meng et al. 2024, arXiv:2404.02948
    TrainingMethod("olora", start="olora"),  # Büyükakyüz 2024, arXiv:2406.01775
    TrainingMethod("lora-ga", start="lora-ga"),  # Wang et al. 2024, arXiv:2407.05000
    TrainingMethod("frozen-a", frozen=True),  # Zhang et al. 2023, arXiv:2308.03303
)
AXES = ("scale_rule", "start", "magnitude", "frozen", "ratio")


def training_method(
    name: str = "lora",
    *,
    scale_rule: str | None = None,
    start: str | None = None,
    magnitude: bool | None = None,
    lr_ratio: float | None = None,
    freeze_a: bool | None = None,
) -> TrainingMethod:
    """The method of this name, with the given axes in place of its own.

    If a row of `METHODS` has the same axes, the result is that row. Otherwise the name lists what differs from plain
    LoRA: ``rslora, dora``. A Gaussian start has no name, since the record of a run names the start by itself.

    Raises
    ------
    OptionError
        There is no such method, or an axis has no such value.
    """
    # Python may pass anything; the error message quotes it.
    row = row_named(name if isinstance(name, str) else repr(name), METHODS, "training method")
    for axis, value, choices in (
        ("scale_rule", scale_rule, get_args(ScaleRule)),
        ("start", start, get_args(StartName)),
        ("magnitude", magnitude, (True, False)),
        ("freeze_a", freeze_a, (True, False)),
    ):
        if value is not None:
            _one_of(axis, value, choices)
    ratio = None if lr_ratio is None else as_float(lr_ratio) or 0.0
    if ratio is not None and not 0 < ratio <= MOST_RATIO:
        what = f"lr_ratio {lr_ratio!r} is not a positive number up to {MOST_RATIO:g}"
        raise OptionError(what, fix="give the learning rate of B divided by that of A, such as 16")
    axes = (scale_rule, start, magnitude, freeze_a, ratio)
    given = {axis: value for axis, value in zip(AXES, axes, strict=True) if value is not None}
    method = replace(row, **given)  # type: ignore[arg-type]
    for same in (row, *METHODS):
        if all(getattr(same, axis) == getattr(method, axis) for axis in AXES):
            return same
    rate = f"lora+{method.ratio:g}" if method.ratio != 16 else "lora+"
    parts = {
        "rslora": method.scale_rule == "rslora",
        method.start: method.subtracted,
        "dora": method.magnitude,
        rate: method.ratio != 1,
        "frozen-a": method.frozen,
    }
    named = [part for part, differs in parts.items() if differs]
    return replace(method, name=", ".join(named) or "lora")


def _one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise OptionError(f"{name} {value!r} does not exist", fix=f"choose one of {', '.join(map(str, allowed))}")
