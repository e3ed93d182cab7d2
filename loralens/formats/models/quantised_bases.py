"""Float8 weights with scales, which are multiplied when they are read, and quantised bases that cannot be read.

Keys of the scale of ``x.weight`` (transformers' finegrained_fp8 and fbgemm_fp8, DeepSeek, compressed-tensors):

    x.weight_scale_inv    one for each block, 128 × 128 unless the configuration says otherwise, or a single one
    x.weight_scale        a single one, one for each row (out, 1), or one for each block

Despite its name, the first is a factor and not a divisor. For a stack of experts both have one more axis in front.

Bases that cannot be read are recognised by the keys and dtypes of their tensors, so that their codes are not taken for
weights. The layouts in `loralens.formats.models.low_bit` are decoded before this check.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.errors import FormatError, place

SCALES = ("_scale_inv", "_scale")
# Scales of activations and of the key-value cache, which the weights do not depend on.
BESIDE = ("input_scale", "input_scale_ub", "activation_scale", "output_scale", "k_scale", "v_scale", "q_scale")
BLOCK = (128, 128)  # the default of transformers' finegrained_fp8

Tensors = Mapping[str, LazyArray]


def dequantise(tensors: Tensors, config: Mapping[str, Any] | None) -> tuple[dict[str, LazyArray], dict[str, LazyArray]]:
    """The tensors of a checkpoint with float8 weights as float32, multiplied by their scales, and without the scales.

    The second mapping has the scale of each number of these weights, float32. A FormatError if the shape of a scale
    fits no rule.
    """
    # E8M0 is a type of scales, not of weights.
    weights = [
        key for key, t in tensors.items() if t.ndim and t.dtype.name.startswith("float8") and "e8m0" not in t.dtype.name
    ]
    # Of two scales, the first end in SCALES counts.
    scaled = {key: key + end for key in weights for end in reversed(SCALES) if key + end in tensors}
    if not scaled:
        return {**tensors}, {}
    section = (config or {}).get("quantization_config")
    size = section.get("weight_block_size") if isinstance(section, dict) else None
    stated = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    hidden, block = {*scaled.values()}, tuple(size) if stated else BLOCK
    floats, scales = {}, {}
    for key, tensor in tensors.items():
        if key in scaled:
            with place(key):
                floats[key], scales[key] = _scaled(tensor, tensors[scaled[key]], block)
        elif key not in hidden and key.rpartition(".")[2] not in BESIDE:
            floats[key] = tensor
    return floats, scales


def _scaled(tensor: LazyArray, scale: LazyArray, block: tuple[int, ...]) -> tuple[LazyArray, LazyArray]:
    """A weight times its scale, and the scale of each of its numbers; rows can be read separately."""
    shape, counts = tensor.shape, scale.shape
    # A single scale, with or without axes; or one for each row, stored without the axes of length 1.
    if scale.size == 1 or counts == shape[:1]:
        counts = (scale.size, *(1,) * (len(shape) - 1))
    # Blocks are two-dimensional: the axes in front of the last two (experts) have their own scales. An axis with one
    # scale shares it, and an axis with as many scales as numbers is not in blocks.
    sizes = (*(1,) * (len(shape) - 2), *block)[-len(shape) :]
    if len(counts) != len(shape) or not all(
        count in (1, n, -(-n // size)) for n, count, size in zip(shape, counts, sizes, strict=True)
    ):
        what = f"a float8 weight {shape} with scales {scale.shape} and blocks of {block[0]} × {block[1]}"
        fix = "keep config.json beside the weights: it says the block size; or give the model in 16 bits"
        raise FormatError(what, fix=fix)

    def spread(start: int, stop: int) -> Array:
        ends = ((start, stop), *((0, n) for n in shape[1:]))
        index = [
            np.arange(*(end if count > 1 else (1,))) // (1 if count == n else size)
            for end, n, count, size in zip(ends, shape, counts, sizes, strict=True)
        ]
        factor = scale.read().astype(np.float32).reshape(counts)[np.ix_(*index)]
        return np.broadcast_to(factor, (stop - start, *shape[1:]))

    def rows(start: int, stop: int) -> Array:
        product = tensor.rows(start, stop).read().astype(np.float32)
        product *= spread(start, stop)  # in place, without a second copy of the weight
        return product

    product, scales = (
        LazyArray(partial(read, 0, shape[0]), shape=shape, dtype=np.float32, rows=read if tensor.streams else None)
        for read in (rows, spread)
    )
    return product, scales


# Methods of ``quantization_config`` that store float8 weights with scales. Some of them can also store codes, and the
# name of the method does not say which of the two a model has.
FLOAT8_METHODS = frozenset({"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt"})
# method of quantisation → ends of keys, all of which its models have. The first match counts: if the files of one
# method also contain the ends of another, the first is listed earlier.
QUANTISATIONS = {
    # Files of older versions, which have no quant_state. With one they can be read.
    "bitsandbytes 4-bit": (".absmax", ".quant_map"),
    # GPTQ and AWQ come here only in packings that cannot be read.
    "GPTQ": (".qweight", ".g_idx"),
    "AWQ": (".qweight", ".qzeros", ".scales"),
    "compressed-tensors": (".weight_packed",),
    "HQQ": (".W_q",),
    "AQLM": (".codebooks", ".codes"),
    "quanto": (".weight._data",),
}


def check_not_quantised(tensors: Tensors, config: Mapping[str, Any] | None, *, only_shapes: bool = False) -> None:
    """Refuse a base whose weights are stored as codes.

    With ``only_shapes``, codes that have the keys and the shapes of the weights are accepted.

    Raises
    ------
    FormatError
        It is quantised. The message names the method and, if the configuration does, the model it was made from.
    """
    section = (config or {}).get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    # The method that ``config.json`` names, unless it may store float8 weights.
    stated = ascii(method)[1:-1][:40] if isinstance(method, str) and method not in FLOAT8_METHODS else ""
    found = (n for n, ends in QUANTISATIONS.items() if all(any(key.endswith(end) for key in tensors) for end in ends))
    name = next(found, "")
    # GPTQ without g_idx has the keys of AWQ, so only the configuration tells them apart.
    name = "GPTQ" if name == "AWQ" and stated == "gptq" else name
    # Weights are matrices of floating point numbers. Matrices of integers are codes of a method not listed above.
    matrices = (t.dtype for key, t in tensors.items() if key.endswith(".weight") and t.ndim >= 2)
    if not name and not only_shapes and any(np.issubdtype(dtype, np.integer) for dtype in matrices):
        name = stated or "integer"
    if name:
        source = (config or {}).get("_name_or_path")
        source_text = f" ({ascii(source)[1:-1][:80]})" if isinstance(source, str) and "/" in source else ""
        fix = "give the 16-bit model it was made from: an adapter that was trained on the quantised base fits it"
        raise FormatError(f"its weights are quantised: {name}{source_text}", fix=fix)
