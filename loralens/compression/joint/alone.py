"""The coding of one adapter alone: the fewest bytes with which it keeps a given error."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import final

import numpy as np

from loralens.compression.bits import allocate_bits, tradeoff
from loralens.compression.joint.split import SplitUpdate
from loralens.core.quantised import as_bytes
from loralens.linalg.factor import Floats
from loralens.linalg.few_bits.packing import Bytes
from loralens.linalg.few_bits.quantise import Quantised, quantise_product

# The measured error is 0.7 to 1.1 times the expected one, so the budget is corrected by their ratio, this often.
CORRECTIONS = 5
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
        """The bytes of each module, as `loralens.core.quantised` describes them."""
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
    aim, best, tried = error / TYPICAL, None, set[int]()
    for _ in range(CORRECTIONS):
        budget = int(points.nbytes[_first(points.error, aim)])
        if budget in tried:
            break
        tried.add(budget)
        coding = _code(updates, allocate_bits(spectra, shapes, budget, shared=shared).bits, total)
        fits = coding.error <= error
        if best is None or (fits, -coding.nbytes) > (best.error <= error, -best.nbytes):
            best = coding
        # A thousandth below the error: the ratio is nearly the same for neighbouring budgets, but not quite.
        aim *= (error * 0.999 / coding.error) if coding.error else 1.0
    if best is None or best.error > error:
        finest = {name: (16,) * s.size for name, s in spectra.items()}
        best = _code(updates, finest, total)
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
