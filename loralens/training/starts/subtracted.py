"""Pairs whose product is not 0 at the start: made of the weight or of a gradient, and subtracted in the forward pass.

W stays as it is, and the layer computes W x + scale·(B A x − B₀ A₀ x). That costs one more pair of thin products. In
return W is not rounded a second time, a tied weight stays tied, nothing has to be restored, and the result is a plain
LoRA of rank 2r on the original base: B' = [B, −B₀], A' = [A; A₀].
"""

import torch
from torch import Tensor

from loralens.errors import OptionError
from loralens.training.method import TrainingMethod
from loralens.training.starts.drawn import Pair
from loralens.training.starts.lora_ga import gradient_pair
from loralens.training.starts.olora import orthogonal_pair
from loralens.training.starts.pissa import principal_pair


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


def difference(pair: Pair, start: Pair) -> Pair:
    """B A − B₀ A₀ as one pair of rank 2r: [B, −B₀] and [A; A₀], the same numbers without rounding."""
    return Pair(torch.cat([pair.B, -start.B], dim=1), torch.cat([pair.A, start.A]))
