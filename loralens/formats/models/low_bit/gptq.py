"""GPTQ: codes of 2, 3, 4 or 8 bits in 32-bit words, packed along the inputs.

    x.qweight       (in·bits/32, out) of int32, the codes of one output below each other
    x.qzeros        (groups, out·bits/32) of int32, packed along the outputs
    x.scales        (groups, out)
    x.g_idx         (in,), the group of every input; without it groups are neighbours

W[o, i] = (code − zero)·scale. ``checkpoint_format`` "gptq" stores zero − 1, and 0 as the largest code; "gptq_v2" stores
the zero itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import final

import numpy as np

from loralens.core.lazy import Array, LazyArray, Recent
from loralens.errors import FormatError, place
from loralens.formats.models.low_bit.grouped import CodeBlock, GroupedWeight, Groups
from loralens.formats.models.low_bit.packing import Bytes, bytes_of, pack_codes, unpack_codes
from loralens.formats.models.low_bit.parts import (
    AGAIN,
    FLOATS,
    INDICES,
    SIBLING,
    WORDS,
    CheckpointWeight,
    Config,
    Tensors,
    bits_of,
    part,
    section,
    whole_number,
)
from loralens.linalg.exact import Singles

END = ".qweight"
BITS = (2, 3, 4, 8)
ZERO_SHIFT = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero, by checkpoint_format
# Packed matrices that stay in memory while the rows of their weights are read: one for each of the usual two threads.
HELD = 2


def find_gptq(stored: Tensors, config: Config | None) -> Iterator[CheckpointWeight]:
    """All weights of GPTQ.

    Raises
    ------
    FormatError
        The parts of a weight do not fit together, or config.json does not say how zeros are stored.
    """
    recent = Recent(HELD)
    for code_key in stored:
        module = code_key.removesuffix(END)
        scales = stored.get(f"{module}.scales")
        # AWQ has the same keys, and packs along the outputs.
        if module != code_key and scales is not None and scales.shape[-1:] == stored[code_key].shape[-1:]:
            with place(f"{module}.weight"):
                yield _weight(stored, module, config, recent)


@final
@dataclass(frozen=True, slots=True)
class _Parts:
    """The stored tensors of one weight, and how they are read."""

    codes: LazyArray
    zeros: LazyArray
    scales: LazyArray
    indices: LazyArray | None
    inputs: int
    group_size: int
    bits: int
    shift: int

    def block(self, start: int, stop: int) -> CodeBlock:
        """The codes of some outputs; the file has those of all outputs beside each other."""
        words = np.ascontiguousarray(self.codes.read()[:, start:stop].T)
        codes = unpack_codes(bytes_of(words), self.bits, self.inputs)
        step = self.scales.read()[:, start:stop].T.astype(np.float32)
        return CodeBlock(codes, np.ascontiguousarray(step), self._zeros(start, stop))

    def _zeros(self, start: int, stop: int) -> Singles:
        zeros = unpack_codes(bytes_of(self.zeros.read()), self.bits, self.scales.shape[1])[:, start:stop]
        # The largest code stands for −1, which is a zero of 0.
        zeros = (zeros + np.uint8(self.shift)) & np.uint8((1 << self.bits) - 1)
        return np.ascontiguousarray(zeros.T.astype(np.float32))

    def groups(self) -> Groups:
        """The group of every input.

        Raises
        ------
        FormatError
            A number in g_idx is not that of a group.
        """
        plain = Groups.of_size(self.inputs, self.group_size)
        if self.indices is None:
            return plain
        of_column = self.indices.read().astype(np.intp)
        if of_column.size and not 0 <= of_column.min() <= of_column.max() < self.scales.shape[0]:
            raise FormatError(f"its g_idx has group numbers outside 0 to {self.scales.shape[0] - 1}", fix=AGAIN)
        return plain if np.array_equal(of_column, plain.of_column) else Groups(of_column)

    def pack(self, first: int, codes: Array) -> Bytes:  # noqa: ARG002 - always all rows
        """The bytes of the whole stored tensor."""
        words = pack_codes(codes, self.bits, 4 * self.codes.shape[0]).view(np.int32)
        return bytes_of(words.T).reshape(-1)


def _weight(stored: Tensors, module: str, config: Config | None, recent: Recent) -> CheckpointWeight:
    keys = tuple(
        name for end in (END, ".qzeros", ".scales", ".g_idx") if end != ".g_idx" or f"{module}.g_idx" in stored
        for name in (f"{module}{end}",)
    )  # fmt: skip
    codes, zeros, scales = part(stored, keys[0], WORDS), part(stored, keys[1], WORDS), part(stored, keys[2], FLOATS)
    if codes.ndim != 2 or zeros.ndim != 2 or scales.ndim != 2 or not codes.size or not scales.size:
        raise FormatError(f"codes {codes.shape}, zeros {zeros.shape} and scales {scales.shape}", fix=AGAIN)
    outputs, groups = codes.shape[1], scales.shape[0]
    bits = zeros.shape[1] * 32 // outputs
    inputs = codes.shape[0] * 32 // max(1, bits)
    if bits not in BITS or zeros.shape != (groups, outputs * bits // 32) or inputs * bits != codes.shape[0] * 32:
        raise FormatError(f"codes {codes.shape} and zeros {zeros.shape} do not fit scales {scales.shape}", fix=AGAIN)
    indices = part(stored, keys[3], INDICES, (inputs,)) if len(keys) > 3 else None
    size = _group_size(config, inputs, groups)
    if indices is None and -(-inputs // size) != groups:
        raise FormatError(f"{groups} groups of {size} do not fit {inputs} inputs", fix=AGAIN)
    parts = _Parts(recent.keep(codes), zeros, scales, indices, inputs, size, bits, _zero_shift(config))
    shape = outputs, inputs
    weight = GroupedWeight(
        f"GPTQ {bits}-bit",
        shape,
        bits_of(stored, keys, shape),
        keys[0],
        block=parts.block,
        groups=parts.groups,
        pack=partial(parts.pack),
        highest=(1 << bits) - 1,
        by_rows=False,
    )
    return CheckpointWeight(f"{module}.weight", weight.weight(), keys)


def _group_size(config: Config | None, inputs: int, groups: int) -> int:
    """The number of inputs in a group. The stated size counts only where it fits, as modules may have another one."""
    stated = whole_number(section(config, "quantization_config").get("group_size"))
    return stated if stated and -(-inputs // stated) == groups else -(-inputs // groups)


def _zero_shift(config: Config | None) -> int:
    stated = section(config, "quantization_config")
    if not stated:
        what = "its weights are quantised: GPTQ, and nothing says how it stores zeros"
        raise FormatError(what, fix="keep config.json or quantize_config.json beside the weights")
    # AutoGPTQ did not write this field, and knew the first form only.
    name = stated.get("checkpoint_format", "gptq")
    if not isinstance(name, str) or name not in ZERO_SHIFT:
        raise FormatError(f"its weights are quantised: GPTQ as {ascii(name)[1:-1][:40]}", fix=SIBLING)
    return ZERO_SHIFT[name]
