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
    modules : mapping of str to ExtractedModule
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
        norm = sqrt(sum(module.frobenius**2 for module in self.modules.values()))
        lost = sqrt(sum((module.frobenius * module.relative_error) ** 2 for module in self.modules.values()))
        return lost / norm if norm else 0.0

    @property
    def share(self) -> float:
        """The share of Σ‖D‖² over all matrices that belongs to matrices with a pair."""
        inside = sum(module.frobenius**2 for module in self.modules.values())
        # Only matrices have a norm; other tensors are not measured.
        outside = sum(tensor.norm**2 for tensor in self.left_out if tensor.norm is not None)
        return inside / (inside + outside) if inside else 0.0


def assemble_extracted(
    pairs: Mapping[str, LowRank], leftover: Leftover, *, base_model: str | None, conv1d: bool, tied: str | None
) -> Adapter:
    """The adapter with these pairs. The writer adds ranks and targets to its configuration.

    Parameters
    ----------
    pairs : mapping of str to LowRank
    leftover : Leftover
        Everything that is not in pairs.
    base_model : str or None
    conv1d : bool
        Whether linear weights are stored as (in, out).
    tied : str or None
        The embedding to which the head is tied in both checkpoints. If it has a pair, the pair is meant for both.
    """
    # PEFT would otherwise adapt the embedding alone and leave the shared head as it is.
    config: dict[str, object] = {"ensure_weight_tying": True} if tied in pairs else {}
    config |= {
        "peft_type": "LORA",
        # Nothing in two checkpoints says what the model was tuned for.
        "task_type": None,
        "base_model_name_or_path": base_model,
        # PEFT's "all", not "lora_only": biases of layers without a pair may differ too.
        "bias": "all" if leftover.biases else "none",
        "fan_in_fan_out": conv1d,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "modules_to_save": leftover.saved or None,
        "use_dora": False,
        "use_rslora": False,
    }
    metadata = {"format": "pt"}  # as PEFT writes it
    return Adapter(modules=pairs, extra=leftover.extra, config=config, metadata=metadata, base_model=base_model)
