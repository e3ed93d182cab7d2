"""NF4: the nearest level in bitsandbytes' own arithmetic; the last block may be short."""

import numpy as np
import pytest

from loralens.linalg.codes import BLOCK, LEVELS, dequantise_nf4, quantise_nf4


def test_it_is_the_nearest_level_of_every_block():
    rng = np.random.default_rng(0)
    W = (0.1 * rng.standard_normal(5 * BLOCK + 20)).astype(np.float32)
    codes, absmax = quantise_nf4(W)
    assert absmax.tolist() == [float(np.abs(W[i : i + BLOCK]).max()) for i in range(0, W.size, BLOCK)]
    for i, w in enumerate(W):
        distances = np.abs(LEVELS.astype(np.float64) * absmax[i // BLOCK] - w)
        assert distances[codes[i]] <= distances.min() + 1e-7 * absmax[i // BLOCK]
    np.testing.assert_array_equal(dequantise_nf4(codes, absmax), LEVELS[codes] * np.repeat(absmax, BLOCK)[: W.size])


def test_zeros_and_numbers_between_two_levels():
    codes, absmax = quantise_nf4(np.zeros(BLOCK, np.float32))
    assert (codes == 7).all()
    assert absmax.tolist() == [0.0]
    between = (LEVELS[3] + LEVELS[4]) / np.float32(2)
    row = np.zeros(BLOCK, np.float32)
    row[:2] = [1.0, between]
    assert quantise_nf4(row)[0][:2].tolist() == [15, 3]


@pytest.mark.live
def test_it_is_bit_for_bit_what_bitsandbytes_makes():
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    rng = np.random.default_rng(2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((48, 128), (7, 30), (1, 64)):
            W = torch.from_numpy(0.1 * rng.standard_normal(shape).astype(np.float32)).to(dtype)
            packed, state = functional.quantize_4bit(W, blocksize=BLOCK, quant_type="nf4")
            codes, absmax = quantise_nf4(W.float().numpy())
            flat = np.append(codes, np.uint8(7)) if codes.size % 2 else codes
            np.testing.assert_array_equal(packed.numpy().reshape(-1), flat[::2] << 4 | flat[1::2])
            np.testing.assert_array_equal(state.absmax.numpy(), absmax)
