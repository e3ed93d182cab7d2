"""`Extraction`: an adapter that was extracted from two checkpoints, and how well it represents their difference."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import final

from loralens.core.adapter import Adapter
from loralens.core.lowrank import LowRank
from loralens.merging.extraction.leftover import LeftOut, Leftover


@final
@dataclass(frozen=True, slots=True)
class ExtractedModule:
    """How well a pair represents the difference D of its module. Norms have the unit of the weights.

    Attributes
    ----------
    shape : tuple of int
        (out, in).
    frobenius : float
        ‖D‖_F.
    relative_error : float
        ‖D − B·A‖_F/‖D‖_F, measured on every entry with the factors as they are written.
    svd_error : float
        Error bound of the randomised SVD, relative to √Σσ² of its values; 0 if the SVD was dense.
    noise : float
        √(mean ulp²/12) of the tuned weight, the rounding noise of one entry.
    residue : float
        Root mean square of an entry of D − B·A in units of ``noise``. It is about 1 if only rounding noise is left, and
        much larger if D has more directions than the pair. Infinite if ``noise`` is 0.
    edge : float or None
        The threshold for singular values under `NoiseEdge`.
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
        """The share of the energy in the pair, 1 − relative_error², at least 0."""
        return max(0.0, 1 - self.relative_error**2)


@final
@dataclass(frozen=True, slots=True)
class Extraction:
    """An extracted adapter, and how well it represents the difference of the checkpoints.

    Attributes
    ----------
    adapter : Adapter
        It has the names of the tuned checkpoint, balanced factors and scale 1.
    modules : mapping of str to Extracted
        One for each pair, in natural order.
    unchanged : int
        Number of matrices that are equal in both checkpoints.
    left_out : tuple of LeftOut
        Tensors that differ and are not in the adapter.
    """

    adapter: Adapter
    modules: Mapping[str, ExtractedModule]
    unchanged: int
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]

    @property
    def relative_error(self) -> float:
        """The relative error of all pairs together, √Σ‖D − B·A‖² / √Σ‖D‖²."""
        norm = sqrt(sum(one.frobenius**2 for one in self.modules.values()))
        lost = sqrt(sum((one.frobenius * one.relative_error) ** 2 for one in self.modules.values()))
        return lost / norm if norm else 0.0

    @property
    def share(self) -> float:
        """The share of Σ‖D‖² over all matrices that belongs to matrices with a pair."""
        inside = sum(one.frobenius**2 for one in self.modules.values())
        outside = sum(one.norm**2 for one in self.left_out if one.norm is not None)
        return inside / (inside + outside) if inside else 0.0


@final
@dataclass(frozen=True, slots=True)
class AdapterFrame:
    """The parts of an extracted adapter other than its pairs.

    Attributes
    ----------
    conv1d : bool
        Whether linear weights are stored as (in, out).
    tied : str or None
        The embedding to which the head is tied in both checkpoints. If it has a pair, the pair is meant for both.
    """

    leftover: Leftover
    base_model: str | None
    conv1d: bool
    tied: str | None = None

    def adapter(self, pairs: Mapping[str, LowRank]) -> Adapter:
        """The adapter with these pairs. The writer adds ranks and targets to its configuration."""
        saved = self.leftover.saved
        # PEFT would otherwise adapt the embedding alone and leave the shared head as it is.
        config: dict[str, object] = {"ensure_weight_tying": True} if self.tied in pairs else {}
        config |= {
            "peft_type": "LORA",
            # Nothing in two checkpoints says what the model was tuned for.
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
