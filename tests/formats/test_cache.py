"""SVDs on disk: found by content, believed only when whole, dropped by age, and never in the way."""

import os
from pathlib import Path

import numpy as np
import pytest

from loralens.core import LazyArray, Weight
from loralens.formats.records.cache import (
    HEADER,
    SUFFIX,
    SvdCache,
    svd_bytes,
    weight_digest,
)
from loralens.linalg.lanczos import decompose
from loralens.linalg.randomized import Leading

rng = np.random.default_rng(0)
W = rng.standard_normal((12, 8)).astype(np.float32)


def weight(array, *, transposed=False, streams=False):
    rows = (lambda start, stop: array[start:stop]) if streams else None
    return Weight("w", LazyArray(lambda: array, shape=array.shape, dtype=array.dtype, rows=rows), transposed)


def keys(count):
    return [weight_digest(weight(W + i)) for i in range(count)]


def test_what_was_written_comes_back_bit_for_bit(tmp_path: Path) -> None:
    cache, found, key = SvdCache(tmp_path / "new", limit=10**6), decompose(W), weight_digest(weight(W))
    assert key not in cache
    assert cache.read(key, W.shape) is None
    assert cache.write(key, found)
    assert key in cache
    back = SvdCache(tmp_path / "new", limit=0).read(key, W.shape)
    for one, two in zip(found, back, strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)
    file = tmp_path / "new" / f"{key}{SUFFIX}"
    assert svd_bytes(weight(W)) < file.stat().st_size < svd_bytes(weight(W)) + HEADER
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_name_is_of_the_content() -> None:
    key = weight_digest(weight(W))
    assert key == weight_digest(weight(W.copy(), streams=True))
    other = W.copy()
    other[3, 3] = np.nextafter(other[3, 3], np.float32(9))
    others = [
        weight(other),
        weight(W, transposed=True),
        weight(W.reshape(8, 12)),
        weight(W.view(np.int32)),
    ]
    assert len({key, *map(weight_digest, others)}) == 5


def leading(count: int, *, steps: int) -> Leading:
    """Triplets as `leading_svd` returns them: float32 numbers, or all digits of a dense SVD."""
    U, s, Vh = np.linalg.svd(W.astype(np.float64), full_matrices=False)
    digits = np.float32 if steps else np.float64
    vectors = (X.astype(digits).astype(np.float64) for X in (U[:, :count], Vh[:count].T))
    return Leading(next(vectors), s[:count], next(vectors), np.full(count, 1e-3 if steps else 0.0), steps)


@pytest.mark.parametrize("steps", [0, 5])
def test_leading_triplets_come_back_bit_for_bit(steps: int, tmp_path: Path) -> None:
    cache, (key,), found = SvdCache(tmp_path, limit=10**6), keys(1), leading(3, steps=steps)
    assert cache.read_leading(key, W.shape, 3) is None
    assert cache.write_leading(key, found)
    back = SvdCache(tmp_path, limit=0).read_leading(key, W.shape, 3)
    assert back is not None
    assert back.steps == steps
    for one, two in zip(found[:4], back[:4], strict=True):
        assert one.dtype == two.dtype == np.float64
        np.testing.assert_array_equal(one, two)
    assert cache.read_leading(key, W.shape, 2) is None
    assert cache.read_leading(key, W.shape[::-1], 3) is None
    assert cache.read(key, W.shape) is None  # it is not the whole SVD
    cache.write(key, decompose(W))
    assert cache.read_leading(key, W.shape, 8) is None  # and a whole SVD states no error


def spoil_number(data: bytearray) -> None:
    data[-9] ^= 1


def cut(data: bytearray) -> None:
    del data[-5:]


@pytest.mark.parametrize("spoil", [spoil_number, cut])
def test_a_damaged_entry_is_none(spoil, tmp_path: Path) -> None:
    cache, (key,) = SvdCache(tmp_path, limit=10**6), keys(1)
    file = tmp_path / f"{key}{SUFFIX}"
    for write, read in (
        (lambda: cache.write(key, decompose(W)), lambda: cache.read(key, W.shape)),
        (lambda: cache.write_leading(key, leading(3, steps=5)), lambda: cache.read_leading(key, W.shape, 3)),
    ):
        write()
        data = bytearray(file.read_bytes())
        spoil(data)
        file.write_bytes(data)
        assert read() is None
        write()
        assert read() is not None


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("U", lambda U: U.T.copy()),
        ("V", lambda V: V.ravel()),
        ("s", lambda s: s.view(np.float32)),
    ],
    ids=["turned", "flat", "narrower"],
)
def test_arrays_that_are_no_svd_of_the_weight_are_none(part, other, tmp_path: Path) -> None:
    """The checksum is of the bytes alone, which are the same in another shape, and anybody can write one."""
    found = decompose(W)
    cache, (key,) = SvdCache(tmp_path, limit=10**6), keys(1)
    cache.write(key, found._replace(**{part: other(getattr(found, part))}))
    assert cache.read(key, W.shape) is None
    cache.write(key, found)
    assert cache.read(key, W.shape) is not None
    assert cache.read(key, (W.shape[1], W.shape[0])) is None


def test_the_oldest_go_first_and_a_read_counts_as_use(tmp_path: Path) -> None:
    first, second, third = keys(3)
    cache = SvdCache(tmp_path, limit=10**6)
    for age, key in enumerate([second, first]):
        cache.write(key, decompose(W))
        os.utime(tmp_path / f"{key}{SUFFIX}", (1000 + age, 1000 + age))
    (tmp_path / f"mine{SUFFIX}").write_bytes(b"x" * 10_000)
    size = (tmp_path / f"{first}{SUFFIX}").stat().st_size
    again = SvdCache(tmp_path, limit=2 * size + HEADER)
    assert again.read(second, W.shape)
    assert again.write(third, decompose(W))
    assert (first in again, second in again, third in again) == (False, True, True)
    assert (tmp_path / f"mine{SUFFIX}").exists()
