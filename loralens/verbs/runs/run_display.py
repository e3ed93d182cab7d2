"""The progress of a training run as text, and the choice of what displays it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import isfinite, nan
from time import monotonic
from typing import TYPE_CHECKING

from loralens.core.messages import note

if TYPE_CHECKING:
    from loralens.training.loop import Step

# A line is written after each of so many parts of a run: few enough for a log file, and often enough to see that the
# run is still going on.
PARTS = 10
# The weight of the past in the loss and the speed that are shown: an average over about 1/(1 − 0.9) = 10 steps, since
# the loss of single batches varies a lot.
SMOOTH = 0.9


_name: ContextVar[str] = ContextVar("run_name", default="")
# Seconds after which a run among many says that it is still going on.
SILENT = 60.0


class RunDisplay:
    """Reports a run as notes: the step after each tenth of the run, and further messages.

    Parameters
    ----------
    steps : int
        The number of steps of the run.

    Attributes
    ----------
    name : str
        The name of the run if it is one of many. Such a run reports neither evaluations nor steps, except for one step
        a minute, and its name is before everything that it says.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.name = _name.get()
        self._said = monotonic()
        self._loss = self._tokens = self._seconds = 0.0
        # The sums of the weights so far: without them the first averages would be too small, as in Adam.
        self._weight = self._loss_weight = 0.0

    def step(self, step: "Step") -> None:
        """Add a step to the averages, and display it if it is time."""
        self._weight = SMOOTH * self._weight + (1 - SMOOTH)
        # A step in which no token was hidden has no loss.
        if isfinite(step.loss):
            self._loss_weight = SMOOTH * self._loss_weight + (1 - SMOOTH)
            self._loss = SMOOTH * self._loss + (1 - SMOOTH) * step.loss
        # The step of a tiny model may be shorter than the clock can measure.
        self._tokens = SMOOTH * self._tokens + (1 - SMOOTH) * step.size / max(step.seconds, 1e-9)
        self._seconds = SMOOTH * self._seconds + (1 - SMOOTH) * step.seconds
        self.show(step)

    def show(self, step: "Step") -> None:
        """Display the step if it ends a tenth of the run, or the run."""
        if self.name:
            if monotonic() - self._said > SILENT:
                self._said = monotonic()
                self.say(self.text(step))
        # A run of fewer steps than parts shows every step.
        elif step.number % max(1, self.steps // PARTS) == 0 or step.number == self.steps:
            self.say(self.text(step))

    def text(self, step: "Step") -> str:
        """A step as text: number, mean loss of about ten steps, learning rate, speed, and the remaining time."""
        tokens, seconds = (value / self._weight for value in (self._tokens, self._seconds))
        loss = self._loss / self._loss_weight if self._loss_weight else nan
        remaining = _clock((self.steps - step.number) * seconds)
        speed = f"{tokens:,.0f} tokens/s  {remaining} left"
        return f"step {step.number}/{self.steps}  mean loss {loss:.3f}  lr {step.lr:.1e}  {speed}"

    def show_evaluation(self, text: str) -> None:
        """Display an evaluation."""
        if not self.name:
            self.say(text)

    def say(self, text: str) -> None:
        """Display a line permanently."""
        note(self.with_name(text))

    def with_name(self, text: str) -> str:
        """The text, after the name of the run if it is one of many."""
        return f"{self.name}: {text}" if self.name else text

    def clear(self) -> None:
        """Remove what is displayed only for the moment; nothing here."""


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# A context variable, so that the library can be used from several threads with different displays.
_display: ContextVar[Callable[[int], RunDisplay]] = ContextVar("run_display", default=RunDisplay)


def run_display(steps: int) -> RunDisplay:
    """The display for a run of ``steps`` steps."""
    return _display.get()(steps)


@contextmanager
def displaying_runs(display: Callable[[int], RunDisplay]) -> Iterator[None]:
    """Within the context, ``display`` makes the display of a training run from the number of its steps."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


@contextmanager
def naming_runs(name: str) -> Iterator[None]:
    """Within the context, a training run is one of many: it reports little, and its name with it."""
    token = _name.set(name)
    try:
        yield
    finally:
        _name.reset(token)
