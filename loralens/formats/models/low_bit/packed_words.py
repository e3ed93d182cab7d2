"""Layouts whose codes are whole numbers in 32-bit words: GPTQ, AWQ, compressed-tensors and MLX.

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
or nvfp4; such weights are those of `loralens.formats.models.low_bit.e2m1`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import final

import numpy as np

from loralens.core.lazy import Array, LazyArray, Recent
from loralens.errors import FormatError, place
from loralens.formats.models.low_bit.e2m1 import MX, NV, Steps, e2m1_weight, float8, powers
from loralens.formats.models.low_bit.grouped import (
    AGAIN,
    BYTES,
    FLOATS,
    INDICES,
    SIBLING,
    WORDS,
    Bytes,
    CheckpointWeight,
    CodeBlock,
    Config,
    GroupedWeight,
    Groups,
    Tensors,
    activation_keys,
    bytes_of,
    pack_codes,
    part,
    section,
    unpack_codes,
    whole_number,
)
from loralens.linalg.exact import Singles

# Packed matrices that stay in memory while the rows of their weights are read: one for each of the usual two threads.
HELD = 2
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
# mode → columns of a group, and the steps of its scales
FLOAT_MODES: dict[str, tuple[int, Steps]] = {"mxfp4": (MX, powers), "nvfp4": (NV, float8)}


def _floats(stored: Array) -> Singles:
    """The transpose of a stored matrix, in float32."""
    return np.ascontiguousarray(stored.T.astype(np.float32))


def _refused(what: str) -> FormatError:
    return FormatError(f"its weights are quantised: {what}", fix=SIBLING)


def find_qweights(stored: Tensors, config: Config | None) -> Iterator[CheckpointWeight]:
    """All weights of GPTQ and AWQ, which have the same keys."""
    recent = Recent(HELD)
    for code_key, codes in stored.items():
        module, end, _ = code_key.rpartition(".qweight")
        scales = stored.get(f"{module}.scales")
        if not end or code_key != f"{module}.qweight" or scales is None:
            continue
        with place(f"{module}.weight"):
            if scales.shape[-1:] == codes.shape[-1:]:
                yield _gptq(stored, module, config, recent)
            # AWQ packs along the outputs.
            elif codes.ndim == 2 and scales.shape[-1:] == (AWQ_HOLDS * codes.shape[1],):
                yield _awq(stored, module, config, recent)


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
        return CodeBlock(codes, _floats(self.scales.read()[:, start:stop]), _floats(zeros))

    def groups(self) -> Groups:
        plain = Groups.of_size(self.shape[1], self.group_size)
        return plain if self.indices is None else Groups.stated(self.indices, plain, self.scales.shape[0], "g_idx")

    def pack(self, _: int, codes: Array, /) -> Bytes:
        words = pack_codes(codes, self.bits, 4 * self.codes.shape[0]).view(np.int32)
        return bytes_of(words.T).reshape(-1)


def _gptq(stored: Tensors, module: str, config: Config | None, recent: Recent) -> CheckpointWeight:
    keys = tuple(f"{module}.{name}" for name in ("qweight", "qzeros", "scales"))
    codes, zeros, scales = part(stored, keys[0], WORDS), part(stored, keys[1], WORDS), part(stored, keys[2], FLOATS)
    if codes.ndim != 2 or zeros.ndim != 2 or scales.ndim != 2 or not codes.size or not scales.size:
        raise FormatError(f"codes {codes.shape}, zeros {zeros.shape} and scales {scales.shape}", fix=AGAIN)
    outputs, groups = codes.shape[1], scales.shape[0]
    bits = zeros.shape[1] * 32 // outputs
    inputs = codes.shape[0] * 32 // max(1, bits)
    if bits not in GPTQ_BITS or zeros.shape != (groups, outputs * bits // 32) or inputs * bits != codes.shape[0] * 32:
        raise FormatError(f"codes {codes.shape} and zeros {zeros.shape} do not fit scales {scales.shape}", fix=AGAIN)
    index_key = f"{module}.g_idx"
    indices = part(stored, index_key, INDICES, (inputs,)) if index_key in stored else None
    settings = section(config)
    # The stated size counts only where it fits, as modules may have another one.
    size = whole_number(settings.get("group_size"))
    if not size or -(-inputs // size) != groups:
        size = -(-inputs // groups)
    if indices is None and -(-inputs // size) != groups:
        raise FormatError(f"{groups} groups of {size} do not fit {inputs} inputs", fix=AGAIN)
    weight = _Gptq(
        layout=f"GPTQ {bits}-bit",
        shape=(outputs, inputs),
        keys=keys if indices is None else (*keys, index_key),
        highest=(1 << bits) - 1,
        by_rows=False,
        codes=recent.keep(codes),
        zeros=zeros,
        scales=scales,
        indices=indices,
        group_size=size,
        bits=bits,
        shift=_zero_shift(settings),
    )
    return weight.in_checkpoint(stored, f"{module}.weight")


def _zero_shift(settings: Config) -> int:
    if not settings:
        what = "its weights are quantised: GPTQ, and nothing says how it stores zeros"
        raise FormatError(what, fix="keep config.json or quantize_config.json beside the weights")
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
        return CodeBlock(np.ascontiguousarray(codes.T), _floats(self.scales.read()[:, start:stop]), _floats(zeros))

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


def _awq(stored: Tensors, module: str, config: Config | None, recent: Recent) -> CheckpointWeight:
    kernel = str(section(config).get("version", "gemm")).lower()
    if kernel != "gemm":
        raise _refused(f"AWQ as {ascii(kernel)[1:-1][:40]}")
    keys = tuple(f"{module}.{name}" for name in ("qweight", "qzeros", "scales"))
    codes, scales = part(stored, keys[0], WORDS), part(stored, keys[2], FLOATS)
    inputs, words = codes.shape
    if scales.ndim != 2 or not scales.size or inputs % scales.shape[0]:
        raise FormatError(f"codes {codes.shape} do not fit scales {scales.shape}", fix=AGAIN)
    weight = _Awq(
        layout="AWQ 4-bit",
        shape=(AWQ_HOLDS * words, inputs),
        keys=keys,
        by_rows=False,
        codes=recent.keep(codes),
        zeros=part(stored, keys[1], WORDS, (scales.shape[0], words)),
        scales=scales,
    )
    return weight.in_checkpoint(stored, f"{module}.weight")


def find_compressed(stored: Tensors, config: Config | None) -> Iterator[CheckpointWeight]:  # noqa: ARG001 - all finders have this signature
    """All weights of compressed-tensors whose codes are packed in words."""
    for code_key in stored:
        module = code_key.removesuffix(".weight_packed")
        if module != code_key and stored[code_key].dtype in WORDS:
            with place(f"{module}.weight"):
                yield _compressed(stored, module)


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
            zeros = _floats(unpacked[:, start - first * holds : stop - first * holds])
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


def _compressed(stored: Tensors, module: str) -> CheckpointWeight:
    code_key, scale_key, zero_key, index_key, shape_key = keys = tuple(
        f"{module}.weight_{name}" for name in ("packed", "scale", "zero_point", "g_idx", "shape")
    )
    codes, stated = part(stored, code_key, WORDS), part(stored, shape_key, INDICES, (2,))
    rows, columns = (whole_number(n) for n in stated.read().tolist())
    if codes.ndim != 2 or rows != codes.shape[0] or columns is None:
        raise FormatError(f"codes {codes.shape} do not fit its weight_shape", fix=AGAIN)
    shape = rows, columns
    fitting = [bits for bits in COMPRESSED_BITS if -(-columns * bits // 32) == codes.shape[1]]
    if not fitting:
        raise _refused(f"compressed-tensors with {32 * codes.shape[1] / columns:g} bits")
    # A row of few columns takes one word at several widths. Then the usual width of 4 bits is assumed.
    bits = 4 if 4 in fitting else fitting[0]
    scales = part(stored, scale_key, FLOATS)
    scales = scales.reshape(1, 1) if scales.size == 1 else scales
    if scales.ndim != 2 or scales.shape[0] not in (1, rows) or not 0 < scales.shape[1] <= columns:
        raise FormatError(f"{scale_key} has the shape {scales.shape}, which does not fit a weight {shape}", fix=AGAIN)
    groups = scales.shape[1]
    if columns % groups and groups != -(-columns // -(-columns // groups)):
        raise FormatError(f"{groups} groups do not fit {columns} inputs", fix=AGAIN)
    weight = _Compressed(
        layout=f"compressed-tensors int{bits}",
        shape=shape,
        keys=tuple(key for key in keys if key in stored),
        highest=(1 << bits) - 1,
        codes=codes,
        scales=scales,
        zeros=part(stored, zero_key, WORDS, (-(-rows * bits // 32), groups)) if zero_key in stored else None,
        indices=part(stored, index_key, INDICES, (columns,)) if index_key in stored else None,
        bits=bits,
    )
    return weight.in_checkpoint(stored, f"{module}.weight", activation_keys(stored, module))


def find_mlx(stored: Tensors, config: Config | None) -> Iterator[CheckpointWeight]:
    """All weights that MLX quantised."""
    for scale_key in stored:
        module = scale_key.removesuffix(".scales")
        key = f"{module}.weight"
        if module != scale_key and key in stored and stored[key].dtype == np.uint32:
            with place(key):
                yield _mlx(stored, module, config)


@final
@dataclass(frozen=True, kw_only=True)
class _Mlx(GroupedWeight):
    codes: LazyArray
    scales: LazyArray
    biases: LazyArray
    group_size: int
    bits: int

    def block(self, start: int, stop: int) -> CodeBlock:
        codes, step, bias = (tensor.rows(start, stop).read() for tensor in (self.codes, self.scales, self.biases))
        unpacked = unpack_codes(bytes_of(codes), self.bits, self.shape[-1])
        return CodeBlock(unpacked, step.astype(np.float32), bias=bias.astype(np.float32))

    def groups(self) -> Groups:
        return Groups.of_size(self.shape[-1], self.group_size)

    def pack(self, _: int, codes: Array, /) -> Bytes:
        return pack_codes(codes, self.bits, 4 * self.codes.shape[1])


def _mlx(stored: Tensors, module: str, config: Config | None) -> CheckpointWeight:
    key, scale_key, bias_key = keys = (f"{module}.weight", f"{module}.scales", f"{module}.biases")
    settings = section(config, "quantization") or section(config)
    own = settings.get(module)
    # A module with settings of its own does not inherit the mode of the model.
    if isinstance(own, dict):
        settings = {**settings, "mode": "affine", **own}
    mode = settings.get("mode", "affine")
    if isinstance(mode, str) and mode in FLOAT_MODES:
        size, steps = FLOAT_MODES[mode]
        return e2m1_weight(stored, module, keys[:2], f"MLX {mode.upper()}", size=size, scale_types=BYTES, steps=steps)
    if mode != "affine":
        raise _refused(f"MLX {ascii(mode)[1:-1][:40]}")
    bits, group_size = whole_number(settings.get("bits")), whole_number(settings.get("group_size"))
    if bits not in MLX_BITS or group_size is None:
        what = "its weights are quantised: MLX, and config.json states no bits and group_size under quantization"
        raise FormatError(what, fix="keep config.json beside the weights")
    codes = part(stored, key, UINT32)
    if codes.ndim < 2:
        raise FormatError(f"its codes have the shape {codes.shape}", fix=AGAIN)
    shape = (*codes.shape[:-1], codes.shape[-1] * 32 // bits)
    if codes.shape[-1] * 32 % bits or shape[-1] % group_size:
        raise FormatError(f"codes {codes.shape} do not hold groups of {group_size} with {bits} bits", fix=AGAIN)
    groups, rows = (*shape[:-1], shape[-1] // group_size), prod(shape[:-1])
    weight = _Mlx(
        layout=f"MLX {bits}-bit",
        shape=shape,
        keys=keys,
        highest=(1 << bits) - 1,
        codes=codes.reshape(rows, codes.shape[-1]),
        scales=part(stored, scale_key, FLOATS, groups).reshape(rows, groups[-1]),
        biases=part(stored, bias_key, FLOATS, groups).reshape(rows, groups[-1]),
        group_size=group_size,
        bits=bits,
    )
    return weight.in_checkpoint(stored, key)
