"""LoRA layers: a frozen layer and its trainable pair, y = W x + scale · B A x.

The pair is kept as everywhere in loralens: B (out, r), A (r, in), whatever the kind of layer; the update goes through
its bottleneck z = A x and is never formed. What is saved for the backward pass is x, z, B and A: what the gradients of
the pair need, and nothing of the size of the output.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - what all torch code calls it

from loralens.training import dora

if TYPE_CHECKING:
    from loralens.training.initial import Pair


class LoRALayer(nn.Module):
    """A frozen layer with a trainable pair beside it; stands where the layer stood and answers for its attributes.

    Parameters
    ----------
    base_layer : nn.Module
        Left as it is. Its mode, training or evaluation, becomes this one's.
    pair : Pair
        The factors to begin with: float32, or float64 beside a float64 weight, on the device of the weight.
    scale : float
    dropout : float
        Part of the entries of x that is dropped on their way into A, in training only. Costs nothing where it is 0;
        an embedding, whose x are numbers of tokens, has none.
    start : Pair, optional
        A frozen pair that is taken off: y = W x + scale · (B A − B₀ A₀) x, see `loralens.training.pissa`.

    Notes
    -----
    With a weight in 16 bits and factors in float32, x is cast to float32, the update is computed in float32, and the
    sum is rounded once. Under autocast the casts are autocast's.
    """

    kind: ClassVar[str] = "linear"

    A: nn.Parameter
    B: nn.Parameter
    magnitude: nn.Parameter | None
    A0: Tensor | None
    B0: Tensor | None

    def __init__(
        self, base_layer: nn.Module, pair: "Pair", *, scale: float, dropout: float = 0.0, start: "Pair | None" = None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.B, self.A = nn.Parameter(pair.B), nn.Parameter(pair.A)
        self.register_parameter("magnitude", None)
        self.register_buffer("B0", start.B if start else None)
        self.register_buffer("A0", start.A if start else None)
        self.scale = scale
        self.dropout = dropout
        self.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        """What this layer has not, the frozen one may have: ``weight``, ``in_features``, ``embed_scale`` …"""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not there yet: while it is built, copied or unpickled
                raise
            return getattr(self.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """A parameter of the frozen layer is set there: transformers ties weights by setting them."""
        base = self.__dict__.get("_modules", {}).get("base_layer")
        if base is not None and name in base._parameters:
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    @staticmethod
    def matrix(layer: nn.Module) -> Tensor:
        """The weight of a layer of this kind as (out, in), the same memory."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return weight

    def forward(self, input: Tensor) -> Tensor:
        """What the adapted layer makes of an input, in the dtype of the frozen one's output."""
        y: Tensor = self.base_layer(input)
        x = self.apply_dropout(input)
        adapted = self.add_update(y, x) if self.magnitude is None else dora.rescale(self, y, x, dropped=x is not input)
        return adapted.to(y.dtype)

    def apply_dropout(self, x: Tensor) -> Tensor:
        """The input on its way into A: itself, but for dropout in training."""
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def add_update(self, y: Tensor, x: Tensor) -> Tensor:
        """The sum y + scale · B A x, unrounded: in the wider dtype of the two."""
        y = self.add_pair(y, x, self.B, self.A, self.scale)
        if self.B0 is None or self.A0 is None:
            return y
        return self.add_pair(y, x, self.B0, self.A0, -self.scale)

    def add_pair(self, y: Tensor, x: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
        """The sum y + scale · B A x of any pair that fits this layer."""
        return add_product(y, F.linear(cast(x, A), A), B, scale)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Size of the kernel of a convolution; empty for every other layer."""
        return ()

    def along_channels(self, numbers: Tensor) -> Tensor:
        """One number for each output, along the channels of y."""
        return numbers

    def extra_repr(self) -> str:
        """Rank and scale, and what is out of the ordinary."""
        settings = [f"rank={self.A.shape[0]}", f"scale={self.scale:g}"]
        settings += [f"dropout={self.dropout:g}"] if self.dropout else []
        return ", ".join(settings)


class LinearLayer(LoRALayer):
    """Beside ``nn.Linear``."""


class TransposedLayer(LoRALayer):
    """Beside ``transformers``' Conv1D: a linear layer whose weight is stored (in, out)."""

    @staticmethod
    def matrix(layer: nn.Module) -> Tensor:
        """The weight as (out, in)."""
        return LoRALayer.matrix(layer).T


def cast(x: Tensor, factor: Tensor) -> Tensor:
    """The input in the dtype of a factor; as it is under autocast, which would cast it back."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(factor.dtype)


def add_product(y: Tensor, z: Tensor, B: Tensor, scale: float) -> Tensor:
    """The sum y + scale · z Bᵀ, one product that adds to y where the dtypes allow it.

    Parameters
    ----------
    y : tensor, shape (…, out)
    z : tensor, shape (…, r)
    B : tensor, shape (out, r)
    """
    # addmm needs one dtype; under autocast y may be in 16 bits and z in float32.
    if y.dtype == z.dtype:
        flat = torch.addmm(y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1]), B.T, alpha=scale)
        return flat.view(y.shape)
    return torch.add(y, F.linear(z, B), alpha=scale)
