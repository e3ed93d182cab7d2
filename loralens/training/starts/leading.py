"""The leading singular directions of a weight or of a gradient, the same numbers in every call and on every device."""

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from loralens.core.lazy import Array
from loralens.linalg.device import Device
from loralens.linalg.randomized import is_dense, leading_svd

# The bytes of directions that are kept, so that several runs on one base in a process compute them once. Those of a
# model of 7 billion parameters take 0.3 GB at rank 16.
KEPT = 1 << 30
_known: dict[bytes, tuple[Array, Array, Array]] = {}  # digest of a weight and a rank → U, s, V


def leading_triplets(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), s (r,) and Vᵀ (r, in) in float64, on the device of W."""
    if W.dtype == torch.float64 or is_dense((W.shape[0], W.shape[1]), rank):
        U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        return U[:, :rank], s[:rank], Vh[:rank]
    # On the CPU wherever W is, so that all devices start from the same pair.
    matrix = W.float().cpu().contiguous().numpy()
    key = blake2b(matrix.data, digest_size=32, key=f"{matrix.shape} {rank}".encode()).digest()
    if key not in _known:
        # The start of the iteration is no random choice of the run, so that the pair depends on W alone.
        leading = leading_svd(matrix, rank, rng=np.random.default_rng(0), device=Device())
        _known[key] = leading.U, leading.s, leading.V
        # The oldest first, which a dictionary names first.
        while len(_known) > 1 and sum(part.nbytes for parts in _known.values() for part in parts) > KEPT:
            del _known[next(iter(_known))]
    U, s, V = _known[key]
    return (
        torch.from_numpy(U.copy()).to(W.device),
        torch.from_numpy(s.copy()).to(W.device),
        torch.from_numpy(V.copy()).T.to(W.device),
    )


def signs(Vh: Tensor) -> Tensor:
    """−1 or 1 for each row, shape (r, 1), which makes the largest entry of the row positive.

    An SVD leaves the signs open, and libraries choose them differently.
    """
    largest = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0)
