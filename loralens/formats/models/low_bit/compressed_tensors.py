"""compressed-tensors, ``pack-quantized``: whole numbers as codes in 32-bit words, packed along the inputs.

    x.weight_packed         (out, ⌈in·bits/32⌉) of int32; a code is the number + 2^(bits−1)
    x.weight_scale          (out, groups), (out, 1), or a single one
    x.weight_zero_point     (⌈out·bits/32⌉, groups), packed along the outputs in the same way; none if symmetric
    x.weight_g_idx          (in,), the group of every input; without it each group consists of neighbouring inputs
    x.weight_shape          (out, in) as numbers

W = (number − zero)·scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np

from loralens.core.lazy import Array, LazyArray
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
    activation_keys,
    bits_of,
    part,
    whole_number,
)
from loralens.linalg.exact import Singles

END = ".weight_packed"
# At other widths, older versions left the last bits of each word unused. Newer versions use them, and the file does not
# say which of the two wrote it.
BITS = (1, 2, 4, 8)


def find_compressed(stored: Tensors, config: Config | None) -> Iterator[CheckpointWeight]:  # noqa: ARG001 - all finders have this signature
    """All weights whose codes are packed in words.

    Raises
    ------
    FormatError
        The parts of a weight do not fit together.
    """
    for code_key in stored:
        module = code_key.removesuffix(END)
        if module != code_key and stored[code_key].dtype in WORDS:
            with place(f"{module}.weight"):
                yield _weight(stored, module, code_key)


@final
@dataclass(frozen=True, slots=True)
class _Parts:
    """The stored tensors of one weight; the zeros are packed along the outputs."""

    codes: LazyArray
    scales: LazyArray
    zeros: LazyArray | None
    indices: LazyArray | None
    shape: tuple[int, int]
    groups_count: int
    bits: int

    def block(self, start: int, stop: int) -> CodeBlock:
        """The codes of some rows, with the scales and zeros of their groups."""
        codes = unpack_codes(bytes_of(self.codes.rows(start, stop).read()), self.bits, self.shape[1])
        # A single scale belongs to all rows.
        shared = self.scales.shape[0] == 1
        step = self.scales.read() if shared else self.scales.rows(start, stop).read()
        step = np.broadcast_to(step.astype(np.float32), (stop - start, self.groups_count))
        return CodeBlock(codes, np.ascontiguousarray(step), self._zeros(start, stop))

    def _zeros(self, start: int, stop: int) -> Singles:
        if self.zeros is None:
            return np.full((stop - start, self.groups_count), 1 << (self.bits - 1), np.float32)
        holds = 32 // self.bits
        first = start // holds
        words = np.ascontiguousarray(self.zeros.rows(first, -(-stop // holds)).read().T)
        zeros = unpack_codes(bytes_of(words), self.bits, words.shape[1] * holds)
        return np.ascontiguousarray(zeros[:, start - first * holds : stop - first * holds].T.astype(np.float32))

    def groups(self) -> Groups:
        """The group of every input.

        Raises
        ------
        FormatError
            A number in weight_g_idx is not that of a group.
        """
        columns = self.shape[1]
        plain = Groups.of_size(columns, -(-columns // self.groups_count))
        of_column = plain.of_column if self.indices is None else self.indices.read().astype(np.intp)
        # In compressed-tensors, −1 means that the groups have the usual order.
        if self.indices is None or np.any(of_column == -1):
            return plain
        if not 0 <= of_column.min() <= of_column.max() < self.groups_count:
            raise FormatError(f"its weight_g_idx has group numbers outside 0 to {self.groups_count - 1}", fix=AGAIN)
        return plain if np.array_equal(of_column, plain.of_column) else Groups(of_column)

    def pack(self, first: int, codes: Array) -> Bytes:
        """The bytes of some rows."""
        size = 4 * self.codes.shape[1]
        if codes.shape[1] * self.bits == 8 * size:
            return pack_codes(codes, self.bits, size)
        # The bits of a row's last word that hold no code stay as they are.
        rows = self.codes.rows(first, first + len(codes)).read()
        whole_rows = unpack_codes(bytes_of(rows), self.bits, 8 * size // self.bits).copy()
        whole_rows[:, : codes.shape[1]] = codes
        return pack_codes(whole_rows, self.bits, size)


def _weight(stored: Tensors, module: str, code_key: str) -> CheckpointWeight:
    scale_key, shape_key = f"{module}.weight_scale", f"{module}.weight_shape"
    codes, stated = part(stored, code_key, WORDS), part(stored, shape_key, INDICES, (2,))
    rows, columns = (whole_number(n) for n in stated.read().tolist())
    if codes.ndim != 2 or rows != codes.shape[0] or columns is None:
        raise FormatError(f"codes {codes.shape} do not fit its weight_shape", fix=AGAIN)
    shape = rows, columns
    bits = _bits(codes.shape[1], columns)
    scales = part(stored, scale_key, FLOATS)
    scales = scales.reshape(1, 1) if scales.size == 1 else scales
    if scales.ndim != 2 or scales.shape[0] not in (1, rows) or not 0 < scales.shape[1] <= columns:
        raise FormatError(f"{scale_key} has the shape {scales.shape}, which does not fit a weight {shape}", fix=AGAIN)
    groups = scales.shape[1]
    if columns % groups and groups != -(-columns // -(-columns // groups)):
        raise FormatError(f"{groups} groups do not fit {columns} inputs", fix=AGAIN)
    zero_key, index_key = f"{module}.weight_zero_point", f"{module}.weight_g_idx"
    zero_rows = -(-rows * bits // 32)
    zeros = part(stored, zero_key, WORDS, (zero_rows, groups)) if zero_key in stored else None
    indices = part(stored, index_key, INDICES, (columns,)) if index_key in stored else None
    keys = tuple(key for key in (code_key, scale_key, zero_key, index_key, shape_key) if key in stored)
    parts = _Parts(codes, scales, zeros, indices, shape, groups, bits)
    weight = GroupedWeight(
        f"compressed-tensors int{bits}",
        shape,
        bits_of(stored, keys, shape),
        code_key,
        block=parts.block,
        groups=parts.groups,
        pack=parts.pack,
        highest=(1 << bits) - 1,
    )
    return CheckpointWeight(f"{module}.weight", weight.weight(), (*keys, *activation_keys(stored, module)))


def _bits(words: int, columns: int) -> int:
    """The bits of a code, from the words that a row takes."""
    fitting = [bits for bits in BITS if -(-columns * bits // 32) == words]
    if not fitting:
        width = 32 * words / columns
        raise FormatError(f"its weights are quantised: compressed-tensors with {width:g} bits", fix=SIBLING)
    # A row of few columns takes one word at several widths. Then the usual width of 4 bits is assumed.
    return 4 if 4 in fitting else fitting[0]
