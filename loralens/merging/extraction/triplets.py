"""The leading singular triplets of the difference of two weights, as many as a rank rule needs."""

from dataclasses import dataclass
from hashlib import sha256
from math import sqrt
from typing import Literal, final

import numpy as np

from loralens.core.lazy import Array
from loralens.core.ranks import Rule
from loralens.errors import FormatError
from loralens.linalg.device import Device, Float
from loralens.linalg.factor import Floats
from loralens.linalg.randomized import ROUNDING, input_dtype, is_dense, leading_svd
from loralens.linalg.rounding import ulp
from loralens.merging.extraction.differences import MatrixDifference
from loralens.merging.extraction.noise_edge import known_threshold, median_threshold, sampled_threshold

# 8 and 16 are the usual ranks of adapters.
START = 16  # directions of the first computation, if the rule does not say how many it needs
# The relative error of a mean over 65,536 entries is 1/256 of their spread.
SAMPLE = 1 << 16  # entries from which the level of the rounding noise is estimated, within 1 %
SETTLED = ("rank", "energy", "error")  # rules that need only k triplets and ‖D‖ to decide that k directions are kept


@final
@dataclass(frozen=True, slots=True)
class NoiseEdge:
    """The rule that keeps the directions above the noise (`loralens.merging.extraction.noise_edge`).

    Attributes
    ----------
    noise : str
        ``rounding``: the noise comes from rounding to the dtype of the tuned checkpoint, √(mean ulp²/12) per entry.
        ``median``: the noise is unknown and estimated by the median of all singular values, so all are computed.
    """

    noise: Literal["rounding", "median"] = "rounding"


@final
@dataclass(frozen=True, slots=True)
class Triplets:
    """The leading singular triplets of one difference D in its stored orientation; arrays are float64.

    Attributes
    ----------
    U, V : arrays, shape (rows, k), (columns, k)
    s : array
        k values, largest first, or all singular values of D if the SVD was dense.
    is_complete : bool
        Whether ``s`` has all singular values.
    norm : float
        ‖D‖_F, computed from every entry.
    noise : float
        √(mean ulp²/12) of the tuned weight, the rounding noise of one entry.
    edge : float or None
        The threshold for singular values under `NoiseEdge`.
    error : float
        Relative error bound of √Σσ² of the first k; 0 if the SVD was dense.
    """

    U: Floats
    V: Floats
    s: Floats
    is_complete: bool
    norm: float
    noise: float
    edge: float | None
    error: float

    @property
    def count(self) -> int:
        """Number of directions in U and V."""
        return int(self.U.shape[1])

    def spectrum(self) -> Floats:
        """All singular values. Those that were not computed are replaced by equal ones with the missing energy of ‖D‖².

        A rule that takes none of the replaced values decides as it would with the true ones, because none of them is
        larger than the last computed one, and their energy is the same.
        """
        if self.is_complete or not self.s.size:
            return self.s
        missing_energy = max(self.norm**2 - float(self.s @ self.s), 0.0)
        missing = min(len(self.U), len(self.V)) - self.s.size
        # No unseen value can exceed the last one that was seen.
        value = min(sqrt(missing_energy / missing), float(self.s[-1]))
        return np.concatenate([self.s, np.full(missing, value)])

    def above(self) -> int:
        """Number of directions above the edge."""
        assert self.edge is not None
        return int(np.count_nonzero(self.s > self.edge))

    def factors(self, rank: int, dtype: np.dtype[np.generic]) -> tuple[Array, Array]:
        """Factors (rows, rank) and (columns, rank) whose product is nearest to D, balanced and rounded once.

        If D has fewer directions, the remaining columns are 0.
        """
        k = min(rank, self.count)
        # √σ on both sides, so that both factors have the same range when they are rounded.
        root = np.sqrt(self.s[:k])
        scaled_vectors = (self.U[:, :k] * root, self.V[:, :k] * root)
        padded = (np.pad(X, ((0, 0), (0, rank - k))) for X in scaled_vectors)
        left, right = (X.astype(dtype) for X in padded)
        return left, right


def compute_triplets(
    name: str,
    difference: MatrixDifference,
    rule: Rule | NoiseEdge,
    *,
    count: int | None = None,
    exact: bool = False,
    threads: int = 1,
) -> Triplets:
    """Compute the leading triplets of a difference, as many as ``rule`` needs to decide, or ``count`` under a budget.

    Parameters
    ----------
    name : str
        The name of the module. It seeds the random start, so the result does not depend on other modules.
    difference : MatrixDifference
    rule : Rule or NoiseEdge
    count : int or None
        Number of directions. The default depends on the rule.
    exact : bool
        Compute the dense SVD with LAPACK in float64. Small matrices always get it.
    threads : int
        Number of threads for products with D.

    Raises
    ------
    FormatError
        The difference has NaN or infinite numbers.

    Notes
    -----
    Without a dense SVD, D is kept in float32, rounded once from the float64 difference, and `leading_svd` computes 16,
    32, 64 … directions. These values may exceed the true ones by up to 2⁻²⁰σ₁, so the edge is never below 2⁻²⁰σ₁. A
    value that is within its error of the edge may be on either side.
    """
    rows, columns = difference.stored
    most = min(rows, columns)
    k = min(most, count or (int(rule.value) if isinstance(rule, Rule) and rule.name == "rank" else START))
    # Equal weights need no SVD.
    if not difference.differs():
        return Triplets(np.zeros((rows, 0)), np.zeros((columns, 0)), np.zeros(0), True, 0.0, 0.0, None, 0.0)
    working_dtype: Float = input_dtype((rows, columns), k, exact=exact)
    D, norm, noise = _read_difference(difference, working_dtype, name)
    device = Device("cpu", threads)
    while True:
        dense = is_dense((rows, columns), k, exact=exact)
        # Only now is it clear that a dense SVD is needed, which is computed in float64.
        if dense and working_dtype == "float32":
            working_dtype = "float64"
            D, norm, noise = _read_difference(difference, working_dtype, name)
        # Seeded by the name, so that the result does not depend on the other modules.
        rng = np.random.default_rng(int.from_bytes(sha256(name.encode()).digest()[:8], "little"))
        svd = leading_svd(D, most if dense else k, rng=rng, device=device, exact=exact)
        # Directions of length 0 have no meaning.
        positive = svd.s > 0
        s = svd.s[positive]
        error = float(np.linalg.norm(svd.error[:k])) / float(np.linalg.norm(s[:k]))
        edge = (
            _noise_edge(rule, difference, D, s, noise, dense=dense, device=device)
            if isinstance(rule, NoiseEdge)
            else None
        )
        result = Triplets(svd.U[:, positive], svd.V[:, positive], s, dense, norm, noise, edge, error)
        if isinstance(rule, NoiseEdge):
            needed = result.above()
        else:  # a budget is shared by all modules, so this module alone cannot decide how many directions it needs
            needed = 0 if rule.budget else rule.rank_of(result.spectrum())
        # All values are known; the vectors beyond those needed are not kept, and a copy frees their memory.
        if dense:
            keep = min(max(k, needed), s.size)
            return Triplets(result.U[:, :keep].copy(), result.V[:, :keep].copy(), s, dense, norm, noise, edge, error)
        if count or needed < k or (needed == k and isinstance(rule, Rule) and rule.name in SETTLED):
            return result
        # Doubled, so that all attempts together cost at most twice as much as the last one.
        k = min(2 * k, most)


def _noise_edge(
    rule: NoiseEdge, difference: MatrixDifference, D: Array, s: Floats, noise: float, *, dense: bool, device: Device
) -> float:
    shape = difference.stored
    if rule.noise == "median":
        return median_threshold(_median_singular_value(D, s, dense=dense), shape)
    # Below this, values of the float32 method are not reliable.
    floor = 0.0 if dense else ROUNDING * float(s[0])
    N = _draw_rounding_noise(difference, input_dtype(shape, 1))
    largest = float(leading_svd(N, 1, rng=np.random.default_rng(1), device=device).s[0])
    # The largest of the three: a direction must exceed every kind of noise.
    return max(sampled_threshold(largest, shape), known_threshold(noise, shape), floor)


def _draw_rounding_noise(difference: MatrixDifference, dtype: Float) -> Array:
    """A random sample of the rounding noise of the tuned weight: ulp times a number in (−½, ½) for every entry."""
    # A fixed seed, so that the same checkpoints give the same threshold.
    rng = np.random.default_rng(0)
    N = np.empty(difference.stored, dtype)
    for part, _, tuned in difference.blocks():
        N[part] = ulp(tuned, tuned.dtype) * (rng.random(tuned.shape) - 0.5)
    return N


def _median_singular_value(D: Array, s: Floats, *, dense: bool) -> float:
    """The median of all min(m, n) singular values, from a dense SVD or else from the smaller Gram matrix in float64.

    A Gram matrix is accurate for values above 1e-8·σ₁.
    """
    least = min(D.shape)
    if dense:
        return float(np.median(np.pad(s, (0, least - s.size))))
    X = D if D.shape[1] == least else D.T
    gram = np.zeros((least, least))
    # In blocks, so that no float64 copy of all of D is needed.
    for start in range(0, len(X), least):
        block = X[start : start + least].astype(np.float64)
        gram += block.T @ block
    return float(np.median(np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0))))


def _read_difference(difference: MatrixDifference, dtype: Float, name: str) -> tuple[Array, float, float]:
    """D in ``dtype``, ‖D‖_F and the level of the rounding noise, in one pass over both weights."""
    rng = np.random.default_rng(0)
    size = difference.stored[0] * difference.stored[1]
    D = np.empty(difference.stored, dtype)
    energy = noise = 0.0
    count = 0
    for part, block, tuned in difference.blocks():
        D[part] = block
        # The norm is that of the float64 difference, before it is rounded to the dtype of D.
        flat = block.reshape(-1)
        energy += float(flat @ flat)
        # Each block gives its share of the sample, rounded up.
        sample = rng.integers(tuned.size, size=-(-SAMPLE * tuned.size // size))
        noise += float(np.sum(ulp(tuned.reshape(-1)[sample], tuned.dtype) ** 2))
        count += sample.size
    if not np.isfinite(energy):
        raise FormatError(
            f"{name}: the difference holds NaN or infinity", fix="one of the checkpoints is damaged or diverged"
        )
    return D, sqrt(energy), sqrt(noise / count / 12)


def measured_error(difference: MatrixDifference, left: Array, right: Array) -> float:
    """‖D − left·rightᵀ‖_F in float64, computed from every entry of both weights with the factors as they are stored."""
    L, R = left.astype(np.float64), right.astype(np.float64).T
    total = 0.0
    for part, block, _ in difference.blocks():
        block -= L[part] @ R
        flat = block.reshape(-1)
        total += float(flat @ flat)
    return sqrt(total)
