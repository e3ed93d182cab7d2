"""Coded weights in memory, made independently of the readers: Q4_0, Q4_1, NF4, and a table with two zeros."""

import numpy as np

from loralens.core.weights import CodedWeight, GridRows

NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip
# FP4 in the order of its numbers; the codes 7 and 8 both stand for 0.
FP4 = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def grid(layout, rows=8, columns=64, *, group=32, seed=0, codes=None):
    """Random codes and scales; some steps are negative and one is 0."""
    rng = np.random.default_rng(seed)
    groups = columns // group
    step = (0.01 + 0.01 * rng.random((rows, groups))).astype(np.float32)
    # The levels of NF4 lie between −1 and 1, and so 7.5 times as close as those of integers.
    step *= 7.5 if layout == "NF4" else 1
    step[::2, 0] *= -1
    step[-1, -1] = 0
    offset = rng.standard_normal((rows, groups)).astype(np.float32) if layout == "Q4_1" else None
    lowest = -8 if layout == "Q4_0" else 0
    drawn = (
        rng.integers(lowest, lowest + 16, (rows, columns)) if codes is None else np.broadcast_to(codes, (rows, columns))
    )
    levels = {"NF4": NF4, "FP4": FP4}.get(layout)
    of = np.arange(columns) // group
    return GridRows(drawn.astype(np.int16), step, offset, of, lowest, lowest + 15, levels)


def part(whole, start, stop):
    """Some rows of a grid."""
    offset = None if whole.offset is None else whole.offset[start:stop]
    return GridRows(
        whole.codes[start:stop], whole.step[start:stop], offset, whole.group_of_column, whole.lowest, whole.highest,
        whole.levels,
    )  # fmt: skip


def weight(whole, layout="Q4_1", key="w"):
    """A coded weight that stores the codes of a grid two to a byte, low nibble first."""

    def encode(start, codes):
        nibbles = (codes - whole.lowest).astype(np.uint8)
        return nibbles[:, ::2] | nibbles[:, 1::2] << 4

    return CodedWeight(
        layout,
        whole.codes.shape,
        4.5,
        lambda start, stop: part(whole, start, stop).values(whole.codes[start:stop]),
        key,
        lambda start, stop: part(whole, start, stop),
        encode,
    )
