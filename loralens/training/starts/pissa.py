"""PiSSA: the pair starts as the leading singular directions of W, and the rest of W is frozen.

With W = U S Vᵀ, B₀ = U_r (S_r/scale)^½ and A₀ = (S_r/scale)^½ V_rᵀ, the trained weight is (W − scale·B₀A₀) + scale·B A.

Here W stays as it is, and the first pair is subtracted in the forward pass, see `loralens.training.starts.subtracted`.
"""

import torch
from torch import Tensor

from loralens.training.starts.drawn import Pair
from loralens.training.starts.leading import signs, truncated_svd


@torch.no_grad()
def principal_pair(W: Tensor, *, rank: int, scale: float) -> Pair:
    """B₀ (out, r) and A₀ (r, in) such that scale·B₀A₀ is the best approximation of W of that rank.

    Both are float32, or float64 if W is. The sign of every direction makes the largest entry of its row of A₀ positive.
    The directions of a big matrix are those of `loralens.linalg.randomized.leading_svd`, the same in every call: a
    dense SVD would take seconds for each module at every start. For a float64 W the SVD is always dense.
    """
    U, s, Vh = truncated_svd(W, rank)
    sign = signs(Vh)
    # The singular values are divided evenly between the factors, as in the paper.
    root = torch.sqrt(s / scale)
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    B, A = U * (root * sign[:, 0]), root[:, None] * sign * Vh
    return Pair(B.to(dtype).contiguous(), A.to(dtype).contiguous())  # FSDP2 shards no other layout
