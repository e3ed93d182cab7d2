"""bitsandbytes int8 (LLM.int8()): ``x.weight`` of int8, and ``x.SCB`` with the largest magnitude of every row.

W = code · SCB · (1/127), multiplied in this order in float32, as bitsandbytes does it.
"""

from collections.abc import Iterator

import numpy as np

from loralens.core.lazy import LazyArray
from loralens.core.weights import CodedWeight, Codes, GridRows
from loralens.errors import place
from loralens.formats.models.low_bit.packing import Bytes, bytes_of
from loralens.formats.models.low_bit.parts import FLOATS, CheckpointWeight, Config, Tensors, bits_of, part
from loralens.linalg.exact import Singles

END = ".SCB"
INT8 = frozenset({np.dtype(np.int8)})
SHARE = np.float32(1 / 127)


def find_int8(stored: Tensors, config: Config | None) -> Iterator[CheckpointWeight]:  # noqa: ARG001 - every layout has this form
    """All weights of int8 with the scales of bitsandbytes.

    Raises
    ------
    FormatError
        The parts of a weight do not fit together.
    """
    for scale_key in stored:
        if not scale_key.endswith(END):
            continue
        module = scale_key.removesuffix(END)
        key = f"{module}.weight"
        with place(key):
            codes = part(stored, key, INT8)
            # A vector of scales; older files have an axis of length 1 in front.
            scales = part(stored, scale_key, FLOATS).reshape(stored[scale_key].size)
            part(stored, scale_key, FLOATS, (*stored[scale_key].shape[:-1], *codes.shape[:1]))
        keys = (key, scale_key, *(name for name in (f"{module}.weight_format",) if name in stored))
        yield CheckpointWeight(key, _weight(key, codes, scales, bits_of(stored, keys, codes.shape)), keys)


def _weight(key: str, codes: LazyArray, scales: LazyArray, bits: float) -> CodedWeight:
    columns = codes.size // max(1, codes.shape[0])

    def scales_of(start: int, stop: int) -> Singles:
        return scales.rows(start, stop).read().astype(np.float32)[:, None]

    def decode(start: int, stop: int) -> Singles:
        W = codes.rows(start, stop).read().astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            W *= scales_of(start, stop).reshape(stop - start, *(1,) * (W.ndim - 1))
            W *= SHARE
        return W

    def grid(start: int, stop: int) -> GridRows:
        stored = codes.rows(start, stop).read().astype(np.int16).reshape(stop - start, columns)
        with np.errstate(invalid="ignore", over="ignore"):
            step = scales_of(start, stop) * SHARE
        return GridRows(stored, step, None, np.zeros(columns, np.intp), lowest=-128, highest=127)

    def encode(first: int, changed: Codes) -> Bytes:  # noqa: ARG001 - rows are alike
        return bytes_of(changed.astype(np.int8))

    return CodedWeight("bitsandbytes int8", codes.shape, bits, decode, key, grid=grid, encode=encode)
