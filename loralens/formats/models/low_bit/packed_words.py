"""Layouts whose codes fill words or bytes: GPTQ, AWQ, compressed-tensors, modelopt, MLX and gpt-oss.

GPTQ: codes of 2, 3, 4 or 8 bits, packed along the inputs. W[o, i] = (code − zero)·scale::

    x.qweight               (in·bits/32, out) of int32, the codes of one output below each other
    x.qzeros                (groups, out·bits/32) of int32, packed along the outputs
    x.scales                (groups, out)
    x.g_idx                 (in,), the group of every input; without it groups are neighbours

``checkpoint_format`` "gptq" stores zero − 1, and 0 as the largest code; "gptq_v2" stores the zero itself.

AWQ (gemm): 4-bit codes, packed along the outputs in an order of their own. W[o, i] = (code − zero)·scale::

    x.qweight               (in, out/8); the nibbles of a word, from the lowest on, are outputs 0, 2, 4, 6, 1, 3, 5, 7
    x.qzeros                (groups, out/8), packed in the same way
    x.scales                (groups, out)

compressed-tensors, ``pack-quantized``: packed along the inputs; a code is the number + 2^(bits−1).
W = (number − zero)·scale::

    x.weight_packed         (out, ⌈in·bits/32⌉) of int32
    x.weight_scale          (out, groups), (out, 1), or a single one
    x.weight_zero_point     (⌈out·bits/32⌉, groups), packed along the outputs in the same way; none if symmetric
    x.weight_g_idx          (in,), the group of every input; without it each group consists of neighbouring inputs
    x.weight_shape          (out, in) as numbers

MLX: codes of 2 to 8 bits, packed along the inputs. W = code·scale + bias::

    x.weight                (…, out, in·bits/32) of uint32
    x.scales                (…, out, in/group), often negative
    x.biases                the same shape

``quantization`` of config.json states ``bits`` and ``group_size``, also for single modules. Its ``mode`` may be mxfp4
or nvfp4.

Codes of 4 bits may be numbers of the type E2M1, two in a byte, the first in the low nibble: MXFP4 and NVFP4::

    MXFP4 of compressed-tensors     x.weight_packed, x.weight_scale: uint8, an exponent for every 32 columns
    NVFP4 of compressed-tensors     x.weight_packed, x.weight_scale: float8 for every 16 columns, x.weight_global_scale
    NVFP4 of modelopt               x.weight, x.weight_scale: the same, x.weight_scale_2
    MXFP4 and NVFP4 of MLX          x.weight: uint32, x.scales: uint8, exponents or the bytes of float8
    MXFP4 of gpt-oss                x_blocks (experts, out, in/32, 16), x_scales (experts, out, in/32)

The step of MXFP4 is 2^(exponent − 127). The step of NVFP4 is the float8 number, divided by ``weight_global_scale`` or
multiplied by ``weight_scale_2``. The weight x of gpt-oss is (experts, in, out), as transformers holds it.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, final

import ml_dtypes
import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.errors import FormatError
from loralens.formats.models.low_bit.grouped import (
    AGAIN,
    BYTES,
    FLOATS,
    INDICES,
    SIBLING,
    WORDS,
    Bytes,
    CodeBlock,
    Config,
    GroupedWeight,
    Groups,
    Levels,
    Source,
    bytes_of,
    pack_codes,
    unpack_codes,
    whole_number,
)
from loralens.linalg.exact import Singles

GPTQ_BITS = (2, 3, 4, 8)
ZERO_SHIFT = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero, by checkpoint_format
AWQ_BITS, AWQ_HOLDS = 4, 8  # bits of a code, and codes in a word
NIBBLES = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # the nibble of every output of a word
OUTPUTS = np.argsort(NIBBLES)  # the output of every nibble
# At other widths, older versions of compressed-tensors left the last bits of each word unused. Newer versions use them,
# and the file does not say which of the two wrote it.
COMPRESSED_BITS = (1, 2, 4, 8)
MLX_BITS = (2, 3, 4, 5, 6, 8)
UINT32 = frozenset({np.dtype(np.uint32)})
E4M3 = frozenset({np.dtype(ml_dtypes.float8_e4m3fn)})
SINGLE = frozenset({np.dtype(np.float32)})
_MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 = Levels(np.array([*_MAGNITUDES, *(-number for number in _MAGNITUDES)], np.float32))
MX, NV = 32, 16  # columns of a group
BIAS = 127  # of an exponent of MXFP4

Steps = Callable[[Array], Singles]  # the steps of stored scales


def singles(stored: Array) -> Singles:
    """Stored numbers in float32."""
    return stored.astype(np.float32)


def powers(exponents: Array) -> Singles:
    """The steps of MXFP4."""
    with np.errstate(over="ignore"):
        return np.asarray(np.ldexp(np.float32(1), exponents.astype(np.int32) - BIAS), np.float32)


def float8(scales: Array) -> Singles:
    """The steps that are stored as the bytes of float8 numbers."""
    return np.asarray(scales.view(ml_dtypes.float8_e4m3fn), np.float32)


# mode → columns of a group, and the steps of its scales
FLOAT_MODES: dict[str, tuple[int, Steps]] = {"mxfp4": (MX, powers), "nvfp4": (NV, float8)}


def _turned(stored: Array) -> Singles:
    """The transpose of a stored matrix, in float32."""
    return np.ascontiguousarray(stored.T.astype(np.float32))


def _refused(what: str, fix: str = SIBLING) -> FormatError:
    return FormatError(f"its weights are quantised: {what}", fix=fix)


def qweight(source: Source, module: str) -> GroupedWeight | None:
    """A weight of GPTQ or AWQ, which have the same keys."""
    codes, scales = source.stored[f"{module}.qweight"], source.stored.get(f"{module}.scales")
    if scales is not None and scales.shape[-1:] == codes.shape[-1:]:
        return _gptq(source, module)
    # AWQ packs along the outputs.
    if scales is not None and codes.ndim == 2 and scales.shape[-1:] == (AWQ_HOLDS * codes.shape[1],):
        return _awq(source, module)
    return None


@final
@dataclass(frozen=True, kw_only=True)
class _Gptq(GroupedWeight):
    codes: LazyArray
    zeros: LazyArray
    scales: LazyArray
    indices: LazyArray | None
    group_size: int
    bits: int
    shift: int

    def block(self, start: int, stop: int) -> CodeBlock:
        # The file has the codes of all outputs beside each other.
        codes = unpack_codes(bytes_of(self.codes.read()[:, start:stop].T), self.bits, self.shape[1])
        zeros = unpack_codes(bytes_of(self.zeros.read()), self.bits, self.shape[0])[:, start:stop]
        # The largest code stands for −1, which is a zero of 0.
        zeros = (zeros + np.uint8(self.shift)) & np.uint8((1 << self.bits) - 1)
        return CodeBlock(codes, _turned(self.scales.read()[:, start:stop]), _turned(zeros))

    def groups(self) -> Groups:
        plain = Groups.of_size(self.shape[1], self.group_size)
        return plain if self.indices is None else Groups.stated(self.indices, plain, self.scales.shape[0], "g_idx")

    def pack(self, _: int, codes: Array, /) -> Bytes:
        words = pack_codes(codes, self.bits, 4 * self.codes.shape[0]).view(np.int32)
        return bytes_of(words.T).reshape(-1)


def _gptq(source: Source, module: str) -> GroupedWeight:
    keys = tuple(f"{module}.{name}" for name in ("qweight", "qzeros", "scales"))
    codes, zeros, scales = map(source.part, keys, (WORDS, WORDS, FLOATS))
    if codes.ndim != 2 or zeros.ndim != 2 or scales.ndim != 2 or not codes.size or not scales.size:
        raise FormatError(f"codes {codes.shape}, zeros {zeros.shape} and scales {scales.shape}", fix=AGAIN)
    outputs, groups = codes.shape[1], scales.shape[0]
    bits = zeros.shape[1] * 32 // outputs
    inputs = codes.shape[0] * 32 // max(1, bits)
    if bits not in GPTQ_BITS or zeros.shape != (groups, outputs * bits // 32) or inputs * bits != codes.shape[0] * 32:
        raise FormatError(f"codes {codes.shape} and zeros {zeros.shape} do not fit scales {scales.shape}", fix=AGAIN)
    indices = source.optional(f"{module}.g_idx", INDICES, (inputs,))
    settings = source.section()
    # The stated size counts only where it fits, as modules may have another one.
    size = whole_number(settings.get("group_size"))
    if not size or -(-inputs // size) != groups:
        size = -(-inputs // groups)
    if indices is None and -(-inputs // size) != groups:
        raise FormatError(f"{groups} groups of {size} do not fit {inputs} inputs", fix=AGAIN)
    return _Gptq(
        layout=f"GPTQ {bits}-bit",
        shape=(outputs, inputs),
        keys=(*keys, *source.there(f"{module}.g_idx")),
        highest=(1 << bits) - 1,
        by_rows=False,
        codes=source.recent.keep(codes),
        zeros=zeros,
        scales=scales,
        indices=indices,
        group_size=size,
        bits=bits,
        shift=_zero_shift(settings),
    )


def _zero_shift(settings: Config) -> int:
    if not settings:
        fix = "keep config.json or quantize_config.json beside the weights"
        raise _refused("GPTQ, and nothing says how it stores zeros", fix)
    # AutoGPTQ did not write this field, and knew the first form only.
    name = settings.get("checkpoint_format", "gptq")
    if not isinstance(name, str) or name not in ZERO_SHIFT:
        raise _refused(f"GPTQ as {ascii(name)[1:-1][:40]}")
    return ZERO_SHIFT[name]


@final
@dataclass(frozen=True, kw_only=True)
class _Awq(GroupedWeight):
    codes: LazyArray
    zeros: LazyArray
    scales: LazyArray

    def block(self, start: int, stop: int) -> CodeBlock:
        codes, zeros = (_awq_codes(words.read(), start, stop) for words in (self.codes, self.zeros))
        return CodeBlock(np.ascontiguousarray(codes.T), _turned(self.scales.read()[:, start:stop]), _turned(zeros))

    def groups(self) -> Groups:
        return Groups.of_size(self.shape[1], self.shape[1] // self.scales.shape[0])

    def pack(self, _: int, codes: Array, /) -> Bytes:
        inputs, words = self.codes.shape
        ordered = codes.T.reshape(inputs, words, AWQ_HOLDS)[:, :, OUTPUTS].reshape(inputs, -1)
        return pack_codes(ordered, AWQ_BITS, 4 * words).reshape(-1)


def _awq_codes(words: Array, start: int, stop: int) -> Bytes:
    """The codes of outputs ``start`` to ``stop``, for every row of words; other words are not unpacked."""
    first, last = start // AWQ_HOLDS, -(-stop // AWQ_HOLDS)
    nibbles = unpack_codes(bytes_of(words[:, first:last]), AWQ_BITS, AWQ_HOLDS * (last - first))
    codes = nibbles.reshape(len(words), last - first, AWQ_HOLDS)[:, :, NIBBLES].reshape(nibbles.shape)
    return codes[:, start - first * AWQ_HOLDS : stop - first * AWQ_HOLDS]


def _awq(source: Source, module: str) -> GroupedWeight:
    kernel = str(source.section().get("version", "gemm")).lower()
    if kernel != "gemm":
        raise _refused(f"AWQ as {ascii(kernel)[1:-1][:40]}")
    keys = tuple(f"{module}.{name}" for name in ("qweight", "qzeros", "scales"))
    codes, scales = source.part(keys[0], WORDS), source.part(keys[2], FLOATS)
    inputs, words = codes.shape
    if scales.ndim != 2 or not scales.size or inputs % scales.shape[0]:
        raise FormatError(f"codes {codes.shape} do not fit scales {scales.shape}", fix=AGAIN)
    return _Awq(
        layout="AWQ 4-bit",
        shape=(AWQ_HOLDS * words, inputs),
        keys=keys,
        by_rows=False,
        codes=source.recent.keep(codes),
        zeros=source.part(keys[1], WORDS, (scales.shape[0], words)),
        scales=scales,
    )


@final
@dataclass(frozen=True, kw_only=True)
class _Compressed(GroupedWeight):
    codes: LazyArray
    scales: LazyArray
    zeros: LazyArray | None
    indices: LazyArray | None
    bits: int

    def block(self, start: int, stop: int) -> CodeBlock:
        codes = unpack_codes(bytes_of(self.codes.rows(start, stop).read()), self.bits, self.shape[1])
        # A single scale belongs to all rows.
        step = (self.scales if self.scales.shape[0] == 1 else self.scales.rows(start, stop)).read().astype(np.float32)
        count = stop - start, step.shape[1]
        if self.zeros is None:
            zeros = np.full(count, 1 << (self.bits - 1), np.float32)
        else:
            holds = 32 // self.bits
            first = start // holds
            words = np.ascontiguousarray(self.zeros.rows(first, -(-stop // holds)).read().T)
            unpacked = unpack_codes(bytes_of(words), self.bits, words.shape[1] * holds)
            zeros = _turned(unpacked[:, start - first * holds : stop - first * holds])
        return CodeBlock(codes, np.ascontiguousarray(np.broadcast_to(step, count)), zeros)

    def groups(self) -> Groups:
        columns, count = self.shape[1], self.scales.shape[1]
        plain = Groups.of_size(columns, -(-columns // count))
        # In compressed-tensors, −1 means that the groups have the usual order.
        if self.indices is None or np.any(self.indices.read() == -1):
            return plain
        return Groups.stated(self.indices, plain, count, "weight_g_idx")

    def pack(self, first: int, codes: Array, /) -> Bytes:
        size = 4 * self.codes.shape[1]
        # The bits of a row's last word that hold no code stay as they are.
        rows = self.codes.rows(first, first + len(codes)).read()
        whole_rows = unpack_codes(bytes_of(rows), self.bits, 8 * size // self.bits).copy()
        whole_rows[:, : codes.shape[1]] = codes
        return pack_codes(whole_rows, self.bits, size)


def compressed(source: Source, module: str) -> GroupedWeight | None:
    """A weight of compressed-tensors: whole numbers in words, or numbers of E2M1 in bytes."""
    code_key, scale_key, zero_key, index_key, shape_key, factor_key = keys = tuple(
        f"{module}.weight_{name}" for name in ("packed", "scale", "zero_point", "g_idx", "shape", "global_scale")
    )
    codes = source.stored[code_key]
    if codes.dtype == np.uint8:
        if factor_key in source.stored:
            return _nvfp4(source, (code_key, scale_key, factor_key), "compressed-tensors NVFP4", np.divide)
        return _rows(source, keys[:2], "compressed-tensors MXFP4", MX, scale_types=BYTES, steps=powers)
    if codes.dtype not in WORDS:
        return None
    stated, scales = source.part(shape_key, INDICES, (2,)), source.part(scale_key, FLOATS)
    rows, columns = (whole_number(n) for n in stated.read().tolist())
    if codes.ndim != 2 or rows != codes.shape[0] or columns is None:
        raise FormatError(f"codes {codes.shape} do not fit its weight_shape", fix=AGAIN)
    fitting = [bits for bits in COMPRESSED_BITS if -(-columns * bits // 32) == codes.shape[1]]
    if not fitting:
        raise _refused(f"compressed-tensors with {32 * codes.shape[1] / columns:g} bits")
    # A row of few columns takes one word at several widths. Then the usual width of 4 bits is assumed.
    bits = 4 if 4 in fitting else fitting[0]
    scales = scales.reshape(1, 1) if scales.size == 1 else scales
    if scales.ndim != 2 or scales.shape[0] not in (1, rows) or not 0 < scales.shape[1] <= columns:
        what = f"{scale_key} has the shape {scales.shape}, which does not fit a weight {(rows, columns)}"
        raise FormatError(what, fix=AGAIN)
    groups = scales.shape[1]
    if columns % groups and groups != -(-columns // -(-columns // groups)):
        raise FormatError(f"{groups} groups do not fit {columns} inputs", fix=AGAIN)
    return _Compressed(
        layout=f"compressed-tensors int{bits}",
        shape=(rows, columns),
        keys=source.there(*keys[:5]),
        highest=(1 << bits) - 1,
        codes=codes,
        scales=scales,
        zeros=source.optional(zero_key, WORDS, (-(-rows * bits // 32), groups)),
        indices=source.optional(index_key, INDICES, (columns,)),
        bits=bits,
    )


@final
@dataclass(frozen=True, kw_only=True)
class _Rows(GroupedWeight):
    """Codes in rows of bytes, a scale for each group of neighbouring columns, and perhaps a bias for each."""

    codes: LazyArray
    scales: LazyArray
    biases: LazyArray | None
    group_size: int
    bits: int
    steps: Steps

    def block(self, start: int, stop: int) -> CodeBlock:
        codes, scales = (tensor.rows(start, stop).read() for tensor in (self.codes, self.scales))
        bias = None if self.biases is None else singles(self.biases.rows(start, stop).read())
        return CodeBlock(unpack_codes(bytes_of(codes), self.bits, self.matrix[1]), self.steps(scales), bias=bias)

    def groups(self) -> Groups:
        return Groups.of_size(self.matrix[1], self.group_size)

    def pack(self, _: int, codes: Array, /) -> Bytes:
        return pack_codes(codes, self.bits, codes.shape[1] * self.bits // 8)


def _rows(
    source: Source,
    keys: tuple[str, ...],
    layout: str,
    size: int,
    *,
    bits: int = 4,
    types: Collection[np.dtype[Any]] = BYTES | UINT32,
    levels: Levels | None = E2M1,
    scale_types: Collection[np.dtype[Any]],
    steps: Steps,
) -> GroupedWeight:
    """A weight in groups of ``size``. The keys name its codes, its scales and its biases or further tensors."""
    codes = source.part(keys[0], types)
    row_bits = 8 * codes.shape[-1] * codes.dtype.itemsize if codes.ndim > 1 else 1
    if row_bits % bits or row_bits // bits % size:
        what = f"{keys[0]} has the shape {codes.shape}, which holds no groups of {size} with {bits} bits"
        raise FormatError(what, fix=AGAIN)
    rows, groups = prod(codes.shape[:-1]), row_bits // bits // size
    scales, *biases = (
        source.part(key, scale_types, (*codes.shape[:-1], groups)).reshape(rows, groups)
        for key in keys[1 : 2 if levels else 3]
    )
    return _Rows(
        layout=layout,
        shape=(*codes.shape[:-1], row_bits // bits),
        keys=keys,
        highest=(1 << bits) - 1,
        levels=levels,
        codes=codes.reshape(rows, codes.shape[-1]),
        scales=scales,
        biases=next(iter(biases), None),
        group_size=size,
        bits=bits,
        steps=steps,
    )


def _nvfp4(source: Source, keys: tuple[str, str, str], layout: str, operation: Callable[..., Singles]) -> GroupedWeight:
    """A weight of NVFP4 with a factor of all scales, which is the last tensor."""
    factor = source.part(keys[2], SINGLE)
    if factor.size != 1:
        raise FormatError(f"{keys[2]} has the shape {factor.shape}, where one number is needed", fix=AGAIN)
    steps = partial(_scaled, operation, factor.reshape(1))
    return _rows(source, keys, layout, NV, scale_types=E4M3, steps=steps)


def _scaled(operation: Callable[..., Singles], factor: LazyArray, scales: Array) -> Singles:
    with np.errstate(all="ignore"):
        return np.asarray(operation(singles(scales), factor.read(), dtype=np.float32))


def modelopt(source: Source, module: str) -> GroupedWeight | None:
    """A weight of NVFP4 of modelopt."""
    key = f"{module}.weight"
    if key not in source.stored or source.stored[key].dtype != np.uint8:
        return None
    return _nvfp4(source, (key, f"{key}_scale", f"{key}_scale_2"), "modelopt NVFP4", np.multiply)


def gpt_oss(source: Source, name: str) -> GroupedWeight | None:
    """A stack of experts of gpt-oss."""
    keys = f"{name}_blocks", f"{name}_scales"
    codes = source.stored[keys[0]]
    if keys[1] not in source.stored or codes.dtype != np.uint8:
        return None
    if codes.ndim != 4 or codes.shape[-1] * 2 != MX:
        what = f"{keys[0]} has the shape {codes.shape}, where (experts, out, groups, 16) fits"
        raise FormatError(what, fix=AGAIN)
    experts, rows, groups, _ = codes.shape
    return _Rows(
        layout="gpt-oss MXFP4",
        shape=(experts, groups * MX, rows),
        keys=keys,
        levels=E2M1,
        turned=True,
        codes=codes.reshape(experts * rows, groups * MX // 2),
        scales=source.part(keys[1], BYTES, codes.shape[:-1]).reshape(experts * rows, groups),
        biases=None,
        group_size=MX,
        bits=4,
        steps=powers,
    )


def mlx(source: Source, module: str) -> GroupedWeight | None:
    """A weight that MLX quantised."""
    keys = (f"{module}.weight", f"{module}.scales", f"{module}.biases")
    if keys[0] not in source.stored or source.stored[keys[0]].dtype != np.uint32:
        return None
    settings = source.section("quantization") or source.section()
    own = settings.get(module)
    # A module with settings of its own does not inherit the mode of the model.
    if isinstance(own, dict):
        settings = {**settings, "mode": "affine", **own}
    mode = settings.get("mode", "affine")
    if isinstance(mode, str) and mode in FLOAT_MODES:
        size, steps = FLOAT_MODES[mode]
        return _rows(source, keys[:2], f"MLX {mode.upper()}", size, scale_types=BYTES, steps=steps)
    if mode != "affine":
        raise _refused(f"MLX {ascii(mode)[1:-1][:40]}")
    bits, group_size = whole_number(settings.get("bits")), whole_number(settings.get("group_size"))
    if bits not in MLX_BITS or group_size is None:
        fix = "keep config.json beside the weights"
        raise _refused("MLX, and config.json states no bits and group_size under quantization", fix)
    return _rows(
        source,
        keys,
        f"MLX {bits}-bit",
        group_size,
        bits=bits,
        types=UINT32,
        levels=None,
        scale_types=FLOATS,
        steps=singles,
    )
