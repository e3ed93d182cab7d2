"""The bases and merges of the study of low-bit bases, against plain references."""

from itertools import product

import numpy as np
import pytest
from low_bit_bases import code_nf4, code_q4_1, code_q4_k
from low_bit_merges import Way, feedback_codes, return_clipped

from loralens.merging.low_bit.stochastic import asked_moves
from tests.merging.low_bit.grids import grid


def numbers(rows=6, columns=512, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * np.float32(0.1)


@pytest.mark.parametrize("coder", [code_q4_1, code_nf4, code_q4_k])
def test_fresh_codes_are_the_nearest_ones(coder):
    W = numbers()
    coded = coder(W)
    every = np.stack([coded.values(np.full(W.shape, code, np.int16)) for code in range(16)])
    nearest = np.abs(every - W).min(axis=0)
    # Scales are stored in fewer bits than the codes are chosen with, so a few codes are one off.
    assert np.mean(np.abs(coded.values(coded.codes) - W) <= nearest + 1e-6) > 0.98
    np.testing.assert_array_less(np.abs(coded.values(coded.codes) - W), nearest + 0.02)


def test_q4_1_is_coded_as_the_package_gguf_does():
    quants = pytest.importorskip("gguf").quants
    from gguf import GGMLQuantizationType

    from loralens.formats.models.low_bit.gguf_simple import Q4_1

    W = numbers()
    blocks = quants.quantize(W, GGMLQuantizationType.Q4_1).reshape(-1, 20)
    coded = code_q4_1(W)
    np.testing.assert_array_equal(Q4_1.decode(blocks).reshape(W.shape), coded.values(coded.codes))


def test_the_scales_of_q4_k_have_six_bits():
    coded = code_q4_k(numbers())
    for scales in (coded.step, -coded.offset):
        for row in scales.reshape(-1, 8):
            # One float16 for 8 scales, of which the largest is 63 times that number.
            unit = np.float32(np.float16(row.max() / 63))
            np.testing.assert_allclose(row / unit, np.rint(row / unit), atol=1e-3)


def test_what_is_clipped_is_given_back_to_the_row():
    one = grid("Q4_1", 6, 256, seed=8)
    one.step[one.step == 0] = 0.01
    D = (1e-3 * np.random.default_rng(4).standard_normal((6, 256))).astype(np.float32)
    moves = asked_moves(one, D)
    before, after = np.zeros(6), np.zeros(6)
    given = return_clipped(one, moves, D)
    steps = one.step[:, one.group_of_column].astype(np.float64)
    for asked, sums in ((moves, before), (given, after)):
        arrives = np.clip(one.codes + asked, 0, 15) - one.codes
        sums[:] = (arrives * steps * D).sum(axis=1) / (D.astype(np.float64) ** 2).sum(axis=1)
    assert (before < 0.97).all()
    np.testing.assert_allclose(after, 1, atol=1e-5)


def test_feedback_is_gptq():
    one = grid("Q4_1", 1, 32, seed=3)
    one.step[one.step == 0] = 0.01
    rng = np.random.default_rng(0)
    X = rng.standard_normal((200, 32)) @ rng.standard_normal((32, 32))
    D = (3e-3 * rng.standard_normal((1, 32))).astype(np.float32)
    codes = feedback_codes(one, D, (X.T @ X / 200).astype(np.float32))
    # Step by step: the column is rounded, and the rest solves the least squares problem that is left.
    H = (X.T @ X / 200).astype(np.float32).astype(np.float64)
    H += 0.01 * np.mean(np.diag(H)) * np.eye(32)
    step = one.step[0, one.group_of_column].astype(np.float64)
    target = one.codes[0] * step + D[0]
    for j in range(32):
        code = int(np.clip(np.ceil(target[j] / step[j] - 0.5), 0, 15))
        assert code == codes[0, j]
        error = target[j] - code * step[j]
        rest = slice(j + 1, None)
        if j < 31:
            target[rest] += np.linalg.solve(H[rest, rest], H[rest, j]) * error


def test_ways_have_names_of_their_own():
    options = product((0, 1), (False, True), ("both", "task"), (0.01, 0.1))
    ways = [Way("sweep", seed, back, moments, damping) for seed, back, moments, damping in options]
    assert len({way.name for way in ways}) == len(ways) == 16
