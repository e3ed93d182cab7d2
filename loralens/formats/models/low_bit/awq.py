"""AWQ (gemm): 4-bit codes in 32-bit words, packed along the outputs in an order of their own.

    x.qweight       (in, out/8) of int32; the nibbles of a word, from the lowest on, are outputs 0, 2, 4, 6, 1, 3, 5, 7
    x.qzeros        (groups, out/8), packed in the same way
    x.scales        (groups, out)

W[o, i] = (code − zero)·scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np

from loralens.core.lazy import Array, LazyArray, Recent
from loralens.errors import FormatError, place
from loralens.formats.models.low_bit.gptq import HELD
from loralens.formats.models.low_bit.grouped import CodeBlock, GroupedWeight, Groups
from loralens.formats.models.low_bit.packing import Bytes, bytes_of, pack_codes, unpack_codes
from loralens.formats.models.low_bit.parts import (
    AGAIN,
    FLOATS,
    SIBLING,
    WORDS,
    CheckpointWeight,
    Config,
    Tensors,
    bits_of,
    part,
    section,
)

END = ".qweight"
BITS, HOLDS = 4, 8  # bits of a code, and codes in a word
NIBBLES = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # the nibble of every output of a word
OUTPUTS = np.argsort(NIBBLES)  # the output of every nibble


def find_awq(stored: Tensors, config: Config | None) -> Iterator[CheckpointWeight]:
    """All weights of AWQ.

    Raises
    ------
    FormatError
        The parts of a weight do not fit together, or they are stored for another kernel than gemm.
    """
    recent = Recent(HELD)
    for code_key in stored:
        module, codes = code_key.removesuffix(END), stored[code_key]
        scales = stored.get(f"{module}.scales")
        wide = codes.ndim == 2 and scales is not None and scales.shape[-1:] == (HOLDS * codes.shape[1],)
        if module != code_key and wide:
            with place(f"{module}.weight"):
                yield _weight(stored, module, config, recent)


@final
@dataclass(frozen=True, slots=True)
class _Parts:
    """The stored tensors of one weight."""

    codes: LazyArray
    zeros: LazyArray
    scales: LazyArray

    def block(self, start: int, stop: int) -> CodeBlock:
        """The codes of some outputs; only the columns of words that hold them are unpacked."""
        zeros = _unpack(self.zeros.read(), start, stop).T.astype(np.float32)
        step = self.scales.read()[:, start:stop].T.astype(np.float32)
        codes = np.ascontiguousarray(_unpack(self.codes.read(), start, stop).T)
        return CodeBlock(codes, np.ascontiguousarray(step), np.ascontiguousarray(zeros))

    def pack(self, first: int, codes: Array) -> Bytes:  # noqa: ARG002 - always all rows
        """The bytes of the whole stored tensor."""
        inputs, words = self.codes.shape
        ordered = codes.T.reshape(inputs, words, HOLDS)[:, :, OUTPUTS].reshape(inputs, -1)
        return pack_codes(ordered, BITS, 4 * words).reshape(-1)


def _unpack(words: Array, start: int, stop: int) -> Bytes:
    """The codes of outputs ``start`` to ``stop``, for every row of words."""
    first, last = start // HOLDS, -(-stop // HOLDS)
    nibbles = unpack_codes(bytes_of(words[:, first:last]), BITS, HOLDS * (last - first))
    codes = nibbles.reshape(len(words), last - first, HOLDS)[:, :, NIBBLES].reshape(nibbles.shape)
    return codes[:, start - first * HOLDS : stop - first * HOLDS]


def _weight(stored: Tensors, module: str, config: Config | None, recent: Recent) -> CheckpointWeight:
    stated = section(config, "quantization_config")
    kernel = str(stated.get("version", "gemm")).lower()
    if kernel != "gemm":
        raise FormatError(f"its weights are quantised: AWQ as {ascii(kernel)[1:-1][:40]}", fix=SIBLING)
    keys = (f"{module}{END}", f"{module}.qzeros", f"{module}.scales")
    codes, scales = part(stored, keys[0], WORDS), part(stored, keys[2], FLOATS)
    inputs, words = codes.shape
    if scales.ndim != 2 or not scales.size or inputs % scales.shape[0]:
        raise FormatError(f"codes {codes.shape} do not fit scales {scales.shape}", fix=AGAIN)
    zeros = part(stored, keys[1], WORDS, (scales.shape[0], words))
    shape, size = (HOLDS * words, inputs), inputs // scales.shape[0]
    parts = _Parts(recent.keep(codes), zeros, scales)
    weight = GroupedWeight(
        "AWQ 4-bit",
        shape,
        bits_of(stored, keys, shape),
        keys[0],
        block=parts.block,
        groups=lambda: Groups.of_size(inputs, size),
        pack=parts.pack,
        by_rows=False,
    )
    return CheckpointWeight(f"{module}.weight", weight.weight(), keys)
