"""Quantisation of a product of thin factors to integers of a few bits: B A ≈ (Q_B D_B)(D_A Q_A), D diagonal.

A direction is a column of B and the row of A that belongs to it. Each direction has two scales, a bit width b of its
own, and integers in [−n, n] with n = 2^(b−1) − 1. The range is symmetric, so that zeros stay zeros. Three steps keep
the error small:

- *Rotation.* B A = (B R)(Rᵀ A) for every rotation R of the rank index, so R may be chosen. Rounding adds noise in
  proportion to Σ_j ‖b_j‖²‖a_j‖² over the directions j. For k balanced singular directions this sum is Σσ²; it is
  smallest, (Σσ)²/k, where all directions are equally long. Discrete Hartley matrices make their lengths nearly equal
  and spread outliers. Only directions of the same bit width are rotated into each other. R is not stored.
- *Error feedback.* The rows of A are rounded one after the other. Each row compensates the errors of the rows before
  it as far as possible in ‖B (A − Â)‖_F (Babai's nearest plane; GPTQ does the same over the inputs of a weight). Then
  B is fitted to Â by least squares and rounded in the same way, then A is fitted to B̂, as long as the error falls.
- *Search of scales.* Each scale is the best of twelve clips of the largest value, fitted by least squares.

On 24 real adapters, at 8 and 4 bits, the error is between a quarter (graded spectra) and nine tenths (flat spectra) of
the error of singular factors that are rounded by their largest values. At rank 1 there is nothing to rotate. A k × k
float32 matrix between the two sides would reduce the error by another 1 to 8 % at 4 bits and 4 to 18 % at 2 bits. In
layers of usual width the same bytes reduce it more when they are spent on bits, so there is no such matrix.
"""

from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from loralens.errors import FormatError, OptionError
from loralens.linalg.factor import Array, Floats
from loralens.linalg.few_bits.packing import FEWEST, MOST, Numbers
from loralens.linalg.product import product_norm, product_svd

# ‖x − x̂‖² / ‖x‖² of Gaussian numbers under the best step, for b = 2 to 16: one side of a direction.
SIDE = (
    *(1.9017e-1, 4.6860e-2, 1.2889e-2, 3.6932e-3, 1.0693e-3, 3.0862e-4, 8.8308e-5, 2.5008e-5),
    *(7.0096e-6, 1.9462e-6, 5.3578e-7, 1.4640e-7, 3.9744e-8, 1.0728e-8, 2.8810e-9),
)
# At 2 bits the best step of a Gaussian column is about a third of its largest value, at more bits it is nearer to 1.
CLIPS = np.geomspace(1.0, 0.25, 12)  # shares of the largest value at which the numbers are clipped
# The largest length of a factor's column. Error feedback adds to the columns, so the limit leaves a factor of 2²⁰.
LARGEST = float(np.finfo(np.float32).max) * 2.0**-20
# Every round costs another fit of both sides, so the search ends where that hardly helps.
ROUNDS, ENOUGH = 3, 0.01  # most rounds of fitting both sides again, and the relative gain below which they end
# Added to the Gram matrix, so that the errors of directions that hardly count are not magnified a thousandfold.
RIDGE = 1e-6


def expected_noise(bits: int) -> float:
    """Expected ‖σuvᵀ − Q‖² / σ² of a single direction at ``bits``: 1 − (1 − d_b)², and 1 at 0 bits (left out).

    d_b is the distortion of Gaussian numbers under the best uniform quantiser of 2^b − 1 levels (`SIDE`). Both sides
    are shrunk to their least squares fit, so the noise is the part that their product lacks. Directions that are
    rotated into each other lose less, directions with outliers lose more.
    """
    return 1.0 if bits == 0 else 1.0 - (1.0 - SIDE[bits - FEWEST]) ** 2


@final
@dataclass(frozen=True, slots=True)
class Quantised:
    """A product of thin factors in integers.

    Attributes
    ----------
    bits : uint8 array, shape (k,)
        Bit width of each direction.
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
        """Q_B D_B, float32, shape (m, k), with one rounding of each entry."""
        return self.Q_B.astype(np.float32) * self.out_scales

    @property
    def A(self) -> NDArray[np.float32]:
        """D_A Q_A, float32, shape (k, n), with one rounding of each entry."""
        return self.Q_A.astype(np.float32) * self.in_scales[:, None]


def quantise_product(B: Array, A: Array, bits: Array) -> Quantised:
    """Quantise ``B @ A`` to integers, with a bit width for each of its singular directions.

    Parameters
    ----------
    B : array, shape (m, r), any float dtype
    A : array, shape (r, n), any float dtype
    bits : integer array, shape (k,), k ≤ min(m, r, n)
        Bit widths of the leading singular directions, largest first: 2 to 16, or 0 to leave a direction out. Directions
        behind the k-th are left out too.

    Returns
    -------
    Quantised
        The directions whose bit width is not 0, in the order of ``bits``. Directions of one bit width are rotated into
        each other if that reduces the error.

    Raises
    ------
    OptionError
        A bit width is not allowed, or there are more bit widths than directions.
    ShapeError, FormatError
        As `product_singular_values`. FormatError also if a scale exceeds the range of float32.

    Notes
    -----
    O((m + n) r²) work and a few dozen passes over the factors.
    """
    bits = np.asarray(bits, np.int64)
    most = min(*B.shape, A.shape[1])
    if bits.ndim != 1 or bits.size > most or not np.isin(bits, [0, *range(FEWEST, MOST + 1)]).all():
        raise OptionError(
            f"{bits.tolist()} are not the bit widths of at most {most} directions",
            fix=f"give each direction 0, or {FEWEST} to {MOST}",
        )
    U, s, Vh = product_svd(B, A)
    indices = np.flatnonzero(bits)
    root, widths = np.sqrt(s[indices]), bits[indices]
    if root.max(initial=0.0) > LARGEST:
        raise FormatError(f"a factor of length {root.max():.1e} has no float32 scale", fix="use an earlier checkpoint")
    X, Y = U[:, indices] * root, Vh[indices].T * root
    # Both are tried: rotating helps flat spectra, and hurts where one direction stands alone.
    turned = [(X @ R, Y @ R) for R in (np.eye(indices.size), _rotation(widths))]
    best = min(
        (_Trial.of(X, Y, widths, _round_columns(Y, X.T @ X, widths)) for X, Y in turned), key=lambda trial: trial.error
    )
    for _ in range(ROUNDS):
        again = best.again(widths)
        # `or 1.0`: an error of 0 cannot be improved and must not be divided by.
        gain, best = 1 - again.error / (best.error or 1.0), min(best, again, key=lambda trial: trial.error)
        if gain < ENOUGH:
            break
    return best.quantised(widths)


def _rotation(bits: Array) -> Floats:
    """Block-diagonal rotation: a discrete Hartley matrix (symmetric, |entry| ≤ √(2/k)) for each bit width."""
    R = np.zeros((bits.size, bits.size))
    for b in np.unique(bits):
        group = np.flatnonzero(bits == b)
        # The product is reduced modulo the size first, so that large angles lose no digits.
        turn = 2 * np.pi / group.size * (np.outer(np.arange(group.size), np.arange(group.size)) % group.size)
        R[np.ix_(group, group)] = (np.cos(turn) + np.sin(turn)) / np.sqrt(group.size)
    return R


class QuantisedColumns(NamedTuple):
    """Columns in integers: Q (m, k) int16, and a float32 scale for each column."""

    Q: Numbers
    scales: NDArray[np.float32]

    @property
    def values(self) -> Floats:
        """The columns that Q and the scales stand for, float64, shape (m, k)."""
        return self.Q.astype(np.float64) * self.scales.astype(np.float64)


class _Trial(NamedTuple):
    """One quantisation of X Yᵀ: the second side was rounded, then the first was fitted to it and rounded."""

    X: Floats
    Y: Floats
    first: QuantisedColumns
    second: QuantisedColumns
    error: float

    @classmethod
    def of(cls, X: Floats, Y: Floats, bits: Array, second: QuantisedColumns) -> "_Trial":
        """Fit and round X for this second side, and measure the error ‖X Yᵀ − X̂ Ŷᵀ‖_F."""
        first = _fit_and_round(X, Y, second.values, bits)
        return cls(X, Y, first, second, product_norm(np.hstack([X, -first.values]), np.hstack([Y, second.values]).T))

    def again(self, bits: Array) -> "_Trial":
        """Fit and round both sides once more, each to the rounded other side."""
        return _Trial.of(self.X, self.Y, bits, _fit_and_round(self.Y, self.X, self.first.values, bits))

    def quantised(self, bits: Array) -> Quantised:
        """The two sides as a `Quantised` product B A."""
        (Q_B, out_scales), (Q_A, in_scales) = self.first, self.second
        return Quantised(bits.astype(np.uint8), out_scales, in_scales, Q_B, np.ascontiguousarray(Q_A.T))


def _fit_and_round(X: Floats, Y: Floats, Z: Floats, bits: Array) -> QuantisedColumns:
    """Integers for the side X such that X̂ Zᵀ is near X Yᵀ: the least squares solution X Yᵀ Z (ZᵀZ)⁻¹, rounded."""
    G: Floats = np.asarray(Z.T @ Z, np.float64)
    # Scaled to a unit diagonal first: rcond then drops columns that depend on others, not columns that are only short.
    unit, lengths = _scale_to_unit_diagonal(G)
    inverse = np.linalg.pinv(unit, rcond=1e-12, hermitian=True) / np.outer(lengths, lengths)
    return _round_columns(np.asarray(X @ ((Y.T @ Z) @ inverse), np.float64), G, bits)


def _round_columns(X: Floats, G: Floats, bits: Array) -> QuantisedColumns:
    """Round the columns of X one by one, the last one first, so that tr (X − X̂) G (X − X̂)ᵀ is small.

    With G = L Lᵀ the trace is Σ_i ‖Σ_{j≥i} L_ji e_j‖²: column i is rounded to x_i + Σ_{j>i} (L_ji / L_ii) e_j.
    """
    unit, lengths = _scale_to_unit_diagonal(G)
    L = np.linalg.cholesky(unit + RIDGE * np.eye(len(G)))
    Q, scales, errors = np.zeros(X.shape, np.int16), np.zeros(bits.size, np.float32), np.zeros_like(X)
    for i in reversed(range(bits.size)):
        target = X[:, i] + errors[:, i + 1 :] @ (L[i + 1 :, i] * lengths[i + 1 :] / (L[i, i] * lengths[i]))
        Q[:, i], scales[i] = round_column(target, int(bits[i]))
        errors[:, i] = X[:, i] - Q[:, i] * np.float64(scales[i])
    return QuantisedColumns(Q, scales)


def round_column(x: Floats, bits: int) -> tuple[Array, np.float32]:
    """The integers in [−n, n] and the scale whose product is nearest to x, among the clips that are tried."""
    n, largest = 2 ** (bits - 1) - 1, np.abs(x).max(initial=0.0)
    if not largest:
        return np.zeros(x.size), np.float32(0)
    unit = x / largest
    tried = np.clip(np.rint(unit * (n / CLIPS[:, None])), -n, n)  # (clips, m)
    along, squares = tried @ unit, np.einsum("cm,cm->c", tried, tried)
    # The error of a clip under its own least squares scale is ‖x‖² − along²/squares.
    best = int(np.argmax(along**2 / squares))  # of the least squares scale along / squares
    scale = np.float32(largest * (along[best] / squares[best]))
    return (np.clip(np.rint(x / np.float64(scale)), -n, n) if scale else np.zeros(x.size)), scale


def _scale_to_unit_diagonal(G: Floats) -> tuple[Floats, Floats]:
    """The Gram matrix of the columns scaled to length 1, and their lengths (1 for a zero column)."""
    lengths = np.sqrt(np.diag(G))
    # A direction rounded to zero stays zero instead of dividing by it.
    lengths[lengths == 0] = 1.0
    return np.asarray(G / np.outer(lengths, lengths)), lengths
