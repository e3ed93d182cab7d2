"""Random numbers that tests of every room want alike; a seed may stand for the generator."""

import numpy as np

from loralens import Adapter, LowRank


def draw_factors(rng, out, in_, rank, dtype=np.float64):
    """B (out, rank) and A (rank, in_) of standard normal numbers."""
    rng = np.random.default_rng(rng)
    return rng.standard_normal((out, rank)).astype(dtype), rng.standard_normal((rank, in_)).astype(dtype)


def draw_adapter(rng, shapes, rank=2, scale=1.0, dtype="f4", **fields):
    """One pair for each module, given the shapes of their updates."""
    rng = np.random.default_rng(rng)
    pairs = {name: LowRank(*draw_factors(rng, *shape, rank, dtype), scale) for name, shape in shapes.items()}
    return Adapter(modules=pairs, **fields)


def draw_basis(rng, n, k):
    """k orthonormal columns of n numbers, whose span is uniformly distributed."""
    return np.linalg.qr(np.random.default_rng(rng).standard_normal((n, k)))[0]
