"""ggml's MXFP4: 32 numbers of FP4 (E2M1) with one power of two.

A block has 17 bytes: the exponent e, then 16 bytes of nibbles, the low ones first. A number is 2^(e − 128) times twice
the value of its nibble: 0, 1, 2, 3, 4, 6, 8, 12, and the same with the sign bit set, where 0 stays +0.
"""

import numpy as np

from loralens.formats.models.low_bit.gguf_block import BlockLayout, Blocks, Bytes, as_nibbles, low_and_high

_POSITIVE = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)
# Codes are counted by their level: 0 to 7 are the nibbles 15 to 8 (−12 … 0), and 8 to 15 the nibbles 0 to 7.
_LEVELS = np.concatenate([-_POSITIVE[:0:-1], [np.float32(0)], _POSITIVE]).astype(np.float32)


_CODES = np.concatenate([np.arange(8, 16), np.arange(7, -1, -1)]).astype(np.uint8)  # of every nibble
_NIBBLES = np.argsort(_CODES).astype(np.uint8)  # of every code


def _unpack(blocks: Bytes) -> Blocks:
    exponents = blocks[:, :1].astype(np.int32)
    return Blocks(_CODES[low_and_high(blocks[:, 1:])], np.ldexp(np.float32(1), exponents - 128), None)


def _pack(blocks: Bytes, codes: Bytes) -> Bytes:
    return np.concatenate([blocks[:, :1], as_nibbles(_NIBBLES[codes])], axis=1)


MXFP4 = BlockLayout(39, 0, 15, 1, _unpack, _pack, _LEVELS)
