"""DoRA: the length of every output trained apart from its direction, W' = m · V/‖V‖, V = W + scale · B A.

The norm is over each row of V (out, in), of a convolution over in and kernel; m begins as ‖W + ΔW₀‖, so that W' = W.
In the backward pass the norm counts as a constant (Liu et al. 2024, §4.3), as PEFT has it too.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from loralens.training.layer import LoRALayer


def add_magnitude(layer: "LoRALayer") -> None:
    """Give a layer its trainable m, shape (out,), in the dtype of its factors: the norms as they are now."""
    layer.magnitude = nn.Parameter(row_norms(layer))


@torch.no_grad()
def row_norms(layer: "LoRALayer") -> Tensor:
    """‖W + scale · B A‖ of every row, shape (out,), in the dtype of the factors.

    Costs out · in · r multiplications and one matrix of the size of W for as long as it takes.
    """
    W = layer.matrix(layer.base_layer).to(layer.B.dtype)
    with torch.autocast(W.device.type, enabled=False):
        length: Tensor = torch.linalg.vector_norm(torch.addmm(W, layer.B, layer.A, alpha=layer.scale), dim=1)
    return length


def rescale(layer: "LoRALayer", y: Tensor, x: Tensor, *, dropped: bool) -> Tensor:
    """The output b + m/‖V‖ · V x, from y = W x + b.

    With ``dropped``, x has entries missing that were not missing in y: the frozen part y stays whole, and what the
    factor adds to it is (m/‖V‖ − 1) W x + m/‖V‖ · scale · B A x, as PEFT has it.
    """
    assert layer.magnitude is not None
    length = row_norms(layer)
    factor = layer.along_channels(layer.magnitude / torch.where(length > 0, length, torch.ones_like(length)))
    bias: Tensor | None = getattr(layer.base_layer, "bias", None)
    shift = None if bias is None else layer.along_channels(bias)
    if not dropped:
        adapted: Tensor = factor * layer.add_update(y if shift is None else y - shift, x)
        return adapted if shift is None else adapted + shift
    again: Tensor = layer.base_layer(x)
    plain = again if shift is None else again - shift
    return y - plain + factor * layer.add_update(plain, x)
