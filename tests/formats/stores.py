"""Stored values made in memory, read in full, compared to the bit, and broken on purpose."""

from dataclasses import replace

import numpy as np

from loralens.core import LazyArray
from loralens.formats import Stored
from tests.formats.files import read_pickle

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
