"""The functions that a run calls during training. The run itself neither prints nor writes anything."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, NamedTuple, Protocol, final, runtime_checkable

from torch import nn

from loralens.core.adapter import Adapter
from loralens.core.training import State
from loralens.errors import OptionError
from loralens.training.number import as_int

if TYPE_CHECKING:  # the layers know nothing of a watch
    from loralens.training.injection import Injection

# Every other measure, such as an accuracy, is better if it is larger.
FALLING = ("loss", "perplexity")


class Step(NamedTuple):
    """One update of the parameters.

    ``number`` counts from 1. ``loss`` is the mean over the terms of the step before the update (over its batches if the
    loss function returns means), ``lr`` the learning rate of the course, ``norm`` the norm of the gradient before it
    was clipped. ``size`` is the number of tokens (of examples, if batches have no attention mask) on all processes, and
    ``seconds`` the duration of the step.
    """

    number: int
    loss: float
    lr: float
    norm: float
    size: int
    seconds: float


@runtime_checkable
class AdapterWatcher(Protocol):
    """What looks at the adapter during a run: `loralens.watching.Watcher` does.

    If the model is divided, every process calls its methods, since each factor is gathered; otherwise only the first.
    """

    def watch(self, model: "Injection") -> None:
        """Take the layers as they are before training, also if a run is resumed: the state is restored afterwards."""

    def begin(self, step: int) -> object:
        """Look before the first step of this call; ``step`` steps were done before."""

    def step(self, *, final: bool = False) -> object:
        """Count a step of the optimiser, and look if it is time, or if it is the last; the gradients are there."""


Measures = Mapping[str, float]  # the loss, accuracy, perplexity … of held-out data


@final
@dataclass(frozen=True, slots=True)
class Watch:
    """Functions that a run calls every so many steps; 0 means never. Of several processes only the first calls them.

    Attributes
    ----------
    on_step : callable, optional
        Called with the `Step` after every step.
    evaluate : callable, optional
        Takes the model and returns measures by name. It is also called before the first and after the last step, in
        evaluation mode and without gradients, and by every process.
    on_evaluation : callable, optional
        Called with the number of steps done and the measures.
    patience : int, optional
        The number of evaluations in a row without an improvement after which the run stops and returns to the best.
    goal : str
        The measure that decides what is an improvement.
    snapshot : callable, optional
        Called with the number of steps done and the adapter at that step.
    save : callable, optional
        Called with the `State`, from which a run can be resumed; also after the last step, so that a finished run can
        go on with more steps.
    watcher : AdapterWatcher, optional
        Looks at the adapter before the first step, every so many steps, and after the last:
        ``Watcher(every=50, log="run.jsonl")`` of `loralens.watching`.
    stop : callable, optional
        Asked after every step, and by every process. If one of them gets the answer True, the state is saved and the
        run ends, as a run does that is to be resumed.

    Raises
    ------
    OptionError
        A number of steps is not a whole number; there is a ``patience`` without evaluations during training; the
        ``watcher`` is none.
    """

    on_step: Callable[[Step], None] | None = None
    evaluate: Callable[[nn.Module], Measures] | None = None
    on_evaluation: Callable[[int, Measures], None] | None = None
    evaluate_every: int = 0
    patience: int | None = None
    goal: str = "loss"
    snapshot: Callable[[int, Adapter], None] | None = None
    snapshot_every: int = 0
    save: Callable[[State], None] | None = None
    save_every: int = 0
    watcher: AdapterWatcher | None = None
    stop: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        counts = ("evaluate_every", "snapshot_every", "save_every")
        for name in (*counts, *(["patience"] if self.patience is not None else [])):
            value = getattr(self, name)
            number = as_int(value)
            if number is None or number < 0:
                raise OptionError(
                    f"{name} {value!r} is not a whole number of 0 or more", fix="give 1, 2 …, or 0 for never"
                )
            object.__setattr__(self, name, number)  # the dataclass is frozen, and NumPy's numbers become Python's
        if self.watcher is not None and not isinstance(self.watcher, AdapterWatcher):
            raise OptionError(
                f"watcher {self.watcher!r} is not a Watcher", fix="give watcher=loralens.watching.Watcher(every=50)"
            )
        # The first and the last evaluation alone would come too late to stop anything.
        if self.patience is not None and (self.evaluate is None or self.evaluate_every < 1 or self.patience < 1):
            raise OptionError(
                "patience needs evaluations during training, and has to be 1 or more",
                fix="give evaluate and evaluate_every, or leave patience out",
            )

    def better(self, value: float, best: float | None) -> bool:
        """Whether a value of the goal is better than the best so far; NaN never is."""
        if best is None:
            return not isnan(value)
        # Strictly better, so that patience ends also if the measure stays the same.
        return value < best if self.goal in FALLING else value > best
