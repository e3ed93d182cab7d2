"""The sketch of an update: against its definition entry by entry, linear, and with the same bits everywhere."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

import loralens
from loralens.fleet.measuring import measure_adapter
from loralens.fleet.sketches import WIDTH, Sketches, fold, to_codes
from loralens.fleet.tensor_sketch import BucketHash, TensorSketch, bucket_hashes
from tests.draws import draw_factors
from tests.fleet.makers import random_adapter
from tests.fleet.synthetic import dense_cosine

RNG = np.random.default_rng(5)


def bucket_hash(key: str, side: str, size: int, width: int) -> BucketHash:
    hashes = bucket_hashes([key], side, size, width)
    return BucketHash(hashes.positions[0], hashes.signs[0], hashes.most)


def by_definition(key: str, matrix: np.ndarray) -> np.ndarray:
    """Σ s(o) s(i) ΔW[o, i] in bucket h(o) + h(i), entry by entry."""
    rows, columns = (
        bucket_hash(key, side, size, WIDTH) for side, size in zip(("out", "in"), matrix.shape, strict=True)
    )
    total = np.zeros(WIDTH)
    for (o, i), value in np.ndenumerate(matrix):
        bucket = (rows.positions[o] + columns.positions[i]) % WIDTH
        total[bucket] += float(rows.signs[o]) * float(columns.signs[i]) * value
    return total


def sketch_of(B: np.ndarray, A: np.ndarray, scale: float = 1.0, key: str = "q") -> np.ndarray:
    sketch = TensorSketch()
    sketch.add_pair(key, B, A, scale)
    return sketch.total()


def relative(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


@pytest.mark.parametrize("rank", [1, 3, 32, 33, 70])
@pytest.mark.parametrize("scale", [1.0, -0.37])
def test_a_pair_is_sketched_as_its_product(rank: int, scale: float) -> None:
    B, A = draw_factors(RNG, 20, 30, rank, np.float16)
    expected = by_definition("q", scale * (B.astype(float) @ A.astype(float)))
    assert relative(sketch_of(B, A, scale), expected) < 1e-3


def test_a_full_matrix_is_sketched_exactly() -> None:
    matrix = RNG.standard_normal((40, 50))
    sketch = TensorSketch()
    sketch.add_dense("q", matrix)
    np.testing.assert_allclose(sketch.total(), by_definition("q", matrix), rtol=0, atol=1e-12)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e5])
def test_columns_of_very_different_size(spread: float) -> None:
    """Where columns of B are large their rows of A may be small: only the products count."""
    sizes = np.geomspace(1, spread, 6)
    B, A = RNG.standard_normal((20, 6)) * sizes, RNG.standard_normal((6, 30)) / sizes[:, None]
    assert relative(sketch_of(B, A), by_definition("q", B @ A)) < 1e-3


@pytest.mark.parametrize(("rank", "scale"), [(20, 0.5), (4, 2.0**20)])
def test_modules_that_cannot_be_rounded_together_are_rounded_as_if_alone(rank: int, scale: float) -> None:
    """Together they have more than 32 columns, or the second is so large that the first would lose its digits."""
    B, A = draw_factors(RNG, 64, 64, rank)
    sketch = TensorSketch()
    sketch.add_pair("q", B, A, 1.0)
    sketch.add_pair("k", B, A, scale)
    np.testing.assert_array_equal(sketch.total(), sketch_of(B, A) + sketch_of(B, A, scale, "k"))


def test_numbers_near_the_ends_of_the_range() -> None:
    B, A = draw_factors(RNG, 8, 8, 2)
    for size in (2.0**-300, 2.0**300):
        np.testing.assert_array_equal(sketch_of(size * B, A), size * sketch_of(B, A))


# Factors from raw random bits, since distributions of NumPy may change with its version.
RECORDED = "716649ba27922b282fdef745686daad158c29610e3ce94f4dc9293adcce209f1"
DIGEST = """
import hashlib, loralens, numpy as np
from loralens.fleet.measuring import measure_adapter

def numbers(seed, *shape):
    raw = np.random.Philox(key=seed).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(40)).astype(np.float32) / 2**23 - 1).reshape(shape)

modules = {f"layers.{i}.q": loralens.LowRank(numbers(i, 64, 9), numbers(9 + i, 9, 96), 0.7) for i in range(9)}
sketch = measure_adapter(loralens.Adapter(modules=modules)).sketch
print(hashlib.sha256(sketch.codes.tobytes() + sketch.start.tobytes() + sketch.step.hex().encode()).hexdigest())
"""


@pytest.mark.some(1)
@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        pytest.param({"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4"}, marks=pytest.mark.slow),
        {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "AVX2 AVX512F AVX512CD AVX512_SKX"},
    ],
)
def test_the_bits_do_not_depend_on_threads_and_processors(environment: dict[str, str]) -> None:
    settings = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", DIGEST], env=settings, capture_output=True, text=True)
    assert done.stdout.strip() == RECORDED, done.stderr


def test_inner_products_of_sketches_estimate_those_of_updates() -> None:
    first = random_adapter(1, out=200, in_=300)
    second = first + random_adapter(2, out=200, in_=300)
    sketches = [measure_adapter(each).sketch for each in (first, second, random_adapter(3, out=200, in_=300))]
    stacked = Sketches(
        np.stack([each.codes for each in sketches]),
        np.array([each.step for each in sketches]),
        np.stack([each.start for each in sketches]),
    )
    for width, error in ((4096, 0.04), (1024, 0.09)):
        directions = stacked.directions(width)
        assert directions[0] @ directions[1] == pytest.approx(dense_cosine(first, second)[0], abs=error)
        assert directions[0] @ directions[2] == pytest.approx(0, abs=error)
    length = sketches[0].step * np.linalg.norm(sketches[0].codes.astype(float))
    norm = np.sqrt(sum(module.dense().ravel() @ module.dense().ravel() for _, module in first.items()))
    assert length == pytest.approx(norm, rel=0.06)


def test_a_sketch_folds_to_that_of_a_shorter_width() -> None:
    B, A = draw_factors(RNG, 40, 50, 4)
    whole = sketch_of(B, A)
    hashes = {side: bucket_hash("q", side, size, WIDTH) for side, size in (("out", 40), ("in", 50))}
    expected = np.zeros(512)
    for (o, i), value in np.ndenumerate(B @ A):
        out, in_ = hashes["out"], hashes["in"]
        expected[(out.positions[o] + in_.positions[i]) % 512] += float(out.signs[o] * in_.signs[i]) * value
    assert relative(whole.reshape(8, 512).sum(axis=0), expected) < 1e-3
    codes, step = to_codes(whole)
    assert relative(step * fold(codes, 512).astype(float), expected) < 0.05
    assert step * codes.astype(float) == pytest.approx(whole, abs=step / 2 + 1e-12)


def test_nan_is_refused_and_never_a_code() -> None:
    for factor in ("B", "A"):
        broken = random_adapter(1).map(
            lambda module: loralens.LowRank(
                module.B * (np.float32(np.nan) if factor == "B" else 1),  # noqa: B023
                module.A * (np.float32(np.inf) if factor == "A" else 1),  # noqa: B023
            )
        )
        with pytest.raises(loralens.FormatError, match="NaN or Inf"):
            measure_adapter(broken)


def test_hashes_are_balanced_and_differ_by_key_side_and_size() -> None:
    one = bucket_hash("q", "in", 4000, 4096)
    assert abs(one.signs.mean()) < 0.06
    assert one.positions.min() >= 0
    assert np.bincount(one.positions // 512).std() < 60
    assert one.most == np.bincount(one.positions).max()
    for other in (bucket_hash("k", "in", 4000, 4096), bucket_hash("q", "out", 4000, 4096)):
        assert np.mean(other.positions == one.positions) < 0.01
    assert np.mean(bucket_hash("q", "in", 3999, 4096).positions == one.positions[:3999]) < 0.01
    large = bucket_hash("q", "in", 5000, 4096)
    assert hashlib.sha256(large.positions.astype("<i8").tobytes()).hexdigest()[:16] == "434c76185608862d"
