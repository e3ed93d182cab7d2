"""float8 weights with scales beside them; a weight is multiplied by its scales when it is read.

Keys of the scale of ``x.weight`` (transformers' finegrained_fp8 and fbgemm_fp8, DeepSeek, compressed-tensors):

    x.weight_scale_inv    one for each block, 128 × 128 unless the configuration says otherwise, or a single one
    x.weight_scale        a single one, one for each row (out, 1), or one for each block

Despite its name, the first is a factor and not a divisor. For a stack of experts both have one more axis in front.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from loralens.core.adapter import Finding
from loralens.core.lazy import Array, LazyArray
from loralens.errors import FormatError, place

SCALES = ("_scale_inv", "_scale")
# Scales of activations and of the key-value cache, which the weights do not depend on.
BESIDE = ("input_scale", "input_scale_ub", "activation_scale", "output_scale", "k_scale", "v_scale", "q_scale")
BLOCK = (128, 128)  # the default of transformers' finegrained_fp8

Tensors = Mapping[str, LazyArray]


def dequantise(tensors: Tensors, config: Mapping[str, Any] | None) -> tuple[Tensors, tuple[Finding, ...]]:
    """The tensors without scales, with float8 weights multiplied by their scales to float32; also a note that says so.

    Raises
    ------
    FormatError
        The shape of a scale fits no rule.
    """
    scaled, block = _scale_keys(tensors), _block(config)
    if not scaled:
        return tensors, ()
    hidden = {*_keys_to_leave_out(tensors, scaled)}
    floats = {}
    for key, tensor in tensors.items():
        if key in scaled:
            with place(key):
                floats[key] = _product(tensor, tensors[scaled[key]], block)
        elif key not in hidden:
            floats[key] = tensor
    text = f"{len(scaled)} float8 weights are read as float32, multiplied by their scales"
    return floats, (Finding("note", "float8", text),)


class Float8Scales(NamedTuple):
    """The factors of float8 weights.

    Attributes
    ----------
    spread
        Key of a weight → the factor of each of its numbers, float32, in the shape of the weight.
    keys
        The keys of the stored scales and of other quantisation data, which a checkpoint of plain floats does not have.
    """

    spread: Mapping[str, LazyArray]
    keys: tuple[str, ...]


def scales_of(tensors: Tensors, config: Mapping[str, Any] | None) -> Float8Scales:
    """The scales of all float8 weights that have one.

    Raises
    ------
    FormatError
        The shape of a scale fits no rule.
    """
    scaled, block = _scale_keys(tensors), _block(config)
    spread = {}
    for key, scale in scaled.items():
        with place(key):
            spread[key] = _product(_ones(tensors[key].shape), tensors[scale], block)
    return Float8Scales(spread, _keys_to_leave_out(tensors, scaled))


def _scale_keys(tensors: Tensors) -> dict[str, str]:
    """The key of every float8 weight that has a scale → the key of its scale."""
    # E8M0 is a type of scales, not of weights.
    weights = [key for key, t in tensors.items() if t.dtype.name.startswith("float8") and "e8m0" not in t.dtype.name]
    # Of two scales, the first end in SCALES counts.
    return {key: key + end for key in weights for end in reversed(SCALES) if key + end in tensors}


def _keys_to_leave_out(tensors: Tensors, scaled: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of scales and of other quantisation data; none if no weight is scaled."""
    hidden = {*scaled.values()}
    return tuple(key for key in tensors if scaled and (key in hidden or key.rpartition(".")[2] in BESIDE))


def _ones(shape: tuple[int, ...]) -> LazyArray:
    def rows(start: int, stop: int) -> Array:
        return np.ones((stop - start, *shape[1:]), np.float32)

    return LazyArray(lambda: np.ones(shape, np.float32), shape=shape, dtype=np.float32, rows=rows)


def _block(config: Mapping[str, Any] | None) -> tuple[int, int]:
    """The block size of the configuration, or the default."""
    section = (config or {}).get("quantization_config")
    size = section.get("weight_block_size") if isinstance(section, dict) else None
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return BLOCK


def _product(tensor: LazyArray, scale: LazyArray, block: tuple[int, int]) -> LazyArray:
    """A weight times its scale, float32; its rows can be read separately if the stored ones can."""
    steps = _steps(tensor.shape, scale.shape, block)

    def product(numbers: Array, start: int) -> Array:
        return _multiply(numbers, scale.read().astype(np.float32), steps, start)

    def rows(start: int, stop: int) -> Array:
        return product(tensor.rows(start, stop).read(), start)

    rowwise = rows if tensor.streams else None
    return LazyArray(lambda: product(tensor.read(), 0), shape=tensor.shape, dtype=np.float32, rows=rowwise)


def _steps(shape: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """How many numbers along each axis share a scale; empty if all numbers share one."""
    # a single scale, with or without axes
    if all(n == 1 for n in scale):
        return ()
    if len(scale) == 1 and scale == shape[:1]:  # one scale for each row, stored without the axes of length 1
        scale = (scale[0], *(1,) * (len(shape) - 1))
    if len(scale) == len(shape):
        # Blocks are two-dimensional: the axes in front of the last two (experts) have their own scales. An axis with
        # one scale shares it, and an axis with as many scales as numbers is not in blocks.
        sizes = (*(1,) * (len(shape) - 2), *block)[-len(shape) :]
        steps = tuple(
            max(1, n) if count == 1 else 1 if count == n else size
            for n, count, size in zip(shape, scale, sizes, strict=True)
        )
        if all(-(-n // step) == count for n, count, step in zip(shape, scale, steps, strict=True)):
            return steps
    what = f"a float8 weight {shape} with scales {scale} and blocks of {block[0]} × {block[1]}"
    raise FormatError(
        what, fix="keep config.json beside the weights: it says the block size; or give the model in 16 bits"
    )


def _multiply(array: Array, scale: Array, steps: tuple[int, ...], start: int) -> Array:
    """Some rows of the weight times their scales, float32; ``start`` is the number of the first row."""
    product = array.astype(np.float32)
    if not steps:
        # In place, without a second copy of the weight.
        product *= scale.reshape(())
        return product
    # A scale of one axis belongs to the rows.
    scale = scale.reshape(*scale.shape, *(1,) * (len(steps) - scale.ndim))
    scale = scale[np.arange(start, start + len(array)) // steps[0]]
    # Repeated scales are cut to the weight, whose last block may be smaller.
    for axis, step in enumerate(steps[1:], start=1):
        if scale.shape[axis] > 1:
            scale = np.repeat(scale, step, axis=axis)[(slice(None),) * axis + (slice(array.shape[axis]),)]
    product *= scale
    return product
