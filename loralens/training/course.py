"""The course of a run, as data: how many steps, at which learning rate, and with which optimiser."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import cos, isfinite, pi
from typing import Any, Literal, final, get_args

import numpy as np

from loralens.errors import OptionError
from loralens.training.number import as_float, as_int

Optimiser = Literal["adamw", "sgd"]
Schedule = Literal["constant", "linear", "cosine"]
OPTIMISERS: tuple[Optimiser, ...] = get_args(Optimiser)
LARGE = 1e36  # also 16 times as much is a number of float32
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


@final
@dataclass(frozen=True, slots=True)
class Course:
    """All that decides how a run learns, but for the model, the data and the adapter.

    Attributes
    ----------
    steps : int
        Updates of the parameters.
    lr : float
        Highest learning rate. The default is ten times 5e-5, a rate that full fine-tuning is often given: LoRA's best
        is about ten times full fine-tuning's, and depends little on the rank (Schulman et al. 2025, "LoRA Without
        Regret").
    optimiser : str
        ``adamw`` (β 0.9 and 0.999, ε 1e-8), or ``sgd``, which is plain: for comparing runs, as its update is linear in
        the gradient.
    weight_decay : float
        Of ``adamw``, decoupled; on all that is trained.
    schedule : str
        After the warm-up: ``constant``, or ``linear`` or ``cosine`` down to 0 after the last step.
    warmup : float
        The part of the steps over which the rate rises from 0, in [0, 1).
    accumulate : int
        Batches to one step, on every process.
    clip : float
        Largest norm of the gradient; 0: any.
    base_dropout : bool
        Whether the model's own dropout is on. Without it the model runs as in evaluation; the adapter's dropout is its
        own.
    checkpointing : bool
        Activations of the model's blocks are computed again in the backward pass instead of kept.
    autocast : bool, optional
        Compute in bfloat16 where torch's autocast does; by default on CUDA, and nowhere else (on a CPU it is slower).
    """

    steps: int
    lr: float = 5e-4
    optimiser: Optimiser = "adamw"
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    warmup: float = 0.05
    accumulate: int = 1
    clip: float = 1.0
    base_dropout: bool = False
    checkpointing: bool = False
    autocast: bool | None = None

    def __post_init__(self) -> None:
        self._convert_fields()
        _require(self.steps >= 1, f"steps {self.steps!r} is no whole number from 1 on", "give 1 or more")
        _require(self.accumulate >= 1, f"accumulate {self.accumulate!r} is no whole number from 1 on", "give 1, 2 …")
        _require(isfinite(self.lr) and self.lr > 0, f"lr {self.lr!r} is no positive number", "give one: 1e-4, 5e-3")
        _require(self.lr < LARGE, f"lr {self.lr!r} is more than float32 can multiply by", "give one: 1e-4, 5e-3")
        _require(0 <= self.weight_decay < 1, f"weight_decay {self.weight_decay!r} is not in [0, 1)", "give 0, 0.01 …")
        _require(0 <= self.warmup < 1, f"warmup {self.warmup!r} is no part of the steps", "give one in [0, 1): 0.05")
        _require(isfinite(self.clip) and self.clip >= 0, f"clip {self.clip!r} is no norm", "give 1, or 0 for none")
        _require(
            self.optimiser in OPTIMISERS, f"{self.optimiser!r} is no optimiser", f"choose {_join_choices(OPTIMISERS)}"
        )
        _require(self.schedule in SCHEDULES, f"{self.schedule!r} is no schedule", f"choose {_join_choices(SCHEDULES)}")

    def _convert_fields(self) -> None:
        """Make every number Python's own, as JSON holds it; refuse what is none."""
        for name in ("steps", "accumulate"):
            self._convert_field(name, as_int, "is no whole number from 1 on", "give 1, 2 …")
        for name in ("lr", "weight_decay", "warmup", "clip"):
            self._convert_field(name, as_float, "is no number", "give one: 0.01")
        for name in ("base_dropout", "checkpointing", *(["autocast"] if self.autocast is not None else [])):
            self._convert_field(name, _as_bool, "is no truth value", "give True or False")

    def _convert_field(self, name: str, kind: Callable[[object], object], what: str, fix: str) -> None:
        value = getattr(self, name)
        number = kind(value)
        _require(number is not None, f"{name} {value!r} {what}", fix)
        object.__setattr__(self, name, number)

    def factor(self, step: int) -> float:
        """What the learning rate of a step is multiplied by; the first step is 0, and its factor is never 0."""
        # A warm-up of less than half a step is none.
        rising = round(self.warmup * self.steps)
        if step < rising:
            # Counted from 1, so that the first step learns too and the full rate comes with the first step after the
            # warm-up.
            return (step + 1) / (rising + 1)
        remaining = (self.steps - step) / (self.steps - rising)  # 1 at first, 1/(steps − rising) at the last step
        return {"constant": 1.0, "linear": remaining, "cosine": (1 - cos(pi * remaining)) / 2}[self.schedule]

    @property
    def record(self) -> dict[str, Any]:
        """The fields, as JSON holds them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _as_bool(value: object) -> bool | None:
    return bool(value) if isinstance(value, bool | np.bool_) else None


def _join_choices(names: tuple[str, ...]) -> str:
    return " or ".join((", ".join(names[:-1]), names[-1]))


def _require(fine: bool, what: str, fix: str) -> None:
    if not fine:
        raise OptionError(what, fix=fix)
