"""Codes of 4 bits that are numbers of the type E2M1, two in a byte, the first in the low nibble: MXFP4 and NVFP4.

    MXFP4 of compressed-tensors     x.weight_packed, x.weight_scale: uint8, an exponent for every 32 columns
    NVFP4 of compressed-tensors     x.weight_packed, x.weight_scale: float8 for every 16 columns, x.weight_global_scale
    NVFP4 of modelopt               x.weight, x.weight_scale: the same, x.weight_scale_2
    MXFP4 and NVFP4 of MLX          x.weight: uint32, x.scales: uint8, exponents or the bytes of float8
    MXFP4 of gpt-oss                x_blocks (experts, out, in/32, 16), x_scales (experts, out, in/32)

The step of MXFP4 is 2^(exponent − 127). The step of NVFP4 is the float8 number, divided by ``weight_global_scale`` or
multiplied by ``weight_scale_2``. The weight x of gpt-oss is (experts, in, out), as transformers holds it.
"""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.errors import FormatError, place
from loralens.formats.models.low_bit.grouped import CodeBlock, GroupedWeight, Groups, Levels
from loralens.formats.models.low_bit.packing import Bytes, bytes_of, pack_codes, unpack_codes
from loralens.formats.models.low_bit.parts import (
    AGAIN,
    CheckpointWeight,
    Config,
    Shape,
    Tensors,
    activation_keys,
    bits_of,
    part,
    single,
)
from loralens.linalg.exact import Singles

_MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 = Levels(np.array([*_MAGNITUDES, *(-number for number in _MAGNITUDES)], np.float32))
BYTES = frozenset({np.dtype(np.uint8)})
CODES = BYTES | {np.dtype(np.uint32)}
E4M3 = frozenset({np.dtype(ml_dtypes.float8_e4m3fn)})
SINGLE = frozenset({np.dtype(np.float32)})
MX, NV = 32, 16  # columns of a group
BIAS = 127  # of an exponent of MXFP4

Steps = Callable[[Array], Singles]  # the steps of stored scales


def find_packed(stored: Tensors, config: Config | None) -> Iterator[CheckpointWeight]:  # noqa: ARG001 - all layouts have this form
    """All weights of MXFP4 and NVFP4 of compressed-tensors.

    Raises
    ------
    FormatError
        The parts of a weight do not fit together.
    """
    end = ".weight_packed"
    for key in stored:
        module = key.removesuffix(end)
        if module == key or stored[key].dtype != np.uint8:
            continue
        with place(f"{module}.weight"):
            scale_key, global_key = f"{module}.weight_scale", f"{module}.weight_global_scale"
            if global_key in stored:
                divisor = single(stored, global_key, SINGLE)
                keys: tuple[str, ...] = (key, scale_key, global_key)
                steps = partial(_divide_scales, divisor)
                yield e2m1_weight(
                    stored, module, keys, "compressed-tensors NVFP4", size=NV, scale_types=E4M3, steps=steps
                )
            else:
                keys = key, scale_key
                yield e2m1_weight(
                    stored, module, keys, "compressed-tensors MXFP4", size=MX, scale_types=BYTES, steps=powers
                )


def find_modelopt(stored: Tensors, config: Config | None) -> Iterator[CheckpointWeight]:  # noqa: ARG001 - all layouts have this form
    """All weights of NVFP4 of modelopt.

    Raises
    ------
    FormatError
        The parts of a weight do not fit together.
    """
    end = ".weight_scale_2"
    for factor_key in stored:
        module = factor_key.removesuffix(end)
        key = f"{module}.weight"
        if module == factor_key or key not in stored or stored[key].dtype != np.uint8:
            continue
        with place(key):
            factor = single(stored, factor_key, SINGLE)
            keys = (key, f"{module}.weight_scale", factor_key)
            steps = partial(_multiply_scales, factor)
            yield e2m1_weight(stored, module, keys, "modelopt NVFP4", size=NV, scale_types=E4M3, steps=steps)


def find_stacks(stored: Tensors, config: Config | None) -> Iterator[CheckpointWeight]:  # noqa: ARG001 - all layouts have this form
    """All stacks of experts of gpt-oss.

    Raises
    ------
    FormatError
        The parts of a stack do not fit together.
    """
    end = "_blocks"
    for key in stored:
        name = key.removesuffix(end)
        scale_key = f"{name}_scales"
        if name == key or scale_key not in stored or stored[key].dtype != np.uint8:
            continue
        with place(name):
            codes = stored[key]
            if codes.ndim != 4 or codes.shape[-1] * 2 != MX:
                raise FormatError(
                    f"{key} has the shape {codes.shape}, where (experts, out, groups, 16) fits", fix=AGAIN
                )
            experts, rows, groups, _ = codes.shape
            scales = part(stored, scale_key, BYTES, codes.shape[:-1])
            shape, keys = (experts, groups * MX, rows), (key, scale_key)
            weight = GroupedWeight(
                "gpt-oss MXFP4",
                shape,
                bits_of(stored, keys, shape),
                key,
                block=partial(
                    _block,
                    codes.reshape(experts * rows, groups * MX // 2),
                    scales.reshape(experts * rows, groups),
                    powers,
                ),
                groups=partial(Groups.of_size, groups * MX, MX),
                pack=_pack,
                levels=E2M1,
                turned=True,
            )
            yield CheckpointWeight(name, weight.weight(), keys)


def powers(exponents: Array) -> Singles:
    """The steps of MXFP4."""
    with np.errstate(over="ignore"):
        steps: Singles = np.ldexp(np.float32(1), exponents.astype(np.int32) - BIAS)
        return steps


def float8(scales: Array) -> Singles:
    """The steps that are stored as the bytes of float8 numbers."""
    steps: Singles = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return steps


def _divide_scales(divisor: LazyArray, scales: Array) -> Singles:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.divide(scales.astype(np.float32), divisor.read(), dtype=np.float32)


def _multiply_scales(factor: LazyArray, scales: Array) -> Singles:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.multiply(scales.astype(np.float32), factor.read(), dtype=np.float32)


def e2m1_weight(
    stored: Tensors,
    module: str,
    keys: tuple[str, ...],
    layout: str,
    *,
    size: int,
    scale_types: Collection[np.dtype[Any]],
    steps: Steps,
) -> CheckpointWeight:
    """A weight in groups of ``size``. The keys name its codes, its scales and any further tensors, in this order.

    Raises
    ------
    FormatError
        Codes and scales do not fit together.
    """
    codes = part(stored, keys[0], CODES)
    columns = 2 * codes.shape[-1] * codes.dtype.itemsize if codes.ndim > 1 else 1
    if columns % size:
        raise FormatError(f"{keys[0]} has the shape {codes.shape}, which holds no groups of {size}", fix=AGAIN)
    shape: Shape = (*codes.shape[:-1], columns)
    scales = part(stored, keys[1], scale_types, (*shape[:-1], columns // size))
    rows = prod(shape[:-1])
    weight = GroupedWeight(
        layout,
        shape,
        bits_of(stored, keys, shape),
        keys[0],
        block=partial(_block, codes.reshape(rows, codes.shape[-1]), scales.reshape(rows, scales.shape[-1]), steps),
        groups=partial(Groups.of_size, columns, size),
        pack=_pack,
        levels=E2M1,
    )
    return CheckpointWeight(f"{module}.weight", weight.weight(), (*keys, *activation_keys(stored, module)))


def _block(codes: LazyArray, scales: LazyArray, steps: Steps, start: int, stop: int) -> CodeBlock:
    data = bytes_of(codes.rows(start, stop).read())
    return CodeBlock(unpack_codes(data, 4, 2 * data.shape[1]), steps(scales.rows(start, stop).read()))


def _pack(first: int, codes: Array) -> Bytes:  # noqa: ARG001 - rows are alike
    return pack_codes(codes, 4, codes.shape[1] // 2)
