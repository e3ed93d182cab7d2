"""Displays a training run: on a terminal as one line that is rewritten, elsewhere as single lines."""

import sys
from time import monotonic
from typing import TYPE_CHECKING

import click

from loralens.cli.terminal import raw_stream, say
from loralens.verbs.runs.run_display import RunDisplay

if TYPE_CHECKING:
    from loralens.training.loop import Step


class TrainingLine(RunDisplay):
    """The line of a run on standard error: step, loss, learning rate, speed, and the remaining time."""

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        # In a file or a pipe, carriage returns would make one endless line.
        self.live = sys.stderr.isatty()
        self._width = 0
        self._shown = monotonic()

    def show(self, step: "Step") -> None:
        """Rewrite the line, at most ten times a second; without a terminal print single lines, but fewer."""
        if not self.live:
            super().show(step)
        # Ten times a second is as often as an eye follows, and costs a fast step nothing.
        elif monotonic() - self._shown > 0.1:
            self._shown = monotonic()
            text = self.text(step)
            click.echo("\r" + text.ljust(self._width), nl=False, file=raw_stream(sys.stderr))
            # A shorter text must overwrite all of a longer one.
            self._width = max(self._width, len(text))

    def say(self, text: str) -> None:
        """Print a line permanently, above the line of the run."""
        self.clear()
        say(self.with_name(text), err=True)

    def clear(self) -> None:
        """Remove the line of the run."""
        # Spaces, since not every terminal knows the code that clears a line.
        if self._width:
            click.echo("\r" + " " * self._width + "\r", nl=False, file=raw_stream(sys.stderr))
            self._width = 0
