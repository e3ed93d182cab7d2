"""MLX: codes of 2 to 8 bits in 32-bit words, without gaps, and a scale and a bias for every group of columns.

    x.weight        (…, out, in·bits/32) of uint32
    x.scales        (…, out, in/group), often negative
    x.biases        the same shape

W = code·scale + bias. ``quantization`` of config.json states ``bits`` and ``group_size``, also for single modules. Its
``mode`` may be mxfp4 or nvfp4; such weights are those of `loralens.formats.models.low_bit.e2m1`.
"""

from collections.abc import Iterator
from functools import partial
from math import prod

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.errors import FormatError, place
from loralens.formats.models.low_bit.e2m1 import BYTES, MX, NV, Steps, e2m1_weight, float8, powers
from loralens.formats.models.low_bit.grouped import CodeBlock, GroupedWeight, Groups
from loralens.formats.models.low_bit.packing import Bytes, bytes_of, pack_codes, unpack_codes
from loralens.formats.models.low_bit.parts import (
    AGAIN,
    FLOATS,
    SIBLING,
    CheckpointWeight,
    Config,
    Tensors,
    bits_of,
    part,
    section,
    whole_number,
)

END = ".scales"
WORDS = frozenset({np.dtype(np.uint32)})
BITS = (2, 3, 4, 5, 6, 8)  # of mlx's affine mode
# mode → columns of a group, and the steps of its scales
FLOAT_MODES: dict[str, tuple[int, Steps]] = {"mxfp4": (MX, powers), "nvfp4": (NV, float8)}


def find_mlx(stored: Tensors, config: Config | None) -> Iterator[CheckpointWeight]:
    """All weights that MLX quantised.

    Raises
    ------
    FormatError
        The parts of a weight do not fit together, or config.json does not say what is needed.
    """
    for scale_key in stored:
        module = scale_key.removesuffix(END)
        key = f"{module}.weight"
        if module == scale_key or key not in stored or stored[key].dtype != np.uint32:
            continue
        with place(key):
            yield _weight(stored, module, key, scale_key, config)


def _weight(stored: Tensors, module: str, key: str, scale_key: str, config: Config | None) -> CheckpointWeight:
    stated = _settings(module, config)
    mode = stated.get("mode", "affine")
    if isinstance(mode, str) and mode in FLOAT_MODES:
        size, steps = FLOAT_MODES[mode]
        keys: tuple[str, ...] = (key, scale_key)
        return e2m1_weight(stored, module, keys, f"MLX {mode.upper()}", size=size, scale_types=BYTES, steps=steps)
    if mode != "affine":
        raise FormatError(f"its weights are quantised: MLX {ascii(mode)[1:-1][:40]}", fix=SIBLING)
    bits, size = _widths(stated)
    codes, bias_key = part(stored, key, WORDS), f"{module}.biases"
    if codes.ndim < 2:
        raise FormatError(f"its codes have the shape {codes.shape}", fix=AGAIN)
    shape = (*codes.shape[:-1], codes.shape[-1] * 32 // bits)
    if codes.shape[-1] * 32 % bits or shape[-1] % size:
        raise FormatError(f"codes {codes.shape} do not hold groups of {size} with {bits} bits", fix=AGAIN)
    groups = (*shape[:-1], shape[-1] // size)
    scales, biases = part(stored, scale_key, FLOATS, groups), part(stored, bias_key, FLOATS, groups)
    keys = (key, scale_key, bias_key)
    rows = prod(shape[:-1])
    flat_codes, flat_scales, flat_biases = (t.reshape(rows, t.shape[-1]) for t in (codes, scales, biases))
    weight = GroupedWeight(
        f"MLX {bits}-bit",
        shape,
        bits_of(stored, keys, shape),
        key,
        block=partial(_block, flat_codes, flat_scales, flat_biases, bits=bits),
        groups=partial(Groups.of_size, shape[-1], size),
        pack=partial(_pack, bits=bits, size=4 * codes.shape[-1]),
        highest=(1 << bits) - 1,
    )
    return CheckpointWeight(key, weight.weight(), keys)


def _settings(module: str, config: Config | None) -> Config:
    """The settings of a module."""
    stated = section(config, "quantization") or section(config, "quantization_config")
    own = stated.get(module)
    # A module with settings of its own does not inherit the mode of the model.
    return {**stated, "mode": "affine", **own} if isinstance(own, dict) else stated


def _widths(stated: Config) -> tuple[int, int]:
    """The bits of a code, and the columns of a group."""
    bits, size = whole_number(stated.get("bits")), whole_number(stated.get("group_size"))
    if bits not in BITS or size is None:
        what = "its weights are quantised: MLX, and config.json states no bits and group_size under quantization"
        raise FormatError(what, fix="keep config.json beside the weights")
    return bits, size


def _block(codes: LazyArray, scales: LazyArray, biases: LazyArray, start: int, stop: int, *, bits: int) -> CodeBlock:
    words = bytes_of(codes.rows(start, stop).read())
    step, bias = (tensor.rows(start, stop).read().astype(np.float32) for tensor in (scales, biases))
    return CodeBlock(unpack_codes(words, bits, words.shape[1] * 8 // bits), step, bias=bias)


def _pack(first: int, codes: Array, *, bits: int, size: int) -> Bytes:  # noqa: ARG001 - rows are alike
    return pack_codes(codes, bits, size)
