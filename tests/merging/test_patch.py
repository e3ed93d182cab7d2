"""W comes back from R bit for bit, whatever bits they are, and a damaged patch is an error."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens import FormatError
from loralens.merging.patch import Blob, PatchReader, PatchWriter, bits, keep_in_memory
from tests.marks import examples

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


def random_bits(rng, dtype, rows, columns):
    """Every bit pattern may come: NaN of all kinds, −0, infinities, denormals."""
    size = np.dtype(dtype).itemsize
    return rng.integers(0, 256, rows * columns * size, dtype=np.uint8).view(dtype).reshape(rows, columns)


def nudged(rng, W, share, units):
    """W with this share of entries moved by a few units in the last place, or by anything."""
    r = bits(W).copy()
    here = np.flatnonzero(rng.random(r.size) < share)
    step = rng.integers(-units, units + 1, here.size)
    r[here] += step.astype(f"i{r.itemsize}").view(r.dtype)
    return r.view(W.dtype).reshape(W.shape)


def cut(rows, rng):
    stops = sorted({*rng.integers(1, rows, 3).tolist(), rows}) if rows > 1 else [rows]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def written(W, R, blocks):
    writer = PatchWriter(W.dtype.itemsize)
    for start, stop in blocks:
        writer.block(W[start:stop], R[start:stop])
    return writer.finish()


def read(blob, R, blocks):
    reader = PatchReader(blob, R.dtype.itemsize)
    found = np.concatenate([reader.block(R[start:stop]) for start, stop in blocks])
    reader.finish()
    return found


@given(
    st.sampled_from(DTYPES),
    st.integers(1, 40),
    st.integers(1, 60),
    st.sampled_from([0, 0.001, 0.02, 0.2, 1]),
    st.sampled_from([1, 3, 100, 127]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@examples(150)
def test_w_comes_back(dtype, rows, columns, share, units, wild, seed):
    rng = np.random.default_rng(seed)
    W = random_bits(rng, dtype, rows, columns)
    R = random_bits(rng, dtype, rows, columns) if wild and share == 1 else nudged(rng, W, share, units)
    blob = written(W, R, cut(rows, rng))
    found = read(blob, R, cut(rows, rng))
    np.testing.assert_array_equal(bits(found), bits(W))
    assert blob.different == np.count_nonzero(bits(W) != bits(R))
    assert blob.coding == "patch" or blob.different


def damaged():
    rng = np.random.default_rng(2)
    W = (0.02 * rng.standard_normal((64, 64))).astype(ml_dtypes.bfloat16)
    wild = random_bits(rng, ml_dtypes.bfloat16, 128, 64)
    patch, xor = written(W, nudged(rng, W, 0.05, 1), [(0, 64)]), written(W, wild[:64], [(0, 64)])
    yield "no deflate", Blob("patch", patch.different, (keep_in_memory(b"garbage"), *patch.streams[1:]))
    yield "miscounted", Blob("patch", patch.different + 1, patch.streams)
    yield "short plane", Blob("xor", xor.different, (xor.streams[0].rows(0, 50), xor.streams[1]))
    yield "too long", written(np.vstack([W, W]), nudged(rng, np.vstack([W, W]), 0.05, 1), [(0, 128)])


@pytest.mark.parametrize(("how", "blob"), list(damaged()), ids=lambda x: x if isinstance(x, str) else "")
def test_a_damaged_patch_is_an_error(how, blob):
    R = np.zeros((64, 64), ml_dtypes.bfloat16)
    with pytest.raises(FormatError, match=r"patch|stream"):
        read(blob, R, [(0, 64)])
