"""One pass over the numbers of a module: its spectrum, and statistics of both its factors."""

from dataclasses import dataclass
from typing import final

import numpy as np

from loralens.analysis.spectrum import Spectrum
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.structured import Update
from loralens.errors import FormatError
from loralens.linalg.factor import Floats


@final
@dataclass(frozen=True, slots=True)
class Factor:
    """Statistics of one factor along its rank: of the rows of A, or the columns of B.

    Attributes
    ----------
    lengths : float64 array, shape (r,)
        Euclidean lengths of the rows of A, or the columns of B.
    skew : float
        Largest |cosine| between two of these vectors that are not 0; it is 0 if they are orthogonal.
    zeros : float
        Share of the entries that are exactly 0, in [0, 1].
    unevenness : float
        Standard deviation of the lengths along the other axis, the columns of A or the rows of B, over their mean. It
        is 0 if all inputs, or outputs, take part equally.
    dead : int
        The number of columns of A, or rows of B, that are exactly 0.
    digest : int
        Python's hash of the numbers and their dtype: another one in every process, and equal for other numbers with a
        chance of 2⁻⁶⁴. Those of hashlib would load OpenSSL, which takes 4 MB.
    """

    lengths: Array
    skew: float
    zeros: float
    unevenness: float = 0.0
    dead: int = 0
    digest: int = 0


@final
@dataclass(frozen=True, slots=True)
class ModuleReading:
    """What one pass over the numbers of a module has measured.

    Attributes
    ----------
    spectrum : Spectrum or None
        None if a factor holds NaN or Inf.
    B, A : Factor or None
        None if the update is not a pair, or has no spectrum.
    """

    module: Update
    spectrum: Spectrum | None
    B: Factor | None = None
    A: Factor | None = None


def read_module(module: Update) -> ModuleReading:
    """Measure one module; its factors are not kept."""
    try:
        # A structured update has no factors along its rank whose statistics the checks could use.
        if not isinstance(module, LowRank):
            return ModuleReading(module, Spectrum(module.singular_values(), module.shape, module.rank))
        loaded = module.load()
        spectrum = Spectrum(loaded.singular_values(), loaded.shape, loaded.rank)
    except FormatError:  # the only error of this arithmetic is one about NaN or Inf
        return ModuleReading(module, None)
    # B transposed, so that both factors have their directions as rows. The module itself is kept unread.
    return ModuleReading(module, spectrum, _factor_statistics(loaded.B.T), _factor_statistics(loaded.A))


def _factor_statistics(X: Array) -> Factor:
    """The statistics of the rows of X (r, n)."""
    mark = digest(X)
    X = X.astype(np.float64)
    zeros = 1 - np.count_nonzero(X) / max(X.size, 1)
    # These are the norms, mean and deviation of NumPy, whose wrappers take longer than the sums for small factors.
    squares = X * X
    lengths, across = np.sqrt(np.add.reduce(squares, axis=1)), np.sqrt(np.add.reduce(squares, axis=0))
    # Rows of 0 have no direction.
    unit = X[lengths > 0] / lengths[lengths > 0, None]
    cosines = np.abs(unit @ unit.T)
    np.fill_diagonal(cosines, 0.0)
    return Factor(
        lengths=lengths,
        skew=float(cosines.max(initial=0.0)),
        zeros=zeros,
        unevenness=relative_deviation(across) if across.any() else 0.0,
        dead=across.size - int(np.count_nonzero(X.any(axis=0))),
        digest=mark,
    )


def digest(X: Array) -> int:
    """The hash of the numbers of a factor."""
    # The dtype is part of the hash: zeros of two dtypes with entries of one size have equal bytes.
    return hash((X.tobytes(), X.dtype.str, X.dtype.num))


def relative_deviation(values: Floats) -> float:
    """The standard deviation of some values, relative to their mean."""
    mean = np.add.reduce(values) / values.size
    deviations = values - mean
    return float(np.sqrt(np.add.reduce(deviations * deviations) / values.size) / mean)
