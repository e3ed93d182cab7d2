"""The methods of LoRA training: five independent axes, and the names of common combinations in `METHODS`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, final, get_args

from loralens.choices import ScaleRule, StartName
from loralens.core.names import row_named
from loralens.core.scaling import ScaleFormula
from loralens.errors import OptionError
from loralens.training.course import as_float

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
    name, text, paper : str
        The name of the method, what it does in one line, and the paper that describes it.
    scale_rule : str
        How the scale follows from α and r: ``lora`` (α/r) or ``rslora`` (α/√r).
    start : str
        How the first factors are made: one is drawn and the other is 0 (``kaiming``, ``gaussian``); or both come from W
        (``pissa``, ``olora``) or from the first gradient (``lora-ga``); see `loralens.training.starts`.
    magnitude : bool
        Whether every output has a trained length: W' = m · (W + ΔW)/‖W + ΔW‖, see `loralens.training.layers.dora`.
    frozen : bool
        Whether A (for embeddings the B that is drawn at random) is not trained.
    ratio : float
        The learning rate of B divided by that of A.
    """

    name: str
    text: str
    paper: str
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
    TrainingMethod("lora", "W + (α/r)·B·A", "Hu et al. 2021, arXiv:2106.09685"),
    TrainingMethod("rslora", "the scale is α/√r", "Kalajdzievski 2023, arXiv:2312.03732", scale_rule="rslora"),
    # 2⁴ is the ratio that the paper suggests as a default.
    TrainingMethod("lora+", "B learns 16 times as fast as A", "Hayou et al. 2024, arXiv:2402.12354", ratio=16.0),
    TrainingMethod(
        "dora", "the length of every output is trained separately", "Liu et al. 2024, arXiv:2402.09353", magnitude=True
    ),
    TrainingMethod(
        "pissa",
        "the pair starts as the leading singular directions of W",
        "Meng et al. 2024, arXiv:2404.02948",
        start="pissa",
    ),
    TrainingMethod("olora", "the pair starts as Q and R of W", "Büyükakyüz 2024, arXiv:2406.01775", start="olora"),
    TrainingMethod(
        "lora-ga",
        "the pair starts along the gradient of the first step",
        "Wang et al. 2024, arXiv:2407.05000",
        start="lora-ga",
    ),
    TrainingMethod("frozen-a", "only B is trained", "Zhang et al. 2023, arXiv:2308.03303", frozen=True),
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
    axes: dict[str, Any] = {
        "scale_rule": _one_of("scale_rule", scale_rule, get_args(ScaleRule)),
        "start": _one_of("start", start, get_args(StartName)),
        "magnitude": _flag("magnitude", magnitude),
        "frozen": _flag("freeze_a", freeze_a),
        "ratio": _ratio(lr_ratio),
    }
    method = replace(row, **{axis: value for axis, value in axes.items() if value is not None})
    if method == row:
        return row
    same = next((other for other in METHODS if _axes(other) == _axes(method)), None)
    if same is not None:
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
    papers = "; ".join(other.paper for other in METHODS if other.name in named)
    return replace(method, name=", ".join(named) or "lora", text=" and ".join(named) or row.text, paper=papers)


def _axes(method: TrainingMethod) -> tuple[Any, ...]:
    return tuple(getattr(method, axis) for axis in AXES)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> object:
    if value is not None and value not in allowed:
        raise OptionError(f"{name} {value!r} does not exist", fix=f"choose one of {', '.join(allowed)}")
    return value


def _flag(name: str, value: object) -> object:
    if value is not None and not isinstance(value, bool):
        raise OptionError(f"{name} {value!r} is not True or False", fix="give True or False")
    return value


def _ratio(value: object) -> float | None:
    if value is None:
        return None
    ratio = as_float(value)
    if ratio is None or not isfinite(ratio) or not 0 < ratio <= MOST_RATIO:
        what = f"lr_ratio {value!r} is not a positive number up to {MOST_RATIO:g}"
        raise OptionError(what, fix="give the learning rate of B divided by that of A, such as 16")
    return ratio
