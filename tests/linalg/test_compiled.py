"""The compiled loops against NumPy and ml_dtypes, bit for bit; nothing is compared where they were not compiled."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens.arithmetic import elementwise_methods as della
from loralens.arithmetic.elementwise import Workspace
from loralens.arithmetic.elementwise_methods import elected_mean
from loralens.core.adapter import Adapter
from loralens.core.fingerprint import fingerprint
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank
from loralens.errors import FormatError
from loralens.fleet.sketching.measures import measure_adapter
from loralens.linalg.compiled import loops
from loralens.linalg.exact import exact_product
from loralens.linalg.factor import FactorsSideBySide, blocks_of, gram, gram_of_bfloat16, gram_of_block
from loralens.merging.apply import prepare_merge
from loralens.merging.plan import Slab, TensorPlan
from loralens.merging.record import MergeRecorder
from loralens.merging.undo.patch import PatchReader, PatchWriter

BF16 = ml_dtypes.bfloat16
compiled = pytest.mark.skipif(loops._loops is None, reason="the kernel was not compiled")


@pytest.fixture
def by_numpy(monkeypatch: pytest.MonkeyPatch):
    """A function that runs another one without the kernel."""

    def run(function, *arguments, **options):
        with monkeypatch.context() as without:
            without.setattr(loops, "_loops", None)
            return function(*arguments, **options)

    return run


def _every_kind(count: int = 100_003):
    """W in bfloat16 and D in float32 with all exponents, infinities, NaN, zeros of both signs, and ties."""
    rng = np.random.default_rng(1)
    W = rng.integers(1 << 16, size=count, dtype=np.uint16)
    D = rng.integers(1 << 32, size=count, dtype=np.uint32)
    near = (rng.integers(0, 40, count // 2) << 14).astype(np.uint32)
    D[: count // 2] = (W[: count // 2].astype(np.uint32) << 16) - near
    W[:6], D[:6] = [0x8000, 0, 0x7F80, 0xFF80, 0x7FC1, 0x3F80], [0, 0x80000000, 0xFF800000, 0, 0, 0x3B800000]
    return W.view(BF16), D.view(np.float32)


@compiled
@pytest.mark.parametrize("count", [0, 1, 3, 63, 64, 65, 1000, 100_003])
@pytest.mark.parametrize("search", [False, True])
def test_merged_weights_are_those_of_numpy_for_numbers_of_every_kind(count, search):
    W, D = (array[:count] for array in _every_kind())
    # the first half differs seldom, so that the places are found, and the second often, so that they are too many
    D = np.where(np.arange(count) % 50 == 0, D, 0).astype(np.float32) if count <= 1000 else D
    lost = np.empty(W.shape, np.float32)
    merged, unmoved, differences = loops.merge_entries_with(W, D, lost=lost, search=search)
    with np.errstate(all="ignore"):
        total = W.astype(np.float32) + D
        expected = total.astype(BF16)
        loss = expected.astype(np.float32) - total
        R = (expected.astype(np.float32) - D).astype(BF16).view(np.uint16)
    assert np.array_equal(merged.view(np.uint16), expected.view(np.uint16))
    assert np.array_equal(lost, loss, equal_nan=True)
    assert unmoved == np.count_nonzero(expected.view(np.uint16) == W.view(np.uint16))
    places = np.flatnonzero(W.view(np.uint16) != R)
    if search and places.size <= count // loops.FEW + 1:
        assert np.array_equal(differences[0], places)
        assert np.array_equal(differences[1], R[places])
    else:
        assert differences is None
    assert (differences is None) == (not search or count > 1000)
    assert np.array_equal(loops.merge_entries_with(W, D, lost=None, search=search)[0].view("u2"), merged.view("u2"))


@compiled
def test_the_subtraction_is_that_of_numpy():
    W, D = _every_kind()
    with np.errstate(all="ignore"):
        expected = (W.astype(np.float32) - D).astype(BF16)
    assert np.array_equal(loops.subtract_and_round(W, D).view(np.uint16), expected.view(np.uint16))


@compiled
def test_the_loss_at_the_places_of_a_sample_is_that_of_the_rounded_sum():
    W, D = _every_kind()
    W[10:14], D[10:14] = [1e-39, 0, -1e-40, 1e-38], [3e-40, 1e-41, 1e-39, -1e-40]  # below the smallest normal number
    sample = np.concatenate([np.arange(20), np.random.default_rng(5).integers(W.size, size=50_000)])
    lost, d, finite, still = loops.predict(W, D, sample)
    with np.errstate(all="ignore"):
        w, expected = W[sample].astype(np.float64), D[sample].astype(np.float64)
        arrives = (W[sample].astype(np.float32) + D[sample]).astype(BF16).astype(np.float64) - w
        loss = expected - arrives
    known = np.isfinite(w) & np.isfinite(loss)
    assert finite == np.count_nonzero(known)
    assert still == np.count_nonzero(known & (arrives == 0))
    assert np.array_equal(lost, np.where(known, loss, 0))
    assert np.array_equal(d, np.where(known, expected, 0))


@compiled
def test_places_outside_of_the_arrays_are_refused():
    W, D, two = np.zeros(8, np.uint16), np.zeros(8, np.float32), np.zeros(2)
    for outside in (-1, 8):
        with pytest.raises(ValueError, match="sizes"):
            loops._loops.predict(W, D, np.array([0, outside]), two, two.copy())


@compiled
@pytest.mark.parametrize(("rows", "columns"), [(64, 4096), (6, 32), (7, 33), (61, 1000), (5, 40), (40, 31)])
@pytest.mark.parametrize("rank", [1, 16, 130])
@pytest.mark.parametrize("slices", [1, 2])
def test_the_product_is_the_exact_one(rows, columns, rank, slices, by_numpy):
    rng = np.random.default_rng(rank)
    term = (0.5, rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns)))
    product = exact_product([term], slices=slices)
    D, expected = product.dense(), by_numpy(product.dense)
    assert np.array_equal(D.view(np.uint32), expected.view(np.uint32))
    # small products are left to BLAS
    assert loops.multiply(product.pieces[0].factors(0, rows), D) == (rows >= 6 and columns >= 32)


@compiled
def test_sums_beyond_float32_are_infinite_and_transposes_are_left_to_blas(by_numpy):
    rng = np.random.default_rng(0)
    product = exact_product([(1e30, rng.standard_normal((64, 8)), 1e15 * rng.standard_normal((8, 64)))])
    with np.errstate(over="ignore"):
        assert np.isinf(product.dense()).any()
        assert np.array_equal(product.dense(), by_numpy(product.dense))
    assert np.array_equal(product.T.dense(), product.dense().T)
    assert not loops.multiply(product.T.pieces[0].factors(0, 64), np.empty((64, 64), np.float32))


def test_arrays_of_other_kinds_are_left_to_numpy():
    W, D = np.zeros((4, 4), BF16), np.zeros((4, 4), np.float32)
    for weights, update in ((W.astype(np.float16), D), (W.T[::2], D[::2]), (W, D.astype(np.float64)), (W, D[:2])):
        assert loops.merge_entries_with(weights, update, lost=None, search=True) is None
        assert loops.subtract_and_round(weights, update) is None
    assert loops.merge_entries_with(W, D, lost=D[:, ::2].copy(), search=False) is None


@compiled
def test_the_kernel_refuses_arrays_of_other_sizes():
    W, D, B, A = np.zeros(8, np.uint16), np.zeros(8, np.float32), np.zeros((8, 2)), np.zeros((2, 32))
    places = np.zeros(3, np.int64)
    for call in (
        lambda: loops._loops.widen(W, D[:4].copy()),
        lambda: loops._loops.widen(W.view(np.uint8)[:15].copy(), D.copy()),
        lambda: loops._loops.subtract(W, D, W[:4].copy()),
        lambda: loops._loops.merge(W, D[:4], D.copy(), W.copy(), places, W[:3].copy()),
        lambda: loops._loops.merge(W, D, D[:4].copy(), W.copy(), places, W[:3].copy()),
        lambda: loops._loops.merge(W, D, D.copy(), W[:4].copy(), places, W[:3].copy()),
        lambda: loops._loops.merge(W, D, D.copy(), W.copy(), places, W[:4].copy()),
        lambda: loops._loops.multiply(B, A, 2, b"", b"", 0, 8, 33, False, np.zeros((8, 33), np.float32)),
        lambda: loops._loops.multiply(B, A, -2, b"", b"", 0, 8, 32, False, np.zeros((8, 32), np.float32)),
        lambda: loops._loops.multiply(B, A, 2, b"", b"", 0, 8, 32, True, np.zeros((8, 32), np.float32)),
        lambda: loops._loops.multiply(b"", b"", 1 << 61, b"", b"", 0, 8, 32, False, np.zeros((8, 32), np.float32)),
        lambda: loops._loops.gram(b"", b"", 1 << 61, 2, 2, False, np.zeros((2, 2))),
        lambda: loops._loops.gram(B, A, 8, 2, 9, False, np.zeros((2, 9))),
        lambda: loops._loops.gram(B, A, 8, 2, 8, False, np.zeros((2, 7))),
    ):
        with pytest.raises(ValueError, match="sizes"):
            call()


@compiled
@pytest.mark.parametrize("dtype", [BF16, np.float32])
def test_a_merge_and_its_record_are_those_of_numpy(dtype, by_numpy):
    rng = np.random.default_rng(3)
    W = (0.02 * rng.standard_normal((1100, 500))).astype(dtype)
    # so many that the sample of the prediction has some of each kind, with differences far below the first number
    W[:20] = np.resize(np.array([np.nan, np.inf, -0.0, 0, 1e-40, 3e38], dtype), (20, 500))
    update = LowRank(0.01 * rng.standard_normal((1100, 16)), 0.1 * rng.standard_normal((16, 500)), 1.0)

    def merge():
        plan = TensorPlan("weight", LazyArray.of(W), W.shape, (Slab("module", 0, 1100, ((1.0, update),)),))
        recorder = MergeRecorder(prepare_merge(plan))
        rows = b"".join(block.tobytes() for block in recorder.blocks())
        record = recorder.record()
        return rows, record.fidelity, record.merged_hash, [s.read().tobytes() for s in record.patch.streams]

    assert merge() == by_numpy(merge)


def test_entries_make_the_patch_that_their_rows_make():
    rng = np.random.default_rng(2)
    for share in (0.02, 1.0):
        W = rng.standard_normal((30, 40)).astype(BF16)
        R = np.where(rng.random(W.shape) < share, rng.standard_normal(W.shape).astype(BF16), W)
        by_rows, by_entries = PatchWriter(2), PatchWriter(2)
        for part in (slice(0, 13), slice(13, 30)):
            by_rows.block(W[part], R[part])
            w, r = W[part].view(np.uint16).ravel(), R[part].view(np.uint16).ravel()
            places = np.flatnonzero(w != r)
            by_entries.entries(W[part], places, r[places])
        one, two = by_rows.finish(), by_entries.finish()
        assert one.coding == two.coding == ("patch" if share < 1 else "xor")
        assert [s.read().tobytes() for s in one.streams] == [s.read().tobytes() for s in two.streams]
        assert np.array_equal(PatchReader(two, 2).block(R).view(np.uint16), W.view(np.uint16))


@compiled
@pytest.mark.parametrize("count", [0, 1, 7, 64, 1000, 1 << 16])
def test_every_float16_is_widened_as_by_numpy(count):
    halves = np.random.default_rng(6).permutation(1 << 16).astype(np.uint16).view(np.float16)[:count]
    with np.errstate(invalid="ignore"):
        expected = halves.astype(np.float32) + np.float32(0)
    expected[np.isnan(halves)] = np.nan
    assert np.array_equal(loops.widen_halves(halves).view(np.uint32), expected.view(np.uint32))


def test_only_float16_in_c_order_is_widened(by_numpy):
    halves = np.ones((4, 6), np.float16)
    for other in (halves.T, halves[:, ::2], halves.astype(np.float32), halves.astype(BF16)):
        assert loops.widen_halves(other) is None
    assert by_numpy(loops.widen_halves, halves) is None


@compiled
def test_a_fingerprint_is_that_of_numpy(by_numpy):
    rng = np.random.default_rng(7)
    bits = rng.integers(1 << 16, size=(2, 64, 8), dtype=np.uint16).view(np.float16)  # NaN and infinities too
    adapter = Adapter(modules={"q": LowRank(bits[0], bits[1].T.copy(), 2.0), "k": LowRank(bits[1], bits[0].T)})
    assert fingerprint(adapter) == by_numpy(fingerprint, adapter)


def test_a_kernel_that_is_older_than_its_source_is_not_used(tmp_path: Path) -> None:
    compiled, source = tmp_path / "_kernel.so", tmp_path / "kernel.c"
    for path, time in ((compiled, 200), (source, 100)):
        path.touch()
        os.utime(path, (time, time))
    assert not loops._is_outdated(compiled)
    os.utime(source, (300, 300))
    assert loops._is_outdated(compiled)
    source.unlink()  # a wheel need not have it
    assert not loops._is_outdated(compiled)


@compiled
@pytest.mark.parametrize("n", [512, 700, 4096])
def test_rows_are_pruned_as_by_numpy(by_numpy, n):
    rng = np.random.default_rng(n)
    x = rng.standard_normal((5, n)).astype(np.float32)
    # Equal sizes of both signs, zeros of both signs, and every exponent, the smallest ones included.
    x[1] = rng.integers(-3, 4, n)
    x[1, ::7] *= -0.0
    x[2] = rng.integers(1 << 31, size=n, dtype=np.uint32).view(np.float32)
    x[2, ~np.isfinite(x[2])] = 1e-42
    words = rng.integers(1 << 16, size=(5, n), dtype=np.uint16)
    factors = (65536 / np.rint(65536 * np.linspace(0.1, 1, n))).astype(np.float32)
    results = []
    for run in (by_numpy, lambda function, *arguments: function(*arguments)):
        pruned, mask = x.copy(), np.zeros(x.shape, np.bool_)
        with np.errstate(over="ignore"):
            run(della._prune, pruned, words, factors, mask, Workspace())
        results.append((pruned.tobytes(), mask.tobytes()))
    assert results[0] == results[1]
    assert 0 < mask.mean() < 1


@compiled
@pytest.mark.parametrize("masks", [False, True])
def test_two_updates_are_elected_as_by_numpy(by_numpy, masks):
    rng = np.random.default_rng(0)
    stack = rng.integers(1 << 32, size=(2, 40, 1003), dtype=np.uint32).view(np.float32)
    stack[:, :20] = rng.integers(-3, 4, (2, 20, 1003))  # many that are equal, opposite or 0
    stack[:, :20, ::7] *= -0.0
    stack[~np.isfinite(stack)] = -1e-42
    kept = [(rng.random(x.shape) < 0.7) & (x != 0) for x in stack] if masks else [1.0, 0.0]
    by_kernel = elected_mean(stack.copy(), Workspace(), kept=kept).copy()
    with np.errstate(over="ignore"):
        expected = by_numpy(elected_mean, stack.copy(), Workspace(), kept=kept)
    assert by_kernel.tobytes() == expected.tobytes()
    assert 0.1 < (by_kernel != 0).mean() < 1


def test_a_cutoff_between_two_floats_is_left_to_numpy():
    a, out = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    assert not loops.elect_mean_of_two(a, a, [1 + 2.0**-30, 0.5], out=out)
    assert not loops.elect_mean_of_two(a, a, [a > 0, 0.5], out=out)
    assert not loops.elect_mean_of_two(a, a.astype(np.float64), [0.5, 0.5], out=out)


def _rows(m: int, n: int, dtype):
    return np.random.default_rng(n).standard_normal((m, n)).astype(np.float32).astype(dtype)


@compiled
@pytest.mark.parametrize("dtype", [BF16, np.float32])
@pytest.mark.parametrize("shape", [(16, 32), (1, 1), (15, 31), (40, 101), (0, 5), (130, 1000)])
@pytest.mark.parametrize("b", [1, 16, 17, 40])
def test_two_products_of_rows_are_those_of_float64(dtype, shape, b):
    if not loops.can_multiply_twice():
        pytest.skip("this processor leaves them to BLAS")
    (m, n), W = shape, _rows(*shape, dtype)
    X, dense = _rows(b, n, np.float32).T, W.astype(np.float64)
    Y, Z = np.full((m, -(-b // loops.PART) * loops.PART), np.nan, np.float32), loops.pad_columns(np.ones((n, b)))
    loops.multiply_rows_twice(W, loops.pad_columns(X), Y, Z)
    np.testing.assert_allclose(Y[:, :b], dense @ X, atol=2e-6 * n)
    np.testing.assert_array_equal(Y[:, b:], 0)
    expected = 1 + dense.T @ Y[:, :b].astype(np.float64)
    np.testing.assert_allclose(loops.join_parts(Z, n, b).T, expected, rtol=1e-5, atol=1e-5 * n**0.5 * (m + 1))
    again = loops.pad_columns(np.ones((n, b)))
    loops.multiply_rows_twice(W, None, Y, again)
    np.testing.assert_array_equal(again, Z)


@compiled
@pytest.mark.parametrize("dtype", [BF16, np.float32])
@pytest.mark.parametrize("shape", [(8, 32), (1, 1), (7, 31), (23, 101), (0, 5)])
@pytest.mark.parametrize("k", [0, 1, 24, 25])
def test_rows_are_projected_as_in_float64(dtype, shape, k):
    W, R = _rows(*shape, dtype), np.random.default_rng(1).standard_normal((shape[1], k))
    projected = loops.project_rows(W, loops.pad_projection(R), k)
    if projected is None:
        pytest.skip("this processor leaves them to BLAS")
    dense = W.astype(np.float64)
    np.testing.assert_allclose(projected.product, dense @ R, rtol=1e-13, atol=1e-13)
    assert projected.squares == pytest.approx(np.sum(dense**2), rel=1e-13)


@compiled
def test_one_nan_makes_the_sum_of_squares_nan():
    W = np.ones((9, 40), np.float32)
    W[8, 39] = np.nan
    projected = loops.project_rows(W, np.zeros((40, 0)), 0)
    assert projected is None or np.isnan(projected.squares)


@compiled
def test_matrices_of_other_kinds_are_not_projected():
    R = np.zeros((4, 24))
    assert loops.project_rows(np.ones((3, 4)), R, 3) is None
    assert loops.project_rows(np.ones((4, 3), np.float32).T, R, 3) is None


@compiled
def test_passes_over_a_matrix_refuse_arrays_of_other_sizes():
    def floats(count, dtype=np.float32):
        return np.zeros(count, dtype)

    kernel = loops._loops
    fit = [floats(3 * 40), False, 3, 40, floats(64 * 16), 16, False, floats(3 * 16), floats(64 * 16)]
    kernel.multiply_twice(*fit)
    for place in (0, 4, 7, 8):
        with pytest.raises(ValueError, match="sizes"):
            kernel.multiply_twice(*fit[:place], fit[place][1:], *fit[place + 1 :])
    for place, value in ((2, -1), (5, 8), (5, 0), (6, True), (3, (1 << 63) - 1)):
        with pytest.raises(ValueError, match="sizes"):
            kernel.multiply_twice(*fit[:place], value, *fit[place + 1 :])
    fit = [floats(3 * 40), False, 3, 40, floats(40 * 24, np.float64), 24, floats(3 * 24, np.float64)]
    kernel.project(*fit)
    for place in (0, 4, 6):
        with pytest.raises(ValueError, match="sizes"):
            kernel.project(*fit[:place], fit[place][1:], *fit[place + 1 :])
    fit = [floats(5), floats(5), floats(5, bool), floats(5, bool), 0.0, 0.0, floats(5)]
    kernel.elect(*fit)
    for place in (0, 1, 2, 3, 6):
        with pytest.raises(ValueError, match="sizes"):
            kernel.elect(*fit[:place], fit[place][1:], *fit[place + 1 :])


@compiled
@pytest.mark.parametrize("r", [8, 9, 15, 16, 17, 31, 64, 100])
@pytest.mark.parametrize("order", ["C", "F"])
def test_gram_matrices_are_exact_to_rounding_and_symmetric(r, order):
    rng = np.random.default_rng(r)
    m = 1200 if order == "F" else 1203  # rows of a factor in Fortran order are added up eight at a time
    X = np.asarray(rng.standard_normal((m, r)) * 10.0 ** rng.uniform(-3, 3, r), order=order)
    G = loops.block_gram(X)
    assert G is not None
    assert G.tobytes() == np.ascontiguousarray(G.T).tobytes()
    exact = (X[:, :, None].astype(np.longdouble) * X[:, None, :]).sum(axis=0)
    lengths = np.sqrt(np.diagonal(exact))
    assert np.max(np.abs(G - exact) / lengths / lengths[:, None]) < 1e-14


@compiled
@pytest.mark.parametrize(("r", "k"), [(8, 8), (9, 17), (16, 16), (31, 20), (64, 16), (16, 64), (20, 100)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_products_of_thin_factors_are_exact_to_rounding(r, k, order):
    rng = np.random.default_rng(r + k)
    m = 1200 if order == "F" else 1203
    X, Y, T = (rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3, shape[1]) for shape in ((m, r), (m, k), (r, k)))
    X, Y = (np.asarray(factor, order=order) for factor in (X, Y))
    crossed, mapped = loops.block_gram(X, Y), loops.map_block(X, T)
    assert crossed is not None
    lengths = np.linalg.norm(X, axis=0)[:, None] * np.linalg.norm(Y, axis=0)
    exact = (X[:, :, None].astype(np.longdouble) * Y[:, None, :]).sum(axis=0)
    assert np.max(np.abs(crossed - exact) / lengths) < 1e-14
    if k < (8 if order == "F" else 16):
        assert mapped is None  # fewer columns than a tile has
        return
    assert mapped is not None
    assert mapped.flags.c_contiguous == (order == "C")
    lengths = np.linalg.norm(X, axis=1)[:, None] * np.linalg.norm(T, axis=0)
    assert np.max(np.abs(mapped - X.astype(np.longdouble) @ T) / lengths) < 1e-14


@compiled
def test_products_of_factors_that_the_kernel_leaves_to_blas():
    X = np.ones((1200, 16))
    assert loops.map_block(X[:100], np.ones((16, 16))) is None  # the call would take longer than the sums
    assert loops.map_block(X[::2], np.ones((16, 16))) is None
    assert loops.map_block(np.asfortranarray(X), np.ones((16, 7))) is None
    assert loops.block_gram(X, np.ones((1200, 7))) is None
    assert loops.block_gram(X, np.asfortranarray(X)) is None  # sums along the memory of one would jump in the other


@compiled
def test_gram_matrices_that_the_kernel_leaves_to_blas():
    assert loops.block_gram(np.ones((5000, 7))) is None  # fewer columns than a tile has
    assert loops.block_gram(np.ones((100, 8))) is None  # the call would take longer than the sums
    assert loops.block_gram(np.asfortranarray(np.ones((1203, 16)))) is None
    assert loops.block_gram(np.ones((2400, 16))[::2]) is None
    X = np.ones((2000, 8))
    X[7, 3] = np.nan
    G = loops.block_gram(X)
    assert G is not None
    assert np.isnan(G).sum() == 15


def in_blocks(X):
    """The Gram matrix, each block widened by NumPy."""
    G = np.zeros((X.shape[1], X.shape[1]))
    for _, block in blocks_of(X):
        G += gram_of_block(block)
    return G


@compiled
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("m", "r"), [(4096, 16), (11008, 16), (1000, 64), (8192, 8), (69_632, 8)])
def test_gram_matrices_of_bfloat16_are_those_of_its_blocks(m, r, order):
    rng = np.random.default_rng(m)
    one, other = (np.asarray(rng.standard_normal((m, r)), dtype=BF16, order=order) for _ in range(2))
    one[7, 3] = -0.0
    for X in (one, FactorsSideBySide([one]), FactorsSideBySide([one, other])):
        G = gram_of_bfloat16(X)
        assert G is not None
        assert G.tobytes() == gram(X).tobytes() == in_blocks(X).tobytes()
    one[9, 0], one[11, 1] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        assert np.array_equal(gram_of_bfloat16(one), in_blocks(one), equal_nan=True)


@compiled
@pytest.mark.parametrize("order", ["C", "F"])
def test_factors_of_two_widths_are_widened_side_by_side(order):
    rng = np.random.default_rng(3)
    parts = [np.asarray(rng.standard_normal((4096, width)), dtype=BF16, order=order) for width in (24, 8)]
    for X in (FactorsSideBySide(parts), FactorsSideBySide(parts[::-1])):
        assert gram_of_bfloat16(X).tobytes() == in_blocks(X).tobytes() == gram(X).tobytes()


@compiled
def test_factors_that_are_not_widened_by_the_kernel():
    X = np.ones((4096, 16), BF16)
    assert gram_of_bfloat16(X.astype(np.float32)) is None
    assert gram_of_bfloat16(X[::2]) is None
    assert gram_of_bfloat16(FactorsSideBySide([X, X, X])) is None
    assert gram_of_bfloat16(FactorsSideBySide([X, np.asfortranarray(X)])) is None
    assert gram_of_bfloat16(np.ones((4096, 7), BF16)) is None  # fewer columns than a tile has
    assert gram_of_bfloat16(np.ones((4100, 16), BF16)) is None  # the last block has four rows
    assert gram_of_bfloat16(np.asfortranarray(np.ones((7001, 16), BF16))) is None  # not a multiple of eight rows
    assert np.array_equal(gram(np.ones((0, 16), BF16)), np.zeros((16, 16)))
    assert np.array_equal(gram(np.ones((4100, 16), BF16)), np.full((16, 16), 4100.0))


@compiled
def test_what_the_kernel_and_numpy_rank_differently_is_refused_by_both(by_numpy):
    """Entries of the update are infinite in float32; DELLA may keep them or drop them."""
    rng = np.random.default_rng(0)
    B, A = rng.standard_normal((8, 2)).astype(np.float32), rng.standard_normal((2, 600)).astype(np.float32)
    B[0], A[:, :9] = 1e25, 1e25
    adapters = [Adapter(modules={"m": LowRank(*pair)}) for pair in ((B, A), (B / 1e25, A / 1e25))]
    for seed in range(3):

        def combine():
            with pytest.raises(FormatError, match="the combination leaves the range of float32"):
                loralens.combine(*adapters, method="della", density=0.3, seed=seed)  # noqa: B023

        combine()
        by_numpy(combine)


@compiled
def test_a_sketch_does_not_show_the_sign_of_zero(by_numpy):
    rng = np.random.default_rng(0)
    B, A = rng.standard_normal((64, 4)).astype(np.float16), rng.standard_normal((4, 64)).astype(np.float16)
    B[::3], A[:, ::5] = -0.0, -0.0
    adapter = Adapter(modules={"model.layers.0.self_attn.q_proj": LowRank(B, A, 0.5)})

    ours, theirs = measure_adapter(adapter).sketch, by_numpy(measure_adapter, adapter).sketch
    assert (ours.step, ours.codes.tobytes(), ours.start.tobytes()) == (
        theirs.step,
        theirs.codes.tobytes(),
        theirs.start.tobytes(),
    )
