"""What one pass over the numbers of an adapter measures: its sketches, and norm and effective rank of every module."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank, check_float64
from loralens.errors import place
from loralens.fleet.sketching.module_keys import module_keys
from loralens.fleet.sketching.sketches import Sketch, to_codes
from loralens.fleet.sketching.start_sketch import StartSketch
from loralens.fleet.sketching.tensor_sketch import TensorSketch
from loralens.linalg.factor import Floats, gram
from loralens.linalg.measures import effective_rank, frobenius

# The squares of singular values come from Gram matrices, which err by ε‖B‖²‖A‖². Where that is not small against ‖ΔW‖²,
# the singular values are computed from the factors.
CANCELLING = 1e-9  # ‖ΔW‖² over ‖B‖²‖A‖² below which it is not
CONVERTED = 1 << 18  # numbers of a pair that are held in float64 as a whole: 2 MiB
ROUNDING = 1e-7  # singular values below this share of the first one are rounding errors of the Gram matrices


@final
@dataclass(frozen=True, slots=True)
class AdapterMeasures:
    """The sketches of an adapter, and its modules measured one by one.

    Attributes
    ----------
    names : mapping of str to str
        Key of a module → its name in the adapter, in order of keys.
    norms : mapping of str to float
        Key of a module → ‖ΔW‖_F, in order of keys.
    effective_ranks : mapping of str to float
        Key of a module → effective rank, 0 where ΔW = 0.
    """

    sketch: Sketch
    names: Mapping[str, str]
    norms: Mapping[str, float]
    effective_ranks: Mapping[str, float]


def measure_adapter(adapter: Adapter) -> AdapterMeasures:
    """Measure an adapter; every factor is read once and not kept.

    Raises
    ------
    FormatError
        A module holds NaN or Inf, or is too large for float64.
    """
    names = {key: name for name, key in module_keys(adapter).items()}
    names = {key: names[key] for key in sorted(names)}
    update_sketch, start_sketch = TensorSketch(), StartSketch()
    spectra: dict[str, Floats] = {}
    grams: dict[str, tuple[Floats, Floats]] = {}
    for key, name in names.items():
        module = adapter.modules[name]
        # NaN and numbers out of range are seen in the Gram matrices, and refused with a message.
        with place(name), np.errstate(over="ignore", invalid="ignore"):
            if not isinstance(module, LowRank):
                spectra[key] = module.singular_values()
                update_sketch.add_dense(key, module.dense())
                continue
            B, A = module.B, module.A
            if B.size + A.size <= CONVERTED:
                # Converted once for all that follows.
                B, A = B.T.astype(np.float64, order="C").T, A.astype(np.float64)
            grams[key] = (_gram(B.T), _gram(A))
            if not _is_safe(*grams[key], module.scale):
                # Refuses NaN and Inf with a message.
                spectra[key] = LowRank(B, A, module.scale).singular_values()
                del grams[key]
            update_sketch.add_pair(key, B, A, module.scale)
            start_sketch.add(key, A)
    scales = {key: abs(adapter.modules[names[key]].scale) for key in grams}
    spectra |= {key: check_float64(scales[key], s) for key, s in _singular_values(grams).items()}
    codes, step = to_codes(update_sketch.total())
    sketch = Sketch(codes, step, to_codes(start_sketch.total)[0])
    in_order = {key: spectra[key] for key in names}
    return AdapterMeasures(
        sketch,
        names,
        {key: frobenius(s) for key, s in in_order.items()},
        {key: effective_rank(s) for key, s in in_order.items()},
    )


def _gram(rows: Array) -> Floats:
    """The inner products of the rows of a matrix, float64."""
    return np.dot(rows, rows.T) if rows.dtype == np.float64 else gram(rows.T)


def total_norm(norms: Mapping[str, float]) -> float:
    """‖ΔW‖_F of the whole update."""
    return sqrt(sum(norm * norm for norm in norms.values()))


def _is_safe(of_B: Floats, of_A: Floats, scale: float) -> bool:
    """Whether the Gram matrices give the singular values of B·A with enough digits; False if they hold NaN or Inf."""
    lengths, energy = float(of_B.trace()) * float(of_A.trace()), float(np.vdot(of_B, of_A))
    # Exactly 0 only if a factor is. A scale of 0 makes every norm 0, whatever B·A is.
    return lengths == 0 or CANCELLING * lengths < energy < inf or (scale == 0 and isfinite(lengths))


def _singular_values(grams: Mapping[str, tuple[Floats, Floats]]) -> dict[str, Floats]:
    """Key → singular values of B·A, largest first, from BᵀB and A·Aᵀ; modules of one rank are computed together."""
    by_rank: dict[int, list[str]] = defaultdict(list)
    for key, (of_B, _) in grams.items():
        by_rank[len(of_B)].append(key)
    found: dict[str, Floats] = {}
    for keys in by_rank.values():
        of_B, of_A = (np.stack([grams[key][side] for key in keys]) for side in (0, 1))
        squares, vectors = np.linalg.eigh(of_A)
        roots = vectors * np.sqrt(np.maximum(squares, 0))[:, None, :]
        values = np.sqrt(np.maximum(np.linalg.eigvalsh(_congruent(roots, of_B)), 0))[:, ::-1]
        values[values < ROUNDING * values[:, :1]] = 0
        found |= dict(zip(keys, values, strict=True))
    return found


def _congruent(roots: Array, matrices: Array) -> Array:
    """RᵀMR of each pair."""
    return np.swapaxes(roots, 1, 2) @ matrices @ roots
