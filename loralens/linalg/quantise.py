"""A product of thin factors in whole numbers of a few bits: B A ≈ (Q_B D_B)(D_A Q_A), D diagonal.

Every direction, a column of B and a row of A, has two scales and its own number of bits b, and numbers in [−n, n],
n = 2^(b−1) − 1: symmetric, so that zeros stay zeros. Three things make the error small:

- *The factors are free.* B A = (B R)(Rᵀ A) for every rotation R of the rank index. Rounding adds noise in proportion
  to Σ_j ‖b_j‖²‖a_j‖² over the directions j. For the singular ones of k balanced directions that is Σσ², and it falls to
  its least, (Σσ)²/k, where all are equally long. Discrete Hartley matrices make them nearly so, and mix outliers
  away. Only directions of equal bits are rotated into each other. Nothing of it is stored.
- *Errors make up for errors.* The rows of A are rounded one after the other, each making up for the errors of those
  before as far as it can in ‖B (A − Â)‖_F (Babai's nearest plane; GPTQ does the same over the inputs of a weight).
  Then B is fitted to Â by least squares and rounded alike, then A to that, while it helps.
- *Scales are searched.* Each is the best of twelve clips of the largest value, fitted by least squares.

On 24 real adapters the error at 8 and 4 bits is between a quarter (graded spectra) and nine tenths (flat ones) of that
of singular factors rounded by their largest values; at rank 1 there is nothing to turn. A middle matrix of k × k
float32 numbers between the sides would take another 1 to 8 % of the error at 4 bits and 4 to 18 % at 2; in layers of
usual width its bytes buy more as bits, so there is none.
"""

from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from loralens.errors import FormatError, OptionError
from loralens.linalg.factor import Array, Floats
from loralens.linalg.packing import FEWEST, MOST, Numbers
from loralens.linalg.product import product_norm, product_svd

# ‖x − x̂‖² / ‖x‖² of Gaussian numbers under the best step, for b = 2 to 16: one side of a direction.
SIDE = (
    *(1.9017e-1, 4.6860e-2, 1.2889e-2, 3.6932e-3, 1.0693e-3, 3.0862e-4, 8.8308e-5, 2.5008e-5),
    *(7.0096e-6, 1.9462e-6, 5.3578e-7, 1.4640e-7, 3.9744e-8, 1.0728e-8, 2.8810e-9),
)
CLIPS = np.geomspace(1.0, 0.25, 12)
LARGEST = float(np.finfo(np.float32).max) * 2.0**-20  # of a factor's length: errors made up for add to it
ROUNDS, ENOUGH = 3, 0.01  # times that both sides are fitted once more, and the gain below which that ends
RIDGE = 1e-6  # of the Gram matrix: keeps errors of directions that hardly count from being blown up a thousandfold


def expected_noise(bits: int) -> float:
    """‖σuvᵀ − Q‖² / σ² to expect of one direction alone at ``bits``: 1 − (1 − d_b)²; 1 for 0 bits, one left out.

    d_b is the distortion of Gaussian numbers under the best uniform quantiser of 2^b − 1 levels (`SIDE`); the two sides
    are shrunk to their least squares fit, so the noise is what their product lacks. Directions rotated into each other
    lose less, those with outliers more.
    """
    return 1.0 if bits == 0 else 1.0 - (1.0 - SIDE[bits - FEWEST]) ** 2


@final
@dataclass(frozen=True, slots=True)
class Quantised:
    """A product in whole numbers.

    Attributes
    ----------
    bits : uint8 array, shape (k,)
        Bits of each direction.
    out_scales, in_scales : float32 arrays, shape (k,)
    Q_B : int16 array, shape (m, k)
    Q_A : int16 array, shape (k, n)
    """

    bits: NDArray[np.uint8]
    out_scales: NDArray[np.float32]
    in_scales: NDArray[np.float32]
    Q_B: Numbers
    Q_A: Numbers

    @property
    def B(self) -> NDArray[np.float32]:
        """Q_B D_B, float32, shape (m, k): one rounding."""
        return self.Q_B.astype(np.float32) * self.out_scales

    @property
    def A(self) -> NDArray[np.float32]:
        """D_A Q_A, float32, shape (k, n): one rounding."""
        return self.Q_A.astype(np.float32) * self.in_scales[:, None]


def quantise_product(B: Array, A: Array, bits: Array) -> Quantised:
    """``B @ A`` in whole numbers of as many bits as each of its singular directions is given.

    Parameters
    ----------
    B : array, shape (m, r), any float dtype
    A : array, shape (r, n), any float dtype
    bits : integer array, shape (k,), k ≤ min(m, r, n)
        Of the leading singular directions, largest first, 2 to 16 each; those not named are left out. 0 leaves one out.

    Returns
    -------
    Quantised
        As many directions as have bits, in the order of ``bits``, those of equal bits rotated into each other if that
        is the smaller error.

    Raises
    ------
    OptionError
        Bits that are none of these, or of more directions than there are.
    ShapeError, FormatError
        As `product_singular_values`; FormatError too where a scale exceeds float32.

    Notes
    -----
    O((m + n) r²) work and a few dozen passes over the factors.
    """
    bits = np.asarray(bits, np.int64)
    most = min(*B.shape, A.shape[1])
    if bits.ndim != 1 or bits.size > most or not np.isin(bits, [0, *range(FEWEST, MOST + 1)]).all():
        raise OptionError(
            f"{bits.tolist()} are no bits of at most {most} directions", fix=f"give each 0, or {FEWEST} to {MOST}"
        )
    U, s, Vh = product_svd(B, A)
    kept = np.flatnonzero(bits)
    root, widths = np.sqrt(s[kept]), bits[kept]
    if root.max(initial=0.0) > LARGEST:
        raise FormatError(f"a factor of length {root.max():.1e} has no float32 scale", fix="use an earlier checkpoint")
    X, Y = U[:, kept] * root, Vh[kept].T * root
    turned = [(X @ R, Y @ R) for R in (np.eye(kept.size), _rotation(widths))]
    best = min((_Trial.of(X, Y, widths, _lines(Y, X.T @ X, widths)) for X, Y in turned), key=lambda trial: trial.error)
    for _ in range(ROUNDS):
        again = best.again(widths)
        gain, best = 1 - again.error / (best.error or 1.0), min(best, again, key=lambda trial: trial.error)
        if gain < ENOUGH:
            break
    return best.quantised(widths)


def _rotation(bits: Array) -> Floats:
    """Discrete Hartley matrices on the directions of equal bits; each symmetric, orthogonal, |entry| ≤ √(2/k)."""
    R = np.zeros((bits.size, bits.size))
    for b in np.unique(bits):
        group = np.flatnonzero(bits == b)
        turn = 2 * np.pi / group.size * (np.outer(np.arange(group.size), np.arange(group.size)) % group.size)
        R[np.ix_(group, group)] = (np.cos(turn) + np.sin(turn)) / np.sqrt(group.size)
    return R


class Lines(NamedTuple):
    """Columns in whole numbers: Q (m, k) int16, and a float32 scale for each."""

    Q: Numbers
    scales: NDArray[np.float32]

    @property
    def values(self) -> Floats:
        """What they stand for, float64."""
        return self.Q.astype(np.float64) * self.scales.astype(np.float64)


class _Trial(NamedTuple):
    """X Yᵀ, and what its sides became: the second was rounded, and then the first fitted to it."""

    X: Floats
    Y: Floats
    first: Lines
    second: Lines
    error: float

    @classmethod
    def of(cls, X: Floats, Y: Floats, bits: Array, second: Lines) -> "_Trial":
        """X rounded beside this second side, and ‖X Yᵀ − X̂ Ŷᵀ‖_F."""
        first = _fitted(X, Y, second.values, bits)
        return cls(X, Y, first, second, product_norm(np.hstack([X, -first.values]), np.hstack([Y, second.values]).T))

    def again(self, bits: Array) -> "_Trial":
        """Both sides once more, each fitted to what the other has become."""
        return _Trial.of(self.X, self.Y, bits, _fitted(self.Y, self.X, self.first.values, bits))

    def quantised(self, bits: Array) -> Quantised:
        """Both sides as a product B A."""
        (Q_B, out_scales), (Q_A, in_scales) = self.first, self.second
        return Quantised(bits.astype(np.uint8), out_scales, in_scales, Q_B, np.ascontiguousarray(Q_A.T))


def _fitted(X: Floats, Y: Floats, Z: Floats, bits: Array) -> Lines:
    """The side X in whole numbers, so that X̂ Zᵀ is near X Yᵀ: the least squares side X Yᵀ Z (ZᵀZ)⁻¹, rounded."""
    G: Floats = np.asarray(Z.T @ Z, np.float64)
    return _lines(np.asarray(X @ ((Y.T @ Z) @ _inverse(G)), np.float64), G, bits)


def _lines(X: Floats, G: Floats, bits: Array) -> Lines:
    """Columns of X rounded one by one, the last first, so that tr (X − X̂) G (X − X̂)ᵀ is small.

    With G = L Lᵀ the trace is Σ_i ‖Σ_{j≥i} L_ji e_j‖²: column i is rounded to x_i + Σ_{j>i} (L_ji / L_ii) e_j.
    """
    unit, lengths = _unit_diagonal(G)
    L = np.linalg.cholesky(unit + RIDGE * np.eye(len(G)))
    Q, scales, errors = np.zeros(X.shape, np.int16), np.zeros(bits.size, np.float32), np.zeros_like(X)
    for i in reversed(range(bits.size)):
        wanted = X[:, i] + errors[:, i + 1 :] @ (L[i + 1 :, i] * lengths[i + 1 :] / (L[i, i] * lengths[i]))
        Q[:, i], scales[i] = _line(wanted, int(bits[i]))
        errors[:, i] = X[:, i] - Q[:, i] * np.float64(scales[i])
    return Lines(Q, scales)


def _line(x: Floats, bits: int) -> tuple[Array, np.float32]:
    """The numbers in [−n, n] and the scale with which their product is nearest to x."""
    n, largest = 2 ** (bits - 1) - 1, np.abs(x).max(initial=0.0)
    if not largest:
        return np.zeros(x.size), np.float32(0)
    unit = x / largest
    tried = np.clip(np.rint(unit * (n / CLIPS[:, None])), -n, n)  # (clips, m)
    along, squares = tried @ unit, np.einsum("cm,cm->c", tried, tried)
    best = int(np.argmax(along**2 / squares))  # of the least squares scale along / squares
    scale = np.float32(largest * (along[best] / squares[best]))
    return (np.clip(np.rint(x / np.float64(scale)), -n, n) if scale else np.zeros(x.size)), scale


def _inverse(G: Floats) -> Floats:
    """The pseudo-inverse of a Gram matrix whose diagonal may span any range."""
    unit, lengths = _unit_diagonal(G)
    inverse = np.linalg.pinv(unit, rcond=1e-12, hermitian=True)
    return np.asarray(inverse / np.outer(lengths, lengths))


def _unit_diagonal(G: Floats) -> tuple[Floats, Floats]:
    """The Gram matrix of the same columns at length 1, and their lengths, 1 for those of none."""
    lengths = np.sqrt(np.diag(G))
    lengths[lengths == 0] = 1.0
    return np.asarray(G / np.outer(lengths, lengths)), lengths
