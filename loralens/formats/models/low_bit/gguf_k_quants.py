"""ggml's k-quants, blocks of 256 numbers whose scales are quantised too: Q2_K, Q3_K, Q4_K, Q5_K and Q6_K.

======  =====  ===========================================================================  ========================
type    bytes  content                                                                      number
======  =====  ===========================================================================  ========================
Q2_K    84     16 × (scale, minimum) of 4 bits; 64 bytes of codes; d, dmin float16          d·s·q − dmin·m
Q3_K    110    32 bytes of third bits; 64 bytes of codes; 16 scales of 6 bits; d            d·(s − 32)·(q − 4)
Q4_K    144    d, dmin; 8 × (scale, minimum) of 6 bits; 128 bytes of nibbles                d·s·q − dmin·m
Q5_K    176    d, dmin; 8 × (scale, minimum); 32 bytes of fifth bits; 128 bytes of nibbles  d·s·q − dmin·m
Q6_K    210    128 bytes of low nibbles; 64 bytes of upper bits; 16 scales int8; d          d·s·(q − 32)
======  =====  ===========================================================================  ========================

A step d·s may be 0 or negative. The source is block_q2_K … block_q6_K in ggml-common.h of ggml.
"""

import numpy as np

from loralens.formats.models.low_bit.gguf_block import (
    BlockLayout,
    Blocks,
    Bytes,
    as_nibbles,
    from_planes,
    half,
    low_and_high,
    planes,
)
from loralens.linalg.exact import Singles


def _unpack_q2_k(blocks: Bytes) -> Blocks:
    scales = blocks[:, :16]
    codes = planes(blocks[:, 16:80].reshape(-1, 2, 32), 2, 4)
    step = half(blocks[:, 80:82]) * (scales & np.uint8(15)).astype(np.float32)
    minimum = half(blocks[:, 82:84]) * (scales >> np.uint8(4)).astype(np.float32)
    return Blocks(codes.reshape(-1, 256), step, -minimum)


def _pack_q2_k(blocks: Bytes, codes: Bytes) -> Bytes:
    packed = from_planes(codes.reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    return np.concatenate([blocks[:, :16], packed, blocks[:, 80:]], axis=1)


def _unpack_q3_k(blocks: Bytes) -> Blocks:
    high = planes(blocks[:, :32], 1, 8).reshape(-1, 256)
    low = planes(blocks[:, 32:96].reshape(-1, 2, 32), 2, 4).reshape(-1, 256)
    # The low 4 bits of 16 scales in 8 bytes, and their upper 2 bits in 4 bytes.
    scales = low_and_high(blocks[:, 96:104]) | (planes(blocks[:, 104:108], 2, 4).reshape(-1, 16) << np.uint8(4))
    step = half(blocks[:, 108:110]) * (scales.astype(np.float32) - np.float32(32))
    return Blocks(low | (high << np.uint8(2)), step, None)


def _pack_q3_k(blocks: Bytes, codes: Bytes) -> Bytes:
    high = from_planes((codes >> np.uint8(2)).reshape(-1, 8, 32), 1)
    low = from_planes((codes & np.uint8(3)).reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    return np.concatenate([high, low, blocks[:, 96:]], axis=1)


def _steps_and_minima(blocks: Bytes) -> tuple[Singles, Singles]:
    """The 8 steps and minima of Q4_K and Q5_K, from their first 16 bytes."""
    # 12 bytes follow d and dmin. The low 6 bits of bytes 0 to 3 are the first four scales, and those of bytes 4 to 7
    # the first four minima. The last four are divided. Their low 4 bits are in bytes 8 to 11, scales in low nibbles,
    # minima in high ones. Their upper 2 bits are the upper 2 bits of bytes 0 to 3 (scales) and 4 to 7 (minima).
    scale, minimum, low_bits = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate(
        [scale & np.uint8(63), (low_bits & np.uint8(15)) | ((scale >> np.uint8(6)) << np.uint8(4))], axis=1
    )
    minima = np.concatenate(
        [minimum & np.uint8(63), (low_bits >> np.uint8(4)) | ((minimum >> np.uint8(6)) << np.uint8(4))], axis=1
    )
    return half(blocks[:, :2]) * scales.astype(np.float32), half(blocks[:, 2:4]) * minima.astype(np.float32)


def _unpack_q4_k(blocks: Bytes) -> Blocks:
    step, minimum = _steps_and_minima(blocks)
    # Each 32 bytes hold two groups: the low nibbles one, the high nibbles the next.
    codes = low_and_high(blocks[:, 16:].reshape(-1, 4, 32))
    return Blocks(codes.reshape(-1, 256), step, -minimum)


def _pack_q4_k(blocks: Bytes, codes: Bytes) -> Bytes:
    return np.concatenate([blocks[:, :16], as_nibbles(codes.reshape(-1, 4, 64)).reshape(-1, 128)], axis=1)


def _unpack_q5_k(blocks: Bytes) -> Blocks:
    step, minimum = _steps_and_minima(blocks)
    # Bit j of byte i is the fifth bit of number i of group j.
    fifth = planes(blocks[:, 16:48], 1, 8).reshape(-1, 256)
    codes = low_and_high(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 256)
    return Blocks(codes | (fifth << np.uint8(4)), step, -minimum)


def _pack_q5_k(blocks: Bytes, codes: Bytes) -> Bytes:
    fifth = from_planes((codes >> np.uint8(4)).reshape(-1, 8, 32), 1)
    nibbles = as_nibbles((codes & np.uint8(15)).reshape(-1, 4, 64)).reshape(-1, 128)
    return np.concatenate([blocks[:, :16], fifth, nibbles], axis=1)


def _unpack_q6_k(blocks: Bytes) -> Blocks:
    # Two halves of 128 numbers. In each, 64 bytes hold the low 4 bits, two numbers in a byte, and 32 bytes hold the
    # upper 2 bits, four numbers in a byte.
    low = low_and_high(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    upper = planes(blocks[:, 128:192].reshape(-1, 2, 32), 2, 4).reshape(-1, 256)
    step = half(blocks[:, 208:210]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return Blocks(low | (upper << np.uint8(4)), step, None)


def _pack_q6_k(blocks: Bytes, codes: Bytes) -> Bytes:
    low = as_nibbles((codes & np.uint8(15)).reshape(-1, 2, 128)).reshape(-1, 128)
    upper = from_planes((codes >> np.uint8(4)).reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    return np.concatenate([low, upper, blocks[:, 192:]], axis=1)


Q2_K = BlockLayout(10, 0, 3, 16, _unpack_q2_k, _pack_q2_k)
Q3_K = BlockLayout(11, -4, 3, 16, _unpack_q3_k, _pack_q3_k)
Q4_K = BlockLayout(12, 0, 15, 8, _unpack_q4_k, _pack_q4_k)
Q5_K = BlockLayout(13, 0, 31, 8, _unpack_q5_k, _pack_q5_k)
Q6_K = BlockLayout(14, -32, 31, 16, _unpack_q6_k, _pack_q6_k)
