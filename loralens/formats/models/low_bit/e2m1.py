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
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, final

import ml_dtypes
import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.errors import FormatError, place
from loralens.formats.models.low_bit.grouped import (
    AGAIN,
    BYTES,
    Bytes,
    CheckpointWeight,
    CodeBlock,
    Config,
    GroupedWeight,
    Groups,
    Levels,
    Tensors,
    activation_keys,
    bytes_of,
    pack_codes,
    part,
    unpack_codes,
)
from loralens.linalg.exact import Singles

_MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 = Levels(np.array([*_MAGNITUDES, *(-number for number in _MAGNITUDES)], np.float32))
CODES = BYTES | {np.dtype(np.uint32)}
E4M3 = frozenset({np.dtype(ml_dtypes.float8_e4m3fn)})
SINGLE = frozenset({np.dtype(np.float32)})
MX, NV = 32, 16  # columns of a group
BIAS = 127  # of an exponent of MXFP4

Steps = Callable[[Array], Singles]  # the steps of stored scales


def powers(exponents: Array) -> Singles:
    """The steps of MXFP4."""
    with np.errstate(over="ignore"):
        return np.asarray(np.ldexp(np.float32(1), exponents.astype(np.int32) - BIAS), np.float32)


def float8(scales: Array) -> Singles:
    """The steps that are stored as the bytes of float8 numbers."""
    return np.asarray(scales.view(ml_dtypes.float8_e4m3fn), np.float32)


def _scaled(operation: Callable[..., Any], factor: LazyArray, scales: Array) -> Singles:
    with np.errstate(all="ignore"):
        return np.asarray(operation(scales.astype(np.float32), factor.read(), dtype=np.float32))


@final
@dataclass(frozen=True, kw_only=True)
class _Nibbles(GroupedWeight):
    codes: LazyArray
    scales: LazyArray
    size: int
    steps: Steps

    def block(self, start: int, stop: int) -> CodeBlock:
        data = bytes_of(self.codes.rows(start, stop).read())
        return CodeBlock(unpack_codes(data, 4, 2 * data.shape[1]), self.steps(self.scales.rows(start, stop).read()))

    def groups(self) -> Groups:
        return Groups.of_size(self.size * self.scales.shape[1], self.size)

    def pack(self, _: int, codes: Array, /) -> Bytes:
        return pack_codes(codes, 4, codes.shape[1] // 2)


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
    """A weight in groups of ``size``. The keys name its codes, its scales and any further tensors, in this order."""
    codes = part(stored, keys[0], CODES)
    columns = 2 * codes.shape[-1] * codes.dtype.itemsize if codes.ndim > 1 else 1
    if columns % size:
        raise FormatError(f"{keys[0]} has the shape {codes.shape}, which holds no groups of {size}", fix=AGAIN)
    shape, rows, groups = (*codes.shape[:-1], columns), prod(codes.shape[:-1]), columns // size
    weight = _Nibbles(
        layout=layout,
        shape=shape,
        keys=keys,
        levels=E2M1,
        codes=codes.reshape(rows, codes.shape[-1]),
        scales=part(stored, keys[1], scale_types, (*shape[:-1], groups)).reshape(rows, groups),
        size=size,
        steps=steps,
    )
    return weight.in_checkpoint(stored, f"{module}.weight", activation_keys(stored, module))


def find_packed(stored: Tensors, config: Config | None) -> Iterator[CheckpointWeight]:  # noqa: ARG001 - all finders have this signature
    """All weights of MXFP4 and NVFP4 of compressed-tensors, and of NVFP4 of modelopt."""
    for key in stored:
        for codes_end, factor_end, maker, operation in (
            (".weight_packed", ".weight_global_scale", "compressed-tensors", np.divide),
            (".weight", ".weight_scale_2", "modelopt", np.multiply),
        ):
            module = key.removesuffix(codes_end)
            scale_key, factor_key = f"{module}.weight_scale", module + factor_end
            if module == key or stored[key].dtype != np.uint8:
                continue
            if factor_key in stored:
                with place(f"{module}.weight"):
                    factor = part(stored, factor_key, SINGLE)
                    if factor.size != 1:
                        what = f"{factor_key} has the shape {factor.shape}, where one number is needed"
                        raise FormatError(what, fix=AGAIN)
                    steps, keys = partial(_scaled, operation, factor.reshape(1)), (key, scale_key, factor_key)
                    yield e2m1_weight(stored, module, keys, f"{maker} NVFP4", size=NV, scale_types=E4M3, steps=steps)
            elif maker == "compressed-tensors":
                with place(f"{module}.weight"):
                    keys2 = (key, scale_key)
                    yield e2m1_weight(stored, module, keys2, f"{maker} MXFP4", size=MX, scale_types=BYTES, steps=powers)


def find_stacks(stored: Tensors, config: Config | None) -> Iterator[CheckpointWeight]:  # noqa: ARG001 - all finders have this signature
    """All stacks of experts of gpt-oss."""
    for key, codes in stored.items():
        name = key.removesuffix("_blocks")
        scale_key = f"{name}_scales"
        if name == key or scale_key not in stored or codes.dtype != np.uint8:
            continue
        with place(name):
            if codes.ndim != 4 or codes.shape[-1] * 2 != MX:
                what = f"{key} has the shape {codes.shape}, where (experts, out, groups, 16) fits"
                raise FormatError(what, fix=AGAIN)
            experts, rows, groups, _ = codes.shape
            weight = _Nibbles(
                layout="gpt-oss MXFP4",
                shape=(experts, groups * MX, rows),
                keys=(key, scale_key),
                levels=E2M1,
                turned=True,
                codes=codes.reshape(experts * rows, groups * MX // 2),
                scales=part(stored, scale_key, BYTES, codes.shape[:-1]).reshape(experts * rows, groups),
                size=MX,
                steps=powers,
            )
            yield weight.in_checkpoint(stored, name)
