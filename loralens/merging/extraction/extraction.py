"""Extraction: the adapter that was made from two checkpoints, and what it holds of their difference."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import final

from loralens.core.adapter import Adapter
from loralens.core.lowrank import LowRank
from loralens.merging.extraction.leftover import LeftOut, Leftover


@final
@dataclass(frozen=True, slots=True)
class Extracted:
    """What became of one difference D in the adapter; norms in the unit of the weights, the rest dimensionless.

    Attributes
    ----------
    shape : tuple of int
        (out, in).
    rank : int
    frobenius : float
        ‖D‖_F.
    relative_error : float
        ‖D − B·A‖_F/‖D‖_F, measured on every entry with the factors as they are written.
    svd_error : float
        Stated error of the randomised SVD, relative to √Σσ² of what it found; 0 where it was dense.
    noise : float
        √(mean ulp²/12) of the tuned weight: what rounding to its dtype leaves on one entry.
    residue : float
        Root mean square of an entry of D − B·A in units of ``noise``: about 1 where rounding is all that is left, far
        above it where D has more directions than were kept. Infinite where ``noise`` is 0.
    edge : float or None
        The value that singular values had to exceed, under `NoiseEdge`.
    """

    shape: tuple[int, int]
    rank: int
    frobenius: float
    relative_error: float
    svd_error: float
    noise: float
    residue: float
    edge: float | None

    @property
    def energy_kept(self) -> float:
        """1 − relative_error²; never below 0."""
        return max(0.0, 1 - self.relative_error**2)


@final
@dataclass(frozen=True, slots=True)
class Extraction:
    """An adapter, and what it holds of the difference.

    Attributes
    ----------
    adapter : Adapter
        Under the names of the tuned checkpoint. Factors balanced, scale 1.
    modules : mapping of str to Extracted
        One for each pair, in natural order.
    unchanged : int
        Matrices that are equal in both.
    left_out : tuple of LeftOut
        What differs and is not in the adapter.
    notes : tuple of str
    """

    adapter: Adapter
    modules: Mapping[str, Extracted]
    unchanged: int
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]

    @property
    def relative_error(self) -> float:
        """Of all pairs together: √Σ‖D − B·A‖² / √Σ‖D‖²."""
        whole = sqrt(sum(one.frobenius**2 for one in self.modules.values()))
        lost = sqrt(sum((one.frobenius * one.relative_error) ** 2 for one in self.modules.values()))
        return lost / whole if whole else 0.0

    @property
    def share(self) -> float:
        """Part of Σ‖D‖² over all matrices that belongs to those with a pair."""
        inside = sum(one.frobenius**2 for one in self.modules.values())
        outside = sum(one.norm**2 for one in self.left_out if one.norm is not None)
        return inside / (inside + outside) if inside else 0.0


@final
@dataclass(frozen=True, slots=True)
class Frame:
    """All of the adapter but its pairs.

    Attributes
    ----------
    leftover : Leftover
    base_model : str or None
    conv1d : bool
    tied : str or None
        The embedding whose numbers the head has in both checkpoints: where it has a pair, the head is to have it too.
    """

    leftover: Leftover
    base_model: str | None
    conv1d: bool
    tied: str | None = None

    def adapter(self, pairs: Mapping[str, LowRank]) -> Adapter:
        """The adapter with these pairs; its configuration gets ranks and targets when it is written."""
        saved = self.leftover.saved
        config: dict[str, object] = {"ensure_weight_tying": True} if self.tied in pairs else {}
        config |= {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": self.base_model,
            "bias": "all" if self.leftover.biases else "none",
            "fan_in_fan_out": self.conv1d,
            "inference_mode": True,
            "lora_dropout": 0.0,
            "modules_to_save": saved or None,
            "use_dora": False,
            "use_rslora": False,
        }
        return Adapter(
            modules=pairs,
            extra=self.leftover.extra,
            config=config,
            metadata={"format": "pt"},
            base_model=self.base_model,
        )
