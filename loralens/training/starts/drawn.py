"""The factors with which training starts: drawn from a seed, the same numbers in every process and on every machine.

Every module has a generator of its own, whose key is made of the seed, the name of the module and the shape of its
pair. So A₀ of a module depends neither on which other modules are adapted nor on their order. The A₀ of two ranks under
one seed are independent, as they must be where the subspaces of two ranks are compared.
"""

from collections.abc import Mapping
from hashlib import blake2b, sha256
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loralens.choices import StartName
from loralens.core.names import natural_key

BYTES = 8  # of a digest: 64 bits tell the runs of a study apart, and there is nothing to protect against


class Pair(NamedTuple):
    """B (out, r) and A (r, in)."""

    B: Tensor
    A: Tensor


def draw_pair(
    name: str,
    shape: tuple[int, int],
    *,
    rank: int,
    seed: int,
    start: StartName = "kaiming",
    embedding: bool = False,
) -> Pair:
    """A pair whose product is 0: one factor is drawn at random, the other is zero.

    Parameters
    ----------
    name : str
        The name of the module.
    shape : tuple of int
        (out, in) of its weight.
    rank, seed : int
    start : str
        ``kaiming``: A ~ U(−1/√in, 1/√in), which is Kaiming's initialisation with a = √5, as in loralib and
        PEFT. ``gaussian``: A ~ N(0, 1/r²), as in PEFT (Hu et al. 2021 say Gaussian and give no variance).
    embedding : bool
        B ~ N(0, 1) and A = 0, as in loralib and PEFT, whatever ``start`` says.

    Returns
    -------
    Pair
        float32, on the CPU. The numbers are drawn in float64 and rounded once.
    """
    out, in_ = shape
    key = sha256(f"{seed}\0{name}\0{(out, rank, in_)}".encode()).digest()[:16]  # Philox takes a key of 128 bits
    # NumPy's generator, since torch does not promise the same numbers on two devices or in two releases.
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    # One factor must be zero so that the update is; if both were, neither would get a gradient.
    if embedding:
        B, A = generator.standard_normal((out, rank)), np.zeros((rank, in_))
    elif start == "gaussian":
        B, A = np.zeros((out, rank)), generator.standard_normal((rank, in_)) / rank
    else:
        B, A = np.zeros((out, rank)), (2 * generator.random((rank, in_)) - 1) / sqrt(in_)
    return Pair(*(torch.from_numpy(factor.astype(np.float32)) for factor in (B, A)))


def factor_digest(factor: Tensor) -> str:
    """16 hexadecimal digits that depend on the shape and the numbers of a factor, but not on its dtype."""
    # float64 holds the numbers of all float dtypes exactly.
    numbers = factor.detach().cpu().double().contiguous().numpy()
    hashed = blake2b(f"{numbers.shape}\0".encode(), digest_size=BYTES)
    hashed.update(numbers.astype("<f8", copy=False).data)
    return hashed.hexdigest()


def combined_digest(digests: Mapping[str, str]) -> str:
    """One digest of the digests and the names of all modules."""
    # In natural order, so that the digest does not depend on the order in which layers were found.
    lines = "\n".join(f"{name} {digests[name]}" for name in sorted(digests, key=natural_key))
    return blake2b(lines.encode(), digest_size=BYTES).hexdigest()
