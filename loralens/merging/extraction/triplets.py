"""Triplets: the leading singular triplets of one difference, as many as a rule of ranks asks for."""

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
from loralens.linalg.randomized import ROUNDING, holds, is_dense, leading
from loralens.linalg.rounding import ulp
from loralens.merging.extraction.differences import Difference
from loralens.merging.extraction.noise_edge import drawn_threshold, known_threshold, median_threshold

START = 16  # directions that are looked at first where the rule does not say how many
SAMPLE = 1 << 16  # entries from which the level of the rounding noise is told, to 1 %
SETTLED = ("rank", "energy", "error")  # rules that are sure of k directions from k triplets and ‖D‖


@final
@dataclass(frozen=True, slots=True)
class NoiseEdge:
    """The rule that keeps what stands above the noise (`loralens.merging.extraction.noise_edge`).

    Attributes
    ----------
    noise : str
        ``rounding``: the noise is what rounding to the dtype of the tuned checkpoint left, √(mean ulp²/12) per entry;
        ``median``: it is unknown, and the median of all singular values says it, which takes all of them.
    """

    noise: Literal["rounding", "median"] = "rounding"


@final
@dataclass(frozen=True, slots=True)
class Triplets:
    """What was found of one difference D as it is stored; arrays are float64.

    Attributes
    ----------
    U, V : arrays, shape (rows, k), (columns, k)
    s : array
        k values, largest first; all that D has where the SVD was dense.
    whole : bool
        Whether ``s`` is all there is.
    norm : float
        ‖D‖_F, from every entry.
    noise : float
        √(mean ulp²/12) of the tuned weight: what rounding leaves on one entry.
    edge : float or None
        What singular values must exceed under `NoiseEdge`.
    error : float
        Stated error of √Σσ² of the first k, relative; 0 where the SVD was dense.
    """

    U: Floats
    V: Floats
    s: Floats
    whole: bool
    norm: float
    noise: float
    edge: float | None
    error: float

    @property
    def count(self) -> int:
        """Directions that are held."""
        return int(self.U.shape[1])

    def spectrum(self) -> Floats:
        """All singular values; those not looked at as equal ones that hold what is left of ‖D‖².

        A rule that takes none of these decides as it would on the true ones: none of them is larger than the last one
        that was looked at, and together they have the same energy.
        """
        if self.whole or not self.s.size:
            return self.s
        rest = max(self.norm**2 - float(self.s @ self.s), 0.0)
        missing = min(len(self.U), len(self.V)) - self.s.size
        value = min(sqrt(rest / missing), float(self.s[-1]))
        return np.concatenate([self.s, np.full(missing, value)])

    def above(self) -> int:
        """Directions above the edge."""
        assert self.edge is not None
        return int(np.count_nonzero(self.s > self.edge))

    def factors(self, rank: int, dtype: np.dtype[np.generic]) -> tuple[Array, Array]:
        """Left (rows, rank) and right (columns, rank) whose product is nearest to D; balanced, rounded once.

        Zeros where D has fewer directions.
        """
        k = min(rank, self.count)
        root = np.sqrt(self.s[:k])
        found = (self.U[:, :k] * root, self.V[:, :k] * root)
        padded = (np.pad(X, ((0, 0), (0, rank - k))) for X in found)
        left, right = (X.astype(dtype) for X in padded)
        return left, right


def triplets(
    name: str,
    difference: Difference,
    rule: Rule | NoiseEdge,
    *,
    count: int | None = None,
    exact: bool = False,
    threads: int = 1,
) -> Triplets:
    """The leading triplets of a difference: so many that the rule is sure, or that one budget over all asks for.

    Parameters
    ----------
    name : str
        Of the module: it seeds the start, so that a module gives the same numbers in any company.
    difference : Difference
    rule : Rule or NoiseEdge
    count : int or None
        Directions to look at first.
    exact : bool
        The dense SVD of LAPACK in float64. It is taken for small matrices anyway.
    threads : int
        For the products with D.

    Raises
    ------
    FormatError
        NaN or infinity in the difference.

    Notes
    -----
    Otherwise D is held in float32, rounded once from the float64 difference, and `leading` is asked for 16, 32, 64 …
    directions. Its values are never above the true ones by more than 2⁻²⁰σ₁, so below that no edge is believed;
    one within its own error of an edge may fall on either side.
    """
    rows, columns = difference.stored
    most = min(rows, columns)
    k = min(most, count or (int(rule.value) if isinstance(rule, Rule) and rule.name == "rank" else START))
    if not difference.differs():
        return Triplets(np.zeros((rows, 0)), np.zeros((columns, 0)), np.zeros(0), True, 0.0, 0.0, None, 0.0)
    held: Float = holds((rows, columns), k, exact=exact)
    D, norm, noise = _read(difference, held, name)
    device = Device("cpu", threads)
    while True:
        dense = is_dense((rows, columns), k, exact=exact)
        if dense and held == "float32":
            held = "float64"
            D, norm, noise = _read(difference, held, name)
        rng = np.random.default_rng(int.from_bytes(sha256(name.encode()).digest()[:8], "little"))
        found = leading(D, most if dense else k, rng=rng, device=device, exact=exact)
        positive = found.s > 0
        s = found.s[positive]
        error = float(np.linalg.norm(found.error[:k])) / float(np.linalg.norm(s[:k]))
        edge = _edge(rule, difference, D, s, noise, dense=dense, device=device) if isinstance(rule, NoiseEdge) else None
        got = Triplets(found.U[:, positive], found.V[:, positive], s, dense, norm, noise, edge, error)
        wanted = _wanted(got, rule)
        if dense:
            keep = min(max(k, wanted), s.size)
            return Triplets(got.U[:, :keep].copy(), got.V[:, :keep].copy(), s, dense, norm, noise, edge, error)
        if count or wanted < k or (wanted == k and isinstance(rule, Rule) and rule.name in SETTLED):
            return got
        k = min(2 * k, most)


def _wanted(found: Triplets, rule: Rule | NoiseEdge) -> int:
    """Directions that a rule which looks at this module alone takes; 0 for a budget."""
    if isinstance(rule, NoiseEdge):
        return found.above()
    return 0 if rule.budget else rule.rank_of(found.spectrum())


def _edge(
    rule: NoiseEdge, difference: Difference, D: Array, s: Floats, noise: float, *, dense: bool, device: Device
) -> float:
    shape = difference.stored
    if rule.noise == "median":
        return median_threshold(_median(D, s, dense=dense), shape)
    floor = 0.0 if dense else ROUNDING * float(s[0])
    N = _drawn(difference, holds(shape, 1))
    largest = float(leading(N, 1, rng=np.random.default_rng(1), device=device).s[0])
    return max(drawn_threshold(largest, shape), known_threshold(noise, shape), floor)


def _drawn(difference: Difference, held: Float) -> Array:
    """Rounding noise as the tuned weight may have it: ulp times a number from (−½, ½) in every entry."""
    rng = np.random.default_rng(0)
    N = np.empty(difference.stored, held)
    for part, _, tuned in difference.blocks():
        N[part] = ulp(tuned, tuned.dtype) * (rng.random(tuned.shape) - 0.5)
    return N


def _median(D: Array, s: Floats, *, dense: bool) -> float:
    """Of all min(m, n) singular values: those of a dense SVD, else by way of the smaller Gram matrix, in float64.

    A Gram matrix is good for values above 1e-8·σ₁.
    """
    least = min(D.shape)
    if dense:
        return float(np.median(np.pad(s, (0, least - s.size))))
    X = D if D.shape[1] == least else D.T
    gram = np.zeros((least, least))
    for start in range(0, len(X), least):
        block = X[start : start + least].astype(np.float64)
        gram += block.T @ block
    return float(np.median(np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0))))


def _read(difference: Difference, held: Float, name: str) -> tuple[Array, float, float]:
    """D in the dtype asked for, ‖D‖_F and the level of the rounding noise, in one pass over both weights."""
    rng = np.random.default_rng(0)
    size = difference.stored[0] * difference.stored[1]
    D = np.empty(difference.stored, held)
    energy = noise = 0.0
    count = 0
    for part, block, tuned in difference.blocks():
        D[part] = block
        flat = block.reshape(-1)
        energy += float(flat @ flat)
        here = rng.integers(tuned.size, size=-(-SAMPLE * tuned.size // size))
        noise += float(np.sum(ulp(tuned.reshape(-1)[here], tuned.dtype) ** 2))
        count += here.size
    if not np.isfinite(energy):
        raise FormatError(
            f"{name}: the difference holds NaN or infinity", fix="one of the checkpoints is damaged or diverged"
        )
    return D, sqrt(energy), sqrt(noise / count / 12)


def measured_error(difference: Difference, left: Array, right: Array) -> float:
    """‖D − left·rightᵀ‖_F in float64, from every entry of both weights, the factors as they are."""
    L, R = left.astype(np.float64), right.astype(np.float64).T
    total = 0.0
    for part, block, _ in difference.blocks():
        block -= L[part] @ R
        flat = block.reshape(-1)
        total += float(flat @ flat)
    return sqrt(total)
