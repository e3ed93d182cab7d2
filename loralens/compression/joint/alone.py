"""The coding of one adapter alone: the fewest bytes with which it keeps a given error."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import final

import numpy as np

from loralens.compression.bits import allocate_bits, tradeoff
from loralens.compression.joint.split import SplitUpdate
from loralens.core.few_bits.quantised import as_bytes
from loralens.linalg.factor import Floats
from loralens.linalg.few_bits.packing import MOST, Bytes
from loralens.linalg.few_bits.quantise import Quantised, quantise_product

# The measured error is 0.7 to 1.1 times the expected one, so the budget is corrected by their ratio. After so many
# codings the remaining gain is below a percent of the bytes.
TRIALS = 8
TYPICAL = 0.93  # the ratio of measured and expected error at 3 to 5 bits, for an estimate


@final
@dataclass(frozen=True, slots=True)
class AloneCoding:
    """An adapter in integers of a few bits.

    Attributes
    ----------
    products : mapping of str to Quantised
        By module: ΔW, with its scale, as a product of factors in integers.
    error : float
        ‖ΔW − ΔW'‖/‖ΔW‖ of the whole adapter.
    """

    products: Mapping[str, Quantised]
    error: float

    @property
    def nbytes(self) -> int:
        """The size of all modules."""
        return sum(len(data) for data in self.parts.values())

    @property
    def parts(self) -> dict[str, Bytes]:
        """The bytes of each module, as `loralens.core.few_bits.quantised` describes them."""
        return {name: as_bytes(product) for name, product in self.products.items()}


def estimate_alone(updates: Mapping[str, SplitUpdate], *, error: float) -> int:
    """About the bytes that `code_alone` takes, from the spectra alone."""
    points = tradeoff(*_spectra(updates))
    return int(points.nbytes[_first(points.error, error / TYPICAL)])


def code_alone(
    updates: Mapping[str, SplitUpdate], *, error: float, shared: Mapping[str, str] | None = None
) -> AloneCoding:
    """Code an adapter with ranks and bits that take the fewest bytes at this error.

    Parameters
    ----------
    updates : mapping of str to SplitUpdate
    error : float
        The largest ‖ΔW − ΔW'‖/‖ΔW‖.
    shared : mapping of str to str, optional
        Modules that must have one rank (`loralens.core.ranks.shared_ranks`).

    Returns
    -------
    AloneCoding
        If even 16 bits for all directions miss the error, these.
    """
    spectra, shapes = _spectra(updates)
    points = tradeoff(spectra, shapes, shared=shared)
    total = sqrt(sum(update.energy for update in updates.values()))
    # The point wanted lies between one that is known to miss the error and one that is known to keep it.
    missing, keeping = -1, points.error.size
    best: AloneCoding | None = None
    aim, stride = error / TYPICAL, 1
    for _ in range(TRIALS):
        if keeping - missing < 2:
            break
        point = min(max(_first(points.error, aim), missing + 1), keeping - 1)
        coding = _code(updates, allocate_bits(spectra, shapes, int(points.nbytes[point]), shared=shared).bits, total)
        if coding.error <= error:
            best, keeping = coding, point
            aim = points.error[point] * error / max(coding.error, 1e-300)
            stride = 1
        else:
            # Near the end, neighbouring points differ by less than the ratio of measured and expected errors does.
            missing = min(point + stride - 1, max(point, keeping - 2))
            aim = points.error[point] * error / coding.error
            stride *= 2
    if best is None:
        best = _code(updates, {name: (MOST,) * s.size for name, s in spectra.items()}, total)
    return best


def _spectra(updates: Mapping[str, SplitUpdate]) -> tuple[dict[str, Floats], dict[str, tuple[int, int]]]:
    spectra = {name: update.singular_values for name, update in updates.items()}
    return spectra, {name: update.shape for name, update in updates.items()}


def _first(errors: Floats, error: float) -> int:
    """The index of the first point of a tradeoff with at most this error, or of the last point."""
    return min(int(np.searchsorted(-errors, -error)), errors.size - 1)


def _code(updates: Mapping[str, SplitUpdate], bits: Mapping[str, tuple[int, ...]], total: float) -> AloneCoding:
    products = {
        name: quantise_product(update.left, update.right.T, np.array(bits[name])) for name, update in updates.items()
    }
    squares = sum(updates[name].squared_distance(product.B, product.A) for name, product in products.items())
    return AloneCoding(products, sqrt(squares) / total if total else 0.0)
