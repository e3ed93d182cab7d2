"""The parts of a model that a run trains."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes a second
    from loralens.training.injection import Injection


@dataclass(frozen=True, slots=True)
class TrainedParts:
    """The parts of a model that are trained.

    Attributes
    ----------
    modules : tuple of str
        The modules with a LoRA layer, in natural order.
    heads : tuple of str
        The modules that are trained in full.
    ranks : tuple of int
        The different ranks of the modules, in order.
    trainable, frozen : int
        The number of parameters that are trained, and of those of the model that are not.
    """

    modules: tuple[str, ...]
    heads: tuple[str, ...]
    ranks: tuple[int, ...]
    trainable: int
    frozen: int

    @classmethod
    def of(cls, injection: "Injection") -> "TrainedParts":
        """The parts of an injection, whose layers must be in the model."""
        ranks = tuple(sorted({*injection.ranks.values()}))
        return cls(tuple(injection.layers), tuple(injection.heads), ranks, injection.trainable, injection.frozen)
