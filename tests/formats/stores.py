"""Stored values made in memory, read in full, compared to the bit, and broken on purpose."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from loralens.core.lazy import LazyArray
from loralens.errors import LoraLensError
from loralens.formats.files.container import Stored
from loralens.formats.files.torch_pickle import read_pickle

rng = np.random.default_rng(5)


def drawn(*shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def number(shape, seed=0, dtype=np.float32):
    """The same numbers for the same seed."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def stored(tensors, **other):
    """A file of these arrays."""
    return Stored({key: LazyArray.of(np.asarray(array)) for key, array in tensors.items()}, **other)


def numbered(shapes, **other):
    """A file of random numbers under these keys."""
    return stored({key: number(shape, i) for i, (key, shape) in enumerate(shapes.items())}, **other)


def valued(source, key, value):
    """``source`` with one tensor more, or another one."""
    return replace(source, tensors={**source.tensors, key: LazyArray.of(np.asarray(value))})


def codes(adapter):
    """What its reader noticed."""
    return [finding.code for finding in adapter.findings]


def from_pickle(path, **other):
    tensors, plain = read_pickle(path)
    return Stored(tensors, plain=plain, **other)


def read_all(adapter):
    """Every number of an adapter, its parts of the shapes it says."""
    for name, module in adapter.items():
        assert module.B.shape == (module.shape[0], module.rank), name
        assert module.A.shape == (module.rank, module.shape[1]), name
    for extra in adapter.extra.values():
        extra.tensor.read()


def assert_same_tensors(first, second):
    """Two mappings hold the same tensors by key, bit for bit."""
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert (tensor.dtype, tensor.shape) == (second[key].dtype, second[key].shape), key
        assert tensor.read().tobytes() == second[key].read().tobytes(), key


def assert_same_file(first, second):
    """Two Stored values hold the same tensors, metadata and configuration."""
    assert_same_tensors(first.tensors, second.tensors)
    assert first.metadata == second.metadata
    assert first.config == second.config


def assert_same_adapter(first, second):
    """Two adapters agree in every number, name, scale, extra, metadata and configuration."""
    assert list(first) == list(second)
    for name, module in first.items():
        other = second[name]
        assert (module.scale, module.scaling, module.layout) == (other.scale, other.scaling, other.layout), name
        assert module.B.tobytes() == other.B.tobytes(), name
        assert module.A.tobytes() == other.A.tobytes(), name
    assert {key: (e.role, e.module) for key, e in first.extra.items()} == {
        key: (e.role, e.module) for key, e in second.extra.items()
    }
    assert first.metadata == second.metadata
    assert first.config == second.config


SHAPES = st.lists(st.integers(0, 4), max_size=4)
DTYPES = st.sampled_from([np.float32, np.float16, np.int64, np.bool_])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([10**400, 1e308, float("inf"), float("nan"), "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["scale", "rank"]), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def broken(draw, good, parts, fields=()):
    """``good`` with tensors gone, under odd keys, of other shapes and dtypes, and with odd fields said beside it."""
    tensors = dict(good.tensors)
    keys = st.sampled_from(list(tensors))
    for key in draw(st.sets(keys, max_size=2)):
        del tensors[key]
    for key in draw(st.sets(keys, max_size=2)) & set(tensors):
        tensors[draw(st.lists(st.sampled_from(parts), min_size=1, max_size=6).map("".join))] = tensors.pop(key)
    for key in draw(st.sets(st.sampled_from(sorted(tensors) or ["x"]), max_size=3)):
        tensors[key] = LazyArray.of(np.ones(draw(SHAPES), draw(DTYPES)))
    said = draw(st.dictionaries(st.sampled_from(fields), VALUES, max_size=3)) if fields else {}
    return replace(good, tensors=tensors, config={**(good.config or {}), **said} or None)


def outcome(module, file, write=None):
    """What reading ends with: an adapter read in full (and written, and read again), or a LoraLensError."""
    try:
        module.detect(file)
        adapter = module.read(file)
        read_all(adapter)
        if write:
            again = module.read(write(adapter))
            assert_same_adapter(adapter, again)
    except LoraLensError as error:
        assert error.fix  # noqa: PT017
        return error
    return adapter
