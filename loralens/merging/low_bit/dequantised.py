"""Recognising floats that are a decoded low-bit weight: few distinct numbers in every block.

Numbers of 4 bits that share a scale have at most 16 values, also after they were rounded to 16 bits. Blocks of a weight
that was trained in floats have nearly as many values as numbers.
"""

import numpy as np

from loralens.core.lazy import LazyArray
from loralens.merging.matrix import MatrixRows
from loralens.merging.plan import as_matrix

VALUES = 16  # the number of codes of 4 bits
BLOCKS = (64, 32)  # numbers that share a scale: bitsandbytes; GGUF or MLX. The longer is the stronger evidence
ROWS = 16  # rows that are looked at, spread over the weight
# A block of a pruned or constant row has few values too, so a few rows must not decide.
LEAST = 0.95  # share of the blocks with few values


def decoded_block(tensor: LazyArray) -> int | None:
    """The number of adjacent numbers that share a scale, if a matrix of floats is a decoded 4-bit weight."""
    matrix = as_matrix(tensor.shape)
    if tensor.ndim != 2 or min(matrix) < ROWS:
        return None
    rows = MatrixRows(tensor, matrix)
    picked = np.unique(np.linspace(0, matrix[0] - 1, ROWS).astype(int)).tolist()
    sample = np.vstack([rows.rows(row, row + 1).astype(np.float32) for row in picked])
    # A weight of zeros has few values whatever stored it.
    if not sample.any():
        return None
    for block in BLOCKS:
        if matrix[1] % block == 0 and _few_values(sample.reshape(-1, block)) >= LEAST:
            return block
    return None


def _few_values(blocks: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]") -> float:
    """The share of rows with at most 16 distinct numbers."""
    distinct = (np.diff(np.sort(blocks, axis=1), axis=1) != 0).sum(axis=1) + 1
    return float((distinct <= VALUES).mean())
