"""Torch pickles written without torch: read by torch with weights_only, by our own reader, the same bytes each time."""

import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens.core.lazy import LazyArray
from loralens.errors import FormatError
from loralens.formats.files.torch.pickle import read_pickle
from loralens.formats.files.torch.tensor import DTYPES
from loralens.formats.files.torch.writer import ALIGN, pickle_bytes
from tests.formats.stores import drawn
from tests.marks import examples

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
    path.write_bytes(b"".join(pickle_bytes({key: LazyArray.of(array) for key, array in arrays.items()})))
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
    with zipfile.ZipFile(tmp_path / "a.bin") as archive:
        assert archive.testzip() is None
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_numbers_start_at_multiples_of_64(tmp_path):
    path = written({"a": drawn(3), "b" * 50: drawn(5, 7), "c": drawn(1)}, tmp_path / "a.bin")
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            length = len(info.filename) + int.from_bytes(
                data[info.header_offset + 28 : info.header_offset + 30], "little"
            )
            assert (info.header_offset + 30 + length) % ALIGN == 0


def test_one_tensor_in_memory_at_a_time():
    size = 1 << 21
    tensors = {
        str(i): LazyArray(lambda: np.ones(size // 4, np.float32), shape=(size // 4,), dtype=np.float32)
        for i in range(8)
    }
    tracemalloc.start()
    total = sum(len(chunk) for chunk in pickle_bytes(tensors))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 8 * size
    assert peak < 2.5 * size


def test_arrays_that_lie_otherwise_in_memory(tmp_path):
    array = drawn(6, 4)
    lying = {"T": array.T, "step": array[::2, 1::2], "big": array.astype(">f4")}
    tensors, _ = read_pickle(written(lying, tmp_path / "a.bin"))
    for key, expected in lying.items():
        np.testing.assert_array_equal(tensors[key].read(), expected)


@pytest.mark.parametrize("dtype", [np.complex64, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e8m0fnu])
def test_a_dtype_that_torch_pickles_do_not_have_here(dtype):
    with pytest.raises(FormatError, match="x: a torch pickle has no "):
        list(pickle_bytes({"x": LazyArray.of(np.ones(2, dtype))}))


def test_a_key_that_no_terminal_should_see():
    with pytest.raises(FormatError, match="control characters"):
        list(pickle_bytes({"x\x1b[2J": LazyArray.of(drawn(2))}))


def test_nothing_at_all(tmp_path):
    assert read_pickle(written({}, tmp_path / "a.bin")) == ({}, {})
    assert pytest.importorskip("torch").load(tmp_path / "a.bin") == {}


keys = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), max_size=20)
arrays = st.tuples(st.lists(st.integers(0, 300), max_size=3), st.sampled_from(list(DTYPES.values())))


@examples(60)
@given(st.dictionaries(keys, arrays, max_size=4))
def test_any_names_and_shapes_come_back(tmp_path_factory, specs):
    made = {key: np.zeros([n % 9 for n in shape[1:]] + shape[:1], dtype) for key, (shape, dtype) in specs.items()}
    tensors, _ = read_pickle(written(made, tmp_path_factory.getbasetemp() / "any.bin"))
    assert {key: (t.shape, t.dtype) for key, t in tensors.items()} == {k: (a.shape, a.dtype) for k, a in made.items()}


@pytest.mark.parametrize("count", [1, 40])
def test_what_torch_wrote_does_not_grow(tmp_path, count):
    torch = pytest.importorskip("torch")
    arrays = {f"layers.{i}.lora_A": np.ones((4, 9), np.float32) for i in range(count)}
    torch.save({key: torch.from_numpy(array) for key, array in arrays.items()}, tmp_path / "archive.bin")
    ours = written(arrays, tmp_path / "ours.bin")
    assert ours.stat().st_size <= (tmp_path / "archive.bin").stat().st_size
