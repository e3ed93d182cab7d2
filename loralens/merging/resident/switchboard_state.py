"""What a `Switchboard` says about itself: its task, and the memory that it uses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class SwitchboardState:
    """The state of a switchboard.

    Attributes
    ----------
    task : mapping of str to float
        The adapters and weights for which the model is merged, or to which it is being switched; empty for the base.
    waiting : tuple of str
        Weights that an interrupted switch has not yet changed.
    weights : int
        Number of weights that some adapter changes.
    """

    task: Mapping[str, float]
    waiting: tuple[str, ...]
    weights: int

    @property
    def is_complete(self) -> bool:
        """Whether all weights are in the state of the task."""
        return not self.waiting

    def __str__(self) -> str:
        name = " + ".join(f"{weight:g} × {name}" for name, weight in self.task.items()) or "the base"
        if self.is_complete:
            return f"merged for {name}" if self.task else "the base"
        done = self.weights - len(self.waiting)
        return f"interrupted on the way to {name}: {done} of {self.weights} weights are there; repair() finishes it"


@final
@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of memory that a switchboard uses in addition to the model.

    Attributes
    ----------
    factors : mapping of str to int
        All tensors of each adapter; none of views.
    patch : int
        Patches that restore the base from the current task.
    patch_factors : int
        Factors of the current task to which patches are relative: in 16 bits, or a copy of those of a view.
    copies : int
        Weights of the base that the current task replaces.
    """

    factors: Mapping[str, int]
    patch: int
    copies: int
    patch_factors: int = 0

    @property
    def total(self) -> int:
        """The total number of bytes."""
        return sum(self.factors.values()) + self.patch + self.patch_factors + self.copies
