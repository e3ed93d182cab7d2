"""OLoRA: with W = Q R, the pair starts as B₀ = Q[:, :r] and A₀ = R[:r] (Büyükakyüz 2024), as in PEFT."""

import torch
from torch import Tensor

from loralens.training.starts.drawn import Pair


@torch.no_grad()
def orthogonal_pair(W: Tensor, *, rank: int) -> Pair:
    """B₀ (out, r) with orthonormal columns, and A₀ (r, in): the first rows of the triangular factor.

    Both are float32, or float64 if W is. They are computed on the CPU, so that all devices start from the same pair.
    """
    matrix = W.double().cpu()
    # The first columns of Q depend on the first columns of W alone, so that a QR of all of W is not needed.
    B, _ = torch.linalg.qr(matrix[:, :rank])
    # A matrix with fewer columns than rows of R has them all.
    A = B.T @ matrix
    # What is below the diagonal is 0 up to rounding.
    A = torch.triu(A)
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    return Pair(B.to(W.device, dtype).contiguous(), A.to(W.device, dtype).contiguous())
