"""Hypothesis strategies: factor pairs and spectra, with the awkward cases on purpose."""

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
SCALES = (1.0, 2.0, -1.0, 0.1, -7.3, 2.0**-20)
ORDERS = ("falling", "rising", "shuffled")


def orthogonal(rng, r):
    return np.linalg.qr(rng.standard_normal((r, r)))[0]


def grading(rng, r, decades, order):
    """r numbers from 1 down to 10**-decades, in the order asked for."""
    falling = np.logspace(0, -decades, r)
    return {"falling": falling, "rising": falling[::-1], "shuffled": rng.permutation(falling)}[order]


def plain(rng, B, A):
    return B, A


def zero_B(rng, B, A):
    return 0 * B, A


def zero_columns(rng, B, A):
    B[:, rng.integers(B.shape[1])] = 0
    A[rng.integers(A.shape[0])] = 0
    return B, A


def repeated_columns(rng, B, A):
    B[:, -1], A[-1] = B[:, 0], A[0]
    return B, A


def equal_singular_values(rng, B, A):
    return np.linalg.qr(B)[0], np.linalg.qr(A.T)[0].T


def graded_B(rng, B, A):
    return B * grading(rng, len(A), rng.choice([6, 8]), rng.choice(ORDERS)), A


def graded_both(rng, B, A):
    B, _ = graded_B(rng, B, A)
    A, _ = graded_B(rng, A.T, A)
    return B, A.T


def rotated(rng, B, A):
    Q = orthogonal(rng, len(A))
    return graded_B(rng, B, A)[0] @ Q, Q.T @ A


def rotated_with_zero(rng, B, A):
    B, A = rotated(rng, B, A)
    return zero_columns(rng, B, A)


def rows_of_one_size(rng, B, A):
    return np.sign(B), np.sign(A)


CASES = (
    plain,
    zero_B,
    zero_columns,
    repeated_columns,
    equal_singular_values,
    graded_B,
    graded_both,
    rotated,
    rotated_with_zero,
    rows_of_one_size,
)


@st.composite
def factor_pairs(draw, cases=CASES, dtypes=DTYPES, largest=24):
    """B (m, r) and A (r, n) of one dtype, any of the cases; r = 1 and r > min(m, n) come up."""
    m, n, r = (draw(st.integers(1, limit)) for limit in (largest, largest, 10))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    case, scale, dtype = (draw(st.sampled_from(choices)) for choices in (cases, SCALES, dtypes))
    B, A = case(rng, rng.standard_normal((m, r)), rng.standard_normal((r, n)))
    if B.shape[1] != A.shape[0]:  # orthonormal factors of r > min(m, n) are narrower, by different amounts
        k = min(B.shape[1], A.shape[0])
        B, A = B[:, :k], A[:k]
    return (scale * B).astype(dtype), A.astype(dtype)


@st.composite
def spectra(draw, largest=12):
    """Singular values, largest first: any spread up to thirty decades, ties and zeros; the first one positive."""
    exponents = draw(st.lists(st.floats(-30, 0), min_size=1, max_size=largest))
    s = np.sort(10.0 ** np.array([0.0, *exponents]))[::-1]
    repeats, zeros = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    return np.concatenate([np.repeat(s, repeats), np.zeros(zeros)])
