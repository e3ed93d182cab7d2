"""How the first factors of LoRA layers are made: drawn, or of the weight."""

from collections.abc import Mapping
from hashlib import blake2b, sha256
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loralens.choices import StartName
from loralens.core.names import natural_key
from loralens.errors import OptionError
from loralens.linalg.device import Device
from loralens.linalg.randomized import is_dense, leading_svd
from loralens.training.course import TrainingMethod

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


@torch.no_grad()
def principal_pair(W: Tensor, *, rank: int, scale: float) -> Pair:
    """B₀ (out, r) and A₀ (r, in) such that scale·B₀A₀ is the best approximation of W of that rank.

    Both are float32, or float64 if W is. The sign of every direction makes the largest entry of its row of A₀ positive.
    The directions of a big matrix are those of `loralens.linalg.randomized.leading_svd`, the same in every call: a
    dense SVD would take seconds for each module at every start. For a float64 W the SVD is always dense.
    """
    if W.dtype == torch.float64 or is_dense((W.shape[0], W.shape[1]), rank):
        # Only CUDA has all that is needed, float64 too.
        matrix = W if W.device.type == "cuda" else W.cpu()
        U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    else:
        # The iteration starts from a fixed seed and not from that of the run, so that the pair depends on W alone.
        device = Device.of(str(W.device)) if W.device.type == "cuda" else Device()
        found = leading_svd(W.float().cpu().contiguous().numpy(), rank, rng=np.random.default_rng(0), device=device)
        U, s, Vh = (torch.from_numpy(part.copy()) for part in (found.U, found.s, found.V.T))
    U, s, Vh = U[:, :rank].to(W.device), s[:rank].to(W.device), Vh[:rank].to(W.device)
    # An SVD leaves the signs of directions open, and libraries choose them differently.
    largest = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    # The singular values are divided evenly between the factors, as in the paper.
    root = torch.sqrt(s / scale)
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    B, A = U * (root * sign[:, 0]), root[:, None] * sign * Vh
    return Pair(B.to(dtype).contiguous(), A.to(dtype).contiguous())  # FSDP2 shards no other layout


@torch.no_grad()
def orthogonal_pair(W: Tensor, *, rank: int) -> Pair:
    """B₀ (out, r) with orthonormal columns, and A₀ (r, in): the first rows of the triangular factor.

    Both are float32, or float64 if W is.
    """
    matrix = W.cpu().double()
    # The first columns of Q depend on the first columns of W alone, so that a QR of all of W is not needed.
    B, _ = torch.linalg.qr(matrix[:, :rank])
    # A matrix with fewer columns than rows of R has them all.
    A = B.T @ matrix
    # What is below the diagonal is 0 up to rounding.
    A = torch.triu(A)
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    return Pair(B.to(W.device, dtype).contiguous(), A.to(W.device, dtype).contiguous())


@torch.no_grad()
def subtracted_pair(name: str, W: Tensor, method: TrainingMethod, *, rank: int, scale: float) -> Pair | None:
    """The first pair of a layer by the start of the method; None if the product of its first pair is 0.

    Parameters
    ----------
    name : str
        The name of the layer, for messages.
    W : tensor, shape (out, in)

    Raises
    ------
    OptionError
        The weight is not finite.
    """
    if not method.subtracted:
        return None
    if not torch.isfinite(W).all():
        raise OptionError(
            f"{name}: its weight is not finite, so that {method.start} cannot start from it",
            fix=f"repair the weights of the model, choose another start than {method.start}, or leave this module out",
        )
    return principal_pair(W, rank=rank, scale=scale) if method.start == "pissa" else orthogonal_pair(W, rank=rank)
