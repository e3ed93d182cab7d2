"""The factors that training begins with: drawn from a seed, the same numbers in every process and on every machine.

Every module has a generator of its own, keyed by the seed, its name and the shape of its pair. So A₀ of a module does
not depend on which other modules are adapted, nor on their order; and those of two ranks under one seed are
independent, as they must be where the subspaces of two ranks are compared.
"""

from collections.abc import Mapping
from hashlib import blake2b, sha256
from math import sqrt
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from loralens.core.lazy import Array
from loralens.core.names import natural_key

Initialisation = Literal["kaiming-uniform", "gaussian"]
INITIALISATIONS: tuple[Initialisation, ...] = get_args(Initialisation)

BYTES = 8  # of a digest: it tells runs apart, it guards nothing


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
    initialisation: Initialisation = "kaiming-uniform",
    embedding: bool = False,
) -> Pair:
    """A pair whose product is 0: one factor drawn, the other zero.

    Parameters
    ----------
    name : str
        Of the module.
    shape : tuple of int
        (out, in) of its weight.
    rank, seed : int
    initialisation : str
        ``kaiming-uniform``: A ~ U(−1/√in, 1/√in), which is Kaiming's with a = √5, as loralib and PEFT have it;
        ``gaussian``: A ~ N(0, 1/r²), as PEFT has it (Hu et al. 2021 say Gaussian, and no variance).
    embedding : bool
        B ~ N(0, 1) and A = 0, as loralib and PEFT have it, whatever ``initialisation`` says.

    Returns
    -------
    Pair
        float32, on the CPU. The numbers are drawn in float64 and rounded once.
    """
    out, in_ = shape
    key = sha256(f"{seed}\0{name}\0{(out, rank, in_)}".encode()).digest()[:16]  # Philox takes a key of 128 bits
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    if embedding:
        B = generator.standard_normal((out, rank))
        return Pair(_float32(B), torch.zeros(rank, in_))
    if initialisation == "gaussian":
        A = generator.standard_normal((rank, in_)) / rank
    else:
        A = (2 * generator.random((rank, in_)) - 1) / sqrt(in_)
    return Pair(torch.zeros(out, rank), _float32(A))


def _float32(array: Array) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


def factor_digest(factor: Tensor) -> str:
    """16 hexadecimal digits of the shape and the numbers of a factor, the same in any float dtype that holds them."""
    numbers = factor.detach().cpu().double().contiguous().numpy()
    hashed = blake2b(f"{numbers.shape}\0".encode(), digest_size=BYTES)
    hashed.update(numbers.astype("<f8", copy=False).data)
    return hashed.hexdigest()


def combined_digest(digests: Mapping[str, str]) -> str:
    """One digest of those of all modules, by their names."""
    # In natural order, so that the digest does not depend on the order in which layers were found.
    lines = "\n".join(f"{name} {digests[name]}" for name in sorted(digests, key=natural_key))
    return blake2b(lines.encode(), digest_size=BYTES).hexdigest()
