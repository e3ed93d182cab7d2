"""How a run is shown: a line that moves on a terminal, lines elsewhere; and what became of the spectra."""

import sys
from collections.abc import Mapping
from math import isfinite, nan
from pathlib import Path
from statistics import median
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

from loralens.cli.terminal import raw, say

if TYPE_CHECKING:
    from loralens.core.adapter import Adapter
    from loralens.training.watch import Measures, Step

PARTS = 10  # of a run, where stderr is no terminal and lines stay
SMOOTH = 0.9  # weight of the past in the loss and speed that are shown


class Line:
    """The line of a run of so many steps: step, loss, rate, speed, and the time that is left."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.live = sys.stderr.isatty()
        self._loss = self._rate = self._pace = 0.0
        self._weight = self._asked = 0.0
        self._width = 0
        self._shown = monotonic()

    def step(self, step: "Step") -> None:
        """Show a step, if it is time."""
        self._weight = SMOOTH * self._weight + (1 - SMOOTH)
        if isfinite(step.loss):  # a step that asked nothing has none
            self._asked = SMOOTH * self._asked + (1 - SMOOTH)
            self._loss = SMOOTH * self._loss + (1 - SMOOTH) * step.loss
        self._rate = SMOOTH * self._rate + (1 - SMOOTH) * step.size / max(step.seconds, 1e-9)
        self._pace = SMOOTH * self._pace + (1 - SMOOTH) * step.seconds
        part = max(1, self.steps // PARTS)
        if self.live and monotonic() - self._shown > 0.1:
            self._put(self._text(step))
        elif not self.live and (step.number % part == 0 or step.number == self.steps):
            say(self._text(step), err=True)

    def _text(self, step: "Step") -> str:
        rate, pace = (value / self._weight for value in (self._rate, self._pace))
        loss = self._loss / self._asked if self._asked else nan
        left = _clock((self.steps - step.number) * pace)
        speed = f"{rate:,.0f} tokens/s  {left} left"
        return f"step {step.number}/{self.steps}  loss {loss:.3f}  lr {step.lr:.1e}  {speed}"

    def _put(self, text: str) -> None:
        self._shown = monotonic()
        click.echo("\r" + text.ljust(self._width), nl=False, file=raw(sys.stderr))
        self._width = max(self._width, len(text))

    def say(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        say(text, err=True)

    def clear(self) -> None:
        """Take the moving line away."""
        if self._width:
            click.echo("\r" + " " * self._width + "\r", nl=False, file=raw(sys.stderr))
            self._width = 0


def measured(step: int, measures: "Measures") -> str:
    """An evaluation in words."""
    return f"step {step}: evaluation " + "  ".join(f"{name} {value:.4g}" for name, value in measures.items())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Spectra:
    """Live spectra: the adapter of a snapshot beside the one before, and beside the weights it adapts.

    Parameters
    ----------
    model : str
        Where the weights are.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self._last: tuple[int, Adapter] | None = None

    def remember(self, step: int, path: Path) -> None:
        """The snapshot of a step is the one before the next."""
        from loralens.formats import load

        self._last = step, load(path)

    def look(self, step: int, adapter: "Adapter") -> dict[str, Any]:
        """Medians over the modules: of ‖ΔW‖, of its effective rank, of φ to the last snapshot, of amplification."""
        from loralens.analysis.base.amplification import measure_amplification
        from loralens.analysis.compare.similarity import compare_subspaces
        from loralens.analysis.spectrum import measure_spectrum
        from loralens.cli.options import base_weights

        found = measure_spectrum(adapter).values()
        seen: dict[str, Any] = {
            "norm": median(one.frobenius for one in found),
            "effective_rank": median(one.effective_rank for one in found),
        }
        if self._last:
            before, last = self._last
            pairs = dict(compare_subspaces(last, adapter).items()).values()
            for side in ("in", "out"):
                seen[f"phi_{side}"] = median(pair.spans[side] for pair in pairs)
            seen["phi_to"] = before
        weights = base_weights(self.model, adapter.modules)
        amplified = measure_amplification(adapter, weights.modules, top=False).values()
        whole = [one.rows[-1].amplification for one in amplified if one.rows]
        seen["amplification"] = median(whole) if whole else None
        self._last = step, adapter
        return seen


def spectra_said(step: int, seen: Mapping[str, Any]) -> str:
    """Live spectra in words."""
    text = f"step {step}: medians over modules: ‖ΔW‖ {seen['norm']:.3g}, effective rank {seen['effective_rank']:.2f}"
    if "phi_to" in seen:
        text += f", φ to step {seen['phi_to']} {seen['phi_in']:.2f} in, {seen['phi_out']:.2f} out"
    return text if seen["amplification"] is None else f"{text}, amplification {seen['amplification']:.3g}"
