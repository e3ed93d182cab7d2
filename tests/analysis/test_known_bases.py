"""Directions that several comparisons share are computed once, with the same bits."""

import numpy as np
import pytest

from loralens import LowRank
from loralens.analysis import two_adapters as known_bases
from loralens.analysis.two_adapters import KnownBases
from loralens.core.lazy import LazyArray


def pair(m=30, r=4, n=20, scale=-2.0, seed=0):
    rng = np.random.default_rng(seed)
    B, A = rng.standard_normal((m, r)).astype(np.float32), rng.standard_normal((r, n)).astype(np.float32)
    return LowRank(
        LazyArray(lambda: B.copy(), shape=B.shape, dtype=B.dtype),
        LazyArray(lambda: A.copy(), shape=A.shape, dtype=A.dtype),
        scale,
    )


def bits(bases):
    return [array.tobytes() for basis in (bases.left, bases.right) for array in (basis.X, basis.T)] + [
        bases.s.tobytes()
    ]


def computed(monkeypatch):
    """The updates whose directions are computed from now on."""
    calls, own = [], LowRank.bases
    monkeypatch.setattr(LowRank, "bases", lambda self: calls.append(self) or own(self))
    return calls


def test_directions_are_computed_once(monkeypatch):
    update, expected = pair(), bits(pair().bases())
    known, calls = KnownBases(), computed(monkeypatch)
    for _ in range(3):
        loaded, found = known.of(update)
        assert bits(found) == expected
        assert loaded.B.tobytes() == update.B.tobytes()
        assert np.shares_memory(found.right.X, loaded.A)
    assert len(calls) == 1


def test_directions_with_columns_of_their_own_are_not_kept(monkeypatch):
    B = np.ones((30, 2))
    B[:, 1] += 1e-6 * np.random.default_rng(0).standard_normal(30)
    update = LowRank(B, np.eye(2, 9) + 1)
    known, calls = KnownBases(), computed(monkeypatch)
    first, second = (bits(known.of(update)[1]) for _ in range(2))
    assert first == second
    assert len(calls) == 2


@pytest.mark.parametrize("limit", [0, 35, 36, 72])
def test_only_so_many_numbers_are_kept(monkeypatch, limit):
    monkeypatch.setattr(known_bases, "LIMIT", limit)
    updates, known, calls = [pair(seed=k) for k in range(3)], KnownBases(), computed(monkeypatch)
    for update in (*updates, *updates):
        known.of(update)
    assert len(calls) == 6 - limit // 36  # two matrices of 4 × 4 numbers and four values each
