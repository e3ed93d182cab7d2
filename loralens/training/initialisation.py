"""How the first factors of LoRA layers are made: drawn, of the weight, or along the first gradient."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import blake2b, sha256
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

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


def leading_directions(W: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, count), s (count,) and Vᵀ (count, in) of a matrix, on its device.

    The sign of every direction makes the largest entry of its row of Vᵀ positive. The directions of a big matrix are
    those of `loralens.linalg.randomized.leading_svd`, the same in every call: a dense SVD would take seconds for each
    module at every start. For float64 the SVD is always dense.
    """
    if W.dtype == torch.float64 or is_dense((W.shape[0], W.shape[1]), count):
        # Only CUDA has all that is needed, float64 too.
        matrix = W if W.device.type == "cuda" else W.cpu()
        U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    else:
        # The iteration starts from a fixed seed and not from that of the run, so that the pair depends on W alone.
        device = Device.of(str(W.device)) if W.device.type == "cuda" else Device()
        found = leading_svd(W.float().cpu().contiguous().numpy(), count, rng=np.random.default_rng(0), device=device)
        U, s, Vh = (torch.from_numpy(part.copy()) for part in (found.U, found.s, found.V.T))
    U, s, Vh = U[:, :count].to(W.device), s[:count].to(W.device), Vh[:count].to(W.device)
    # An SVD leaves the signs of directions open, and libraries choose them differently.
    largest = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    return U * sign[:, 0], s, sign * Vh


@torch.no_grad()
def principal_pair(W: Tensor, *, rank: int, scale: float) -> Pair:
    """B₀ (out, r) and A₀ (r, in) such that scale·B₀A₀ is the best approximation of W of that rank.

    Both are float32, or float64 if W is. The directions and their signs are those of `leading_directions`.
    """
    U, s, Vh = leading_directions(W, rank)
    # The singular values are divided evenly between the factors, as in the paper.
    root = torch.sqrt(s / scale)
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    B, A = U * root, root[:, None] * Vh
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


GAMMA = 16.0  # the default of the paper and of PEFT


@torch.no_grad()
def gradient_pair(name: str, W: Tensor, gradient: Tensor, *, rank: int) -> Pair:
    """B₀ (out, r) and A₀ (r, in) from the gradient of W, in float32, or in float64 if W is.

    Raises
    ------
    OptionError
        The gradient is 0, or not finite, or has another shape than W.
    """
    if gradient.shape != W.shape:
        shapes = f"{tuple(gradient.shape)}, where the weight has {tuple(W.shape)}"
        raise OptionError(f"{name}: the gradient has the shape {shapes}", fix="give the gradient of this weight")
    if not torch.isfinite(gradient).all() or not gradient.any():
        what = "0" if torch.isfinite(gradient).all() else "not finite"
        raise OptionError(
            f"{name}: the gradient of the first step is {what}, so that it has no directions",
            fix="leave this module out, or choose another start than lora-ga",
        )
    # A matrix that is narrower than 2r has fewer directions, of which A takes the first and B the last.
    count = min(2 * rank, *gradient.shape)
    compute = torch.float64 if W.dtype == torch.float64 else torch.float32
    U, _, Vh = leading_directions(gradient.to(compute), count)
    length = W.shape[0] ** 0.25 / GAMMA**0.5
    B, A = length * U[:, count - rank :], length * Vh[:rank]
    return Pair(B.to(W.device, compute).contiguous(), A.to(W.device, compute).contiguous())


@contextmanager
def weight_gradients(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Within the context, add up the gradients of the weights of a model, by name, in float32 on the CPU.

    All other parameters get no gradient, to save memory. The model is as it was afterwards.

    Raises
    ------
    OptionError
        A weight is not a parameter of floating point numbers.
    """
    for name, weight in weights.items():
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise OptionError(
                f"{name}: its weight has no gradient, which lora-ga starts along",
                fix="leave this module out, or choose another start; codes and parametrised weights have none",
            )
    # Two layers may share a weight. One that no batch reaches has a gradient of 0.
    sums = {id(weight): torch.zeros(weight.shape) for weight in weights.values()}

    def take(parameter: Tensor) -> None:
        # Each goes to the CPU at once, so that no more than one gradient of a weight is in the memory of a GPU.
        assert parameter.grad is not None
        sums[id(parameter)] += parameter.grad.to("cpu", torch.float32)
        parameter.grad = None

    with ExitStack() as undo:
        for parameter in model.parameters():
            undo.callback(setattr, parameter, "grad", parameter.grad)
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in sums)
            if id(parameter) in sums:
                undo.callback(parameter.register_post_accumulate_grad_hook(take).remove)  # type: ignore[no-untyped-call]
        yield {name: sums[id(weight)] for name, weight in weights.items()}


@torch.no_grad()
def subtracted_pair(
    name: str, W: Tensor, method: TrainingMethod, *, rank: int, scale: float, gradient: Tensor | None
) -> Pair | None:
    """The first pair of a layer by the start of the method; None if the product of its first pair is 0.

    Parameters
    ----------
    name : str
        The name of the layer, for messages.
    W : tensor, shape (out, in)
    gradient : tensor, shape (out, in), optional
        The gradient of the loss with respect to W, for ``lora-ga``.

    Raises
    ------
    OptionError
        The weight or its gradient is not finite, or the gradient is missing or 0.
    """
    if not method.subtracted:
        return None
    if not torch.isfinite(W).all():
        raise OptionError(
            f"{name}: its weight is not finite, so that {method.start} cannot start from it",
            fix=f"repair the weights of the model, choose another start than {method.start}, or leave this module out",
        )
    if method.start == "pissa":
        return principal_pair(W, rank=rank, scale=scale)
    if method.start == "olora":
        return orthogonal_pair(W, rank=rank)
    if gradient is None:
        raise OptionError(
            f"{name}: lora-ga starts along the gradient of the loss, and none is given",
            fix="train with fit, which computes it, or give gradients= to inject",
        )
    return gradient_pair(name, W, gradient, rank=rank)
