"""Files of torch that we write: read by torch with weights_only, by our own reader, the same bytes each time."""

from io import BytesIO

import ml_dtypes
import numpy as np
import pytest

from loralens import FormatError
from loralens.core import LazyArray
from loralens.formats.files.torch_pickle import DTYPES, write_torch
from tests.formats.files import read_pickle
from tests.formats.stores import drawn

SHAPES = [(), (0,), (3,), (2, 0, 3), (6, 4), (1, 2, 3, 4)]


def numbers(shape, dtype):
    """Random bits, but for booleans."""
    rng = np.random.default_rng(1)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def everything():
    return {f"{name}.{i}": numbers(shape, dtype) for name, dtype in DTYPES.items() for i, shape in enumerate(SHAPES)}


def written(arrays, path):
    with path.open("wb") as stream:
        write_torch({key: LazyArray.of(array) for key, array in arrays.items()}, stream)
    return path


def test_our_own_reader_gives_every_dtype_and_shape_back(tmp_path):
    arrays = everything()
    tensors, rest = read_pickle(written(arrays, tmp_path / "a.bin"))
    assert rest == {}
    assert list(tensors) == list(arrays)
    for key, array in arrays.items():
        assert (tensors[key].dtype, tensors[key].shape) == (array.dtype, array.shape), key
        assert tensors[key].read().tobytes() == array.tobytes(), key


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_gives_every_dtype_and_shape_back(tmp_path, mmap):
    torch = pytest.importorskip("torch")
    arrays = everything()
    state = torch.load(written(arrays, tmp_path / "a.bin"), weights_only=True, mmap=mmap)
    assert list(state) == list(arrays)
    for key, array in arrays.items():
        assert tuple(state[key].shape) == array.shape, key
        assert str(state[key].dtype) == f"torch.{key.partition('.')[0]}", key
        flat = state[key].contiguous().reshape(-1).view(torch.uint8)
        assert bytes(flat.numpy()) == array.tobytes(), key


def test_same_tensors_same_bytes_whatever_the_clock_says(tmp_path, monkeypatch):
    first = written(everything(), tmp_path / "a.bin").read_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert written(everything(), tmp_path / "b.bin").read_bytes() == first


def test_arrays_that_lie_otherwise_in_memory(tmp_path):
    array = drawn(6, 4)
    lying = {"T": array.T, "step": array[::2, 1::2], "big": array.astype(">f4")}
    tensors, _ = read_pickle(written(lying, tmp_path / "a.bin"))
    for key, expected in lying.items():
        np.testing.assert_array_equal(tensors[key].read(), expected)


@pytest.mark.parametrize("dtype", [np.complex64, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e8m0fnu])
def test_a_dtype_that_torch_pickles_do_not_have_here(dtype):
    with pytest.raises(FormatError, match="x: a torch pickle has no "):
        write_torch({"x": LazyArray.of(np.ones(2, dtype))}, BytesIO())


def test_a_key_that_no_terminal_should_see():
    with pytest.raises(FormatError, match="control characters"):
        write_torch({"x\x1b[2J": LazyArray.of(drawn(2))}, BytesIO())
