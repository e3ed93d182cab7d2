"""The functions that a run calls on the way, to evaluate, keep and save; the run itself neither prints nor writes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, final

from torch import nn

from loralens.core.adapter import Adapter
from loralens.core.training import State
from loralens.errors import OptionError
from loralens.training.number import as_int

FALLING = ("loss", "perplexity")  # of these, less is better; of all other measures, more


class Step(NamedTuple):
    """One update.

    ``number`` counts from 1; ``loss`` is the mean over the step's batches, before the update; ``lr`` is the course's
    learning rate; ``norm`` is that of the gradient before it was clipped; ``size`` says how many tokens (where a batch
    has an attention mask) or examples went in, on all processes, and ``seconds`` how long it took.
    """

    number: int
    loss: float
    lr: float
    norm: float
    size: int
    seconds: float


Measures = Mapping[str, float]  # loss, accuracy, perplexity … of held-out data


@final
@dataclass(frozen=True, slots=True)
class Watch:
    """What is called on the way, each every so many steps; 0: never. With several processes, the first one alone calls.

    Attributes
    ----------
    on_step : callable, optional
        Of a `Step`.
    evaluate : callable, optional
        From the model to measures by name; called before the first step and after the last as well, in evaluation
        mode, without gradients, and by every process.
    on_evaluation : callable, optional
        Of the number of steps done, and the measures.
    patience : int, optional
        Stop after so many evaluations in a row that were not better than the best, and keep the best.
    goal : str
        The measure that says what is better.
    snapshot : callable, optional
        Of the number of steps done, and the adapter as it then is.
    save : callable, optional
        Of the `State`, which a run can go on from.
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

    def __post_init__(self) -> None:
        for name in ("evaluate_every", "snapshot_every", "save_every"):
            self._check_count(name)
        if self.patience is not None:
            self._check_count("patience")
        if self.patience is not None and (self.evaluate is None or self.evaluate_every < 1 or self.patience < 1):
            raise OptionError(
                "stopping early needs evaluations on the way, and a patience of 1 or more",
                fix="give evaluate and evaluate_every, or leave patience out",
            )

    def _check_count(self, name: str) -> None:
        """Make a count Python's own; refuse what is none."""
        value = getattr(self, name)
        number = as_int(value)
        if number is None or number < 0:
            raise OptionError(f"{name} {value!r} is no whole number from 0 on", fix="give 1, 2 …, or 0 for never")
        object.__setattr__(self, name, number)

    def better(self, value: float, best: float | None) -> bool:
        """Whether a value of the goal is better than the best so far; NaN is not."""
        if best is None:
            return value == value
        return value < best if self.goal in FALLING else value > best
