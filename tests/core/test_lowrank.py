"""LowRank: ΔW = scale · B · A, dense and by its SVD, and what it says of itself."""

import ml_dtypes
import numpy as np
import pytest

from loralens import LoraLensError, LowRank, OptionError, ShapeError
from loralens.core import Layout, Scaling

RNG = np.random.default_rng(0)
SHAPES = [(5, 2, 7), (7, 2, 5), (3, 3, 3), (1, 1, 1), (2, 6, 3), (4, 4, 9)]  # out, r, in; once r > min(out, in)
SCALES = [1.0, 2.5, -0.5, 0.0, 1e-30, -1e30]
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def factors(out, r, in_, dtype=np.float64):
    return RNG.standard_normal((out, r)).astype(dtype), RNG.standard_normal((r, in_)).astype(dtype)


def dense(B, A, scale):
    """scale · B · A, one number after the other."""
    B, A = B.astype(float), A.astype(float)
    return np.array([[scale * sum(b * a for b, a in zip(row, column, strict=True)) for column in A.T] for row in B])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_svd_and_singular_values_agree(shape, scale, dtype):
    B, A = factors(*shape, dtype)
    module, expected = LowRank(B, A, scale), dense(B, A, scale)
    bound = 1e-12 * abs(scale) * np.linalg.norm(B.astype(float)) * np.linalg.norm(A.astype(float))
    U, s, Vh = module.svd()
    k = min(shape)
    assert (U.shape, s.shape, Vh.shape) == ((shape[0], k), (k,), (k, shape[2]))
    assert {array.dtype for array in (U, s, Vh, module.dense(), module.singular_values())} == {np.dtype(np.float64)}
    assert np.abs(module.dense() - expected).max() <= bound
    assert np.abs(U * s @ Vh - expected).max() <= bound  # a negative scale has gone into U
    assert np.abs(s - np.linalg.svd(expected, compute_uv=False)[:k]).max() <= bound
    assert np.abs(s - module.singular_values()).max() <= bound
    assert (s >= 0).all()
    assert (np.diff(s) <= 0).all()
    assert np.abs(U.T @ U - np.eye(k)).max() < 1e-12
    assert np.abs(Vh @ Vh.T - np.eye(k)).max() < 1e-12


def test_nothing_is_written_into_the_factors():
    B, A = factors(5, 2, 7)
    before = B.copy(), A.copy()
    module = LowRank(B, A, -2.0)
    module.dense(), module.svd(), module.singular_values(), module.load()
    assert (before[0] == B).all()
    assert (before[1] == A).all()


@pytest.mark.parametrize(
    ("B", "A"),
    [((5, 2), (3, 7)), ((5,), (5, 7)), ((5, 2), (2,)), ((5, 2, 1), (2, 7)), ((), ())],
)
def test_factors_that_do_not_multiply(B, A):
    with pytest.raises(ShapeError) as caught:
        LowRank(np.zeros(B), np.zeros(A))
    assert str(caught.value).startswith(f"B {B} and A {A} do not multiply\n  fix: ")


def test_load_and_rescaled_keep_the_rest():
    layout, scaling = Layout("conv", (3, 3)), Scaling("alpha/r", 4, 2)
    module = LowRank(*factors(5, 2, 9), 2.0, scaling=scaling, layout=layout)
    assert (module.load().scale, module.load().scaling) == (2.0, scaling)
    given = Scaling("given")
    assert (module.rescaled(3.0, given).scale, module.rescaled(3.0, given).scaling) == (3.0, given)
    for other in (module.load(), module.rescaled(3.0, given)):
        assert (other.layout, other.origin) == (layout, module.origin)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_factor_that_is_not_finite(value):
    B, A = factors(5, 2, 7)
    B[1, 1] = value
    for quantity in ("singular_values", "svd"):
        with pytest.raises(LoraLensError, match="NaN or Inf"):
            getattr(LowRank(B, A), quantity)()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_tensors_on_the_cpu_are_factors(dtype):
    torch = pytest.importorskip("torch")
    B, A = torch.randn(6, 2, requires_grad=True), torch.randn(5, 2).T
    update = LowRank(B.to(getattr(torch, dtype)), A.to(getattr(torch, dtype)), 0.5)
    assert (update.dtype.name, type(update.B), type(update.A)) == (dtype, np.ndarray, np.ndarray)
    wide = [factor.to(getattr(torch, dtype)).double().detach().numpy() for factor in (B, A)]
    np.testing.assert_allclose(update.dense(), 0.5 * wide[0] @ wide[1], rtol=1e-12)
    with pytest.raises(OptionError, match="B cannot be read as an array of NumPy: Cannot copy out of meta tensor"):
        LowRank(B.to("meta"), A)
