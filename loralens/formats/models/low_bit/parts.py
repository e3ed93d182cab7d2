"""The stored tensors that a coded weight consists of: finding them, and checking that they fit each other."""

from collections.abc import Collection, Mapping
from math import prod
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from loralens.core.lazy import LazyArray
from loralens.core.weights import CodedWeight
from loralens.errors import FormatError
from loralens.formats.models.float8 import BESIDE

Tensors = Mapping[str, LazyArray]
Config = Mapping[str, Any]
Shape = tuple[int, ...]

AGAIN = "download the model again, or give the 16-bit model it was made from"
SIBLING = "give the 16-bit model it was made from"
FLOATS: frozenset[np.dtype[Any]] = frozenset(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32)))
WORDS: frozenset[np.dtype[Any]] = frozenset(map(np.dtype, (np.int32, np.uint32)))
INDICES: frozenset[np.dtype[Any]] = frozenset(map(np.dtype, (np.int32, np.int64)))
# Sizes from here on overflow in NumPy, and no tensor has them.
MOST = 1 << 48


class CheckpointWeight(NamedTuple):
    """A coded weight in a checkpoint.

    Attributes
    ----------
    key
        The key of the float weight.
    weight
        The weight.
    parts
        The keys of all tensors that it is stored in. A checkpoint of floats has none of them, except where the codes
        have the key of the weight.
    """

    key: str
    weight: CodedWeight
    parts: tuple[str, ...]


def part(stored: Tensors, key: str, dtypes: Collection[np.dtype[Any]], shape: Shape | None = None) -> LazyArray:
    """A stored tensor of one of these dtypes, and of this shape if one is given.

    Raises
    ------
    FormatError
        There is none.
    """
    tensor = stored.get(key)
    if tensor is None:
        raise FormatError(f"{key} is missing", fix=AGAIN)
    if tensor.dtype not in dtypes:
        names = " or ".join(sorted(map(str, dtypes)))
        raise FormatError(f"{key} is {tensor.dtype}, where this layout has {names}", fix=AGAIN)
    if shape is not None and tensor.shape != shape:
        raise FormatError(f"{key} has the shape {tensor.shape}, where its weight needs {shape}", fix=AGAIN)
    return tensor


def single(stored: Tensors, key: str, dtypes: Collection[np.dtype[Any]]) -> LazyArray:
    """A stored tensor with one number, whatever its axes."""
    tensor = part(stored, key, dtypes)
    if tensor.size != 1:
        raise FormatError(f"{key} has the shape {tensor.shape}, where one number is needed", fix=AGAIN)
    return tensor.reshape(1)


def activation_keys(stored: Tensors, module: str) -> tuple[str, ...]:
    """The keys of a module's scales of activations and of the cache, which its weight does not depend on."""
    return tuple(key for name in (*BESIDE, "input_global_scale") if (key := f"{module}.{name}") in stored)


def bits_of(stored: Tensors, keys: Collection[str], shape: Shape) -> float:
    """The bits that every number of a weight takes in the file, with its scales."""
    return 8 * sum(stored[key].nbytes for key in keys) / max(1, prod(shape))


def section(config: Config | None, name: str) -> Mapping[str, Any]:
    """A section of ``config.json``; empty if it has none."""
    value = (config or {}).get(name)
    return value if isinstance(value, dict) else {}


def whole_number(value: object, least: int = 1) -> int | None:
    """``value`` if it is a whole number from ``least`` on and of sensible size, else None; files may state anything."""
    return value if type(value) is int and least <= value < MOST else None
