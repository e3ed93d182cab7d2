"""DoRA: the length of every output is trained separately from its direction, W' = m · V/‖V‖, V = W + scale · B A.

The norm is taken over each row of V (out, in), for a convolution over inputs and kernel. m starts as ‖W + ΔW₀‖, so that
W' = W at first. In the backward pass the norm is a constant (Liu et al. 2024, §4.3), as in PEFT.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from loralens.training.layers.layer import LoRALayer


def add_magnitude(layer: "LoRALayer") -> None:
    """Give a layer its trainable m, shape (out,), in the dtype of its factors: the row norms as they are now."""
    layer.magnitude = nn.Parameter(row_norms(layer))


# Without gradients, since the norm is a constant in the backward pass: its gradient would need memory of the size of W.
@torch.no_grad()
def row_norms(layer: "LoRALayer") -> Tensor:
    """‖W + scale · B A‖ for every row, shape (out,), in the dtype of the factors.

    This costs out · in · r multiplications, and for its duration one matrix of the size of W.
    """
    W = layer.matrix(layer.base_layer).to(layer.B.dtype)
    # bfloat16 has 8 bits of mantissa, and m/‖V‖ must be 1 at the start.
    with torch.autocast(W.device.type, enabled=False):
        length: Tensor = torch.linalg.vector_norm(torch.addmm(W, layer.B, layer.A, alpha=layer.scale), dim=1)
    return length


def rescale(layer: "LoRALayer", y: Tensor, x: Tensor, *, dropped: bool) -> Tensor:
    """The output m/‖V‖ · V x + b, computed from y = W x + b.

    ``dropped`` says that dropout has set entries of x to 0 which y was computed with. The frozen part y then stays
    whole, and the layer adds (m/‖V‖ − 1) W x + m/‖V‖ · scale · B A x with these entries missing, as PEFT does.
    """
    assert layer.magnitude is not None
    length = row_norms(layer)
    # A row of zeros has no direction: dividing by 1 keeps its output 0 instead of NaN.
    factor = layer.along_channels(layer.magnitude / torch.where(length > 0, length, torch.ones_like(length)))
    bias: Tensor | None = getattr(layer.base_layer, "bias", None)
    # m scales W x alone, so the bias is taken off before and added after.
    shift = None if bias is None else layer.along_channels(bias)
    if not dropped:
        adapted: Tensor = factor * layer.add_update(y if shift is None else y - shift, x)
        return adapted if shift is None else adapted + shift
    # The second pass is PEFT's too: its frozen part is that of the whole x, and the rest is that of x with dropout.
    again: Tensor = layer.base_layer(x)
    plain = again if shift is None else again - shift
    return y - plain + factor * layer.add_update(plain, x)
