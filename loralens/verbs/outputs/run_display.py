"""The progress of a training run as text, for whoever displays it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import isfinite, nan
from typing import TYPE_CHECKING

from loralens.core.messages import note

if TYPE_CHECKING:
    from loralens.training.watch import Step

# Few enough for a log file, and often enough to see that the run goes on.
PARTS = 10  # of a run, after each of which a line says how it goes
# An average over about ten steps: the loss of single batches jumps.
SMOOTH = 0.9  # weight of the past in the loss and in the speed that are shown


class RunDisplay:
    """Lines about a run, given as notes: steps after each tenth of the run, and whatever else there is to say.

    Parameters
    ----------
    steps : int
        How many updates the run has.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._loss = self._tokens = self._seconds = 0.0
        self._weight = self._loss_weight = 0.0

    def step(self, step: "Step") -> None:
        """Take note of a step, and display it if it is time."""
        self._weight = SMOOTH * self._weight + (1 - SMOOTH)
        if isfinite(step.loss):  # a step that asked nothing has none
            self._loss_weight = SMOOTH * self._loss_weight + (1 - SMOOTH)
            self._loss = SMOOTH * self._loss + (1 - SMOOTH) * step.loss
        self._tokens = SMOOTH * self._tokens + (1 - SMOOTH) * step.size / max(step.seconds, 1e-9)
        self._seconds = SMOOTH * self._seconds + (1 - SMOOTH) * step.seconds
        self.show(step)

    def show(self, step: "Step") -> None:
        """Display a step after each tenth of the run."""
        if step.number % max(1, self.steps // PARTS) == 0 or step.number == self.steps:
            self.say(self.text(step))

    def text(self, step: "Step") -> str:
        """A step in words: number, loss, rate, speed, and the time that is left."""
        tokens, seconds = (value / self._weight for value in (self._tokens, self._seconds))
        loss = self._loss / self._loss_weight if self._loss_weight else nan
        remaining = _clock((self.steps - step.number) * seconds)
        speed = f"{tokens:,.0f} tokens/s  {remaining} left"
        return f"step {step.number}/{self.steps}  loss {loss:.3f}  lr {step.lr:.1e}  {speed}"

    def say(self, text: str) -> None:
        """Display a line that stays."""
        note(text)

    def clear(self) -> None:
        """Take away what does not stay."""


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


_display: ContextVar[Callable[[int], RunDisplay]] = ContextVar("run_display", default=RunDisplay)


def run_display(steps: int) -> RunDisplay:
    """The display of a run of so many steps."""
    return _display.get()(steps)


@contextmanager
def displaying_runs(display: Callable[[int], RunDisplay]) -> Iterator[None]:
    """Within the block, training runs are displayed by what ``display`` makes of the number of their steps."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)
