"""PiSSA: the pair starts as the leading singular directions of W, and the rest of W is frozen.

With W = U S Vᵀ, B₀ = U_r (S_r/scale)^½ and A₀ = (S_r/scale)^½ V_rᵀ, the trained weight is (W − scale·B₀A₀) + scale·B A.

Here W stays as it is, and the first pair is subtracted in the forward pass: W x + scale·(B A x − B₀ A₀ x). That costs
one more pair of thin products. In return W is not rounded a second time, a tied weight stays tied, nothing has to be
restored, and the result is a plain LoRA of rank 2r on the original base: B' = [B, −B₀], A' = [A; A₀].
"""

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from loralens.core.lazy import Array
from loralens.linalg.device import Device
from loralens.linalg.randomized import is_dense, leading_svd
from loralens.training.layers.initial import Pair

# The bytes of directions that are kept, so that several runs on one base in a process compute them once. Those of a
# model of 7 billion parameters take 0.3 GB at rank 16.
KEPT = 1 << 30
_known: dict[bytes, tuple[Array, Array, Array]] = {}  # digest of a weight and a rank → U, s, V


@torch.no_grad()
def principal_pair(W: Tensor, *, rank: int, scale: float) -> Pair:
    """B₀ (out, r) and A₀ (r, in) such that scale·B₀A₀ is the best approximation of W of that rank.

    Both are float32, or float64 if W is. The sign of every direction makes the largest entry of its row of A₀ positive.
    The directions of a big matrix are those of `loralens.linalg.randomized.leading_svd`, the same in every call: a
    dense SVD would take seconds for each module at every start. For a float64 W the SVD is always dense.
    """
    U, s, Vh = _leading_triplets(W, rank)
    # An SVD leaves the signs open, and libraries choose them differently.
    largest = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    # The singular values are divided evenly between the factors, as in the paper.
    root = torch.sqrt(s / scale)
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    B, A = U * (root * sign[:, 0]), root[:, None] * sign * Vh
    return Pair(B.to(dtype).contiguous(), A.to(dtype).contiguous())  # FSDP2 shards no other layout


def _leading_triplets(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
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


def difference(pair: Pair, start: Pair) -> Pair:
    """B A − B₀ A₀ as one pair of rank 2r: [B, −B₀] and [A; A₀], the same numbers without rounding."""
    return Pair(torch.cat([pair.B, -start.B], dim=1), torch.cat([pair.A, start.A]))
