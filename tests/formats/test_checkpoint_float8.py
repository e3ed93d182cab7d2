"""float8 weights times their scales, by every rule in use, whole and some rows at a time."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from loralens import FormatError
from loralens.formats import open_checkpoint
from tests.bases import single

E4M3 = ml_dtypes.float8_e4m3fn
RNG = np.random.default_rng(0)


def weight(*shape, dtype=E4M3):
    return (RNG.standard_normal(shape) * 4).astype(dtype)


def scales(*shape):
    return RNG.uniform(0.5, 2, shape).astype(np.float32)


def entry(q, scale, block):
    """The dense product, number by number."""
    W = np.empty(q.shape, np.float32)
    for i in np.ndindex(q.shape):
        where = tuple(
            0 if n == 1 else k if n == size else k // step
            for k, n, size, step in zip(i, scale.shape, q.shape, (*(1,) * (q.ndim - 2), *block), strict=True)
        )
        W[i] = np.float32(q[i]) * np.float32(scale[where])
    return W


# end of the scale's key, weight, scale, the same scale with as many axes as the weight, block
CASES = {
    "blocks of 128": ("_scale_inv", weight(200, 300), s := scales(2, 3), s, (128, 128)),
    "other blocks": ("_scale_inv", weight(30, 50), s := scales(4, 4), s, (8, 16)),
    "one a row": ("_scale", weight(20, 30), s := scales(20, 1), s, (128, 128)),
    "one a row, flat": ("_scale", weight(20, 30), s := scales(20), s.reshape(20, 1), (128, 128)),
    "powers of two": (
        "_scale_inv", weight(200, 300), s := np.array([[1, 2, 4], [0.5, 8, 1]]).astype(ml_dtypes.float8_e8m0fnu), s,
        (128, 128)),
    "a stack of experts": ("_scale_inv", weight(3, 20, 30), s := scales(3, 3, 2), s, (8, 16)),
    "a stack, one a row": ("_scale", weight(3, 20, 30), s := scales(3, 20, 1), s, (128, 128)),
}  # fmt: skip


@pytest.mark.some(2)
@pytest.mark.parametrize("name", CASES)
def test_weights_are_multiplied_by_their_scales(name, tmp_path):
    end, q, scale, full, block = CASES[name]
    tensors = {
        "a.weight": q,
        f"a.weight{end}": scale,
        "a.input_scale": scales(1),
        "b.weight": weight(4, 4),
        "c": scales(3),
    }
    single(tmp_path, tensors, config={"quantization_config": {"weight_block_size": list(block)}})
    found = open_checkpoint(tmp_path)
    assert set(found.tensors) == {"a.weight", "b.weight", "c"}
    assert found.tensors["b.weight"].dtype == E4M3  # no scale: as it is
    (note,) = found.notes
    assert (note.level, note.code) == ("note", "float8")
    assert note.text == "1 float8 weights are read as float32, multiplied by their scales"
    W, dense = found.tensors["a.weight"], entry(q, full, block)
    assert (W.dtype, W.shape) == (np.float32, q.shape)
    np.testing.assert_array_equal(W.read(), dense)
    assert W.streams
    for start, stop in ((0, 1), (1, 3), (0, len(q)), (len(q) - 1, len(q))):
        np.testing.assert_array_equal(W.rows(start, stop).read(), dense[start:stop])


def test_the_block_size_is_128_where_nothing_says_so(tmp_path):
    q, scale = weight(200, 300), scales(2, 3)
    save_file({"a.weight": q, "a.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(open_checkpoint(tmp_path).tensors["a.weight"].read(), entry(q, scale, (128, 128)))


@pytest.mark.parametrize("shape", [(3, 3), (2,), (2, 3, 1)])
def test_scales_that_fit_no_rule_are_refused(shape, tmp_path):
    save_file({"a.weight": weight(200, 300), "a.weight_scale_inv": scales(*shape)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"a\.weight: a float8 weight"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("count", "share"), [(5, 1), (300, 128)])
def test_one_dimension(count, share, tmp_path):
    q, scale = weight(count), scales(-(-count // share))
    save_file({"a.weight": q, "a.weight_scale": scale}, tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path).tensors["a.weight"]
    expected = q.astype(np.float32) * np.repeat(scale, share)[:count]
    np.testing.assert_array_equal(found.read(), expected)
    np.testing.assert_array_equal(found.rows(2, 5).read(), expected[2:5])


def test_scales_without_a_float8_weight_stay(tmp_path):
    tensors = {"a.weight": np.ones((2, 2), np.float16), "a.weight_scale": scales(1), "b.input_scale": scales(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path)
    assert set(found.tensors) == set(tensors)
    assert found.notes == ()
