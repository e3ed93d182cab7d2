"""The first pair of PiSSA on matrices that are too big for a dense SVD at every start."""

from typing import Any

import numpy as np
import pytest

from loralens.training.initialisation import principal_pair
from tests.draws import draw_basis

torch = pytest.importorskip("torch")

SHAPES = [(700, 600), (600, 900)]
RANK, SCALE = 8, 2.0


def spectrum(kind: str, count: int) -> Any:
    """Values that fall as those of real weights do, or hardly at all."""
    return {"falling": 30.0 / np.arange(1, count + 1) ** 0.5, "flat": np.linspace(1.02, 1.0, count)}[kind]


def weight(shape: tuple[int, int], kind: str) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(0)
    count = min(shape)
    U, V = (draw_basis(rng, side, count) for side in shape)
    s = spectrum(kind, count)
    return (U * s) @ V.T, U, s, V


@pytest.fixture
def never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a dense SVD of a big matrix")

    monkeypatch.setattr(torch.linalg, "svd", refuse)


@pytest.mark.some(1)
@pytest.mark.usefixtures("never_dense")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_pair_of_a_big_matrix_is_its_best_approximation(shape: tuple[int, int], dtype: Any) -> None:
    W, U, s, V = weight(shape, "falling")
    B, A = (factor.double().numpy() for factor in principal_pair(torch.tensor(W).to(dtype), rank=RANK, scale=SCALE))
    best = (U[:, :RANK] * s[:RANK]) @ V[:, :RANK].T
    assert np.linalg.norm(SCALE * B @ A - best) < 0.02 * np.linalg.norm(best)
    np.testing.assert_allclose(np.linalg.norm(B, axis=0), np.linalg.norm(A, axis=1), rtol=1e-4)
    np.testing.assert_allclose(SCALE * np.linalg.norm(A, axis=1) ** 2, s[:RANK], rtol=5e-3)
    assert (A.max(axis=1) == np.abs(A).max(axis=1)).all()


def test_a_weight_of_float64_has_the_exact_pair() -> None:
    W, U, s, V = weight(SHAPES[0], "falling")
    B, A = principal_pair(torch.tensor(W), rank=RANK, scale=SCALE)
    best = (U[:, :RANK] * s[:RANK]) @ V[:, :RANK].T
    np.testing.assert_allclose(SCALE * (B @ A).numpy(), best, rtol=0, atol=1e-11)
