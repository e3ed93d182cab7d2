"""LoRA layers: a frozen layer and its trainable pair, y = W x + scale · B A x.

The pair is stored as everywhere in loralens: B (out, r), A (r, in), whatever the kind of layer. The update goes through
the bottleneck z = A x, and ΔW is never formed. For the backward pass the layer saves x, z, B and A, which the gradients
of the pair need, and nothing of the size of the output.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - what all torch code calls it

from loralens.training.layers import dora

if TYPE_CHECKING:
    from loralens.training.initialisation import Pair


class LoRALayer(nn.Module):
    """A frozen layer with a trainable pair. It takes the place of the layer and gives access to its attributes.

    Parameters
    ----------
    base_layer : nn.Module
        The frozen layer, which is not changed. Its mode, training or evaluation, becomes the mode of this layer.
    pair : Pair
        The initial factors: float32, or float64 if the weight is float64, on the device of the weight.
    scale : float
    dropout : float
        The probability with which an entry of the input of A is dropped, in training only. An embedding has no
        dropout, since its inputs are numbers of tokens.
    start : Pair, optional
        A frozen pair that is subtracted: y = W x + scale · (B A − B₀ A₀) x, see `loralens.training.initialisation`.

    Notes
    -----
    If the weight has 16 bits and the factors are float32, x is cast to float32, the update is computed in float32, and
    the sum is rounded once. Under autocast, torch decides about the casts.
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
        # They are set before the frozen layer, since torch refuses the name of an attribute that exists: layers of
        # experts are nested, and the inner one has all these.
        self.B, self.A = nn.Parameter(pair.B), nn.Parameter(pair.A)
        self.register_parameter("magnitude", None)
        # Buffers move to another device with the layer, and no optimiser updates them.
        self.register_buffer("B0", start.B if start else None)
        self.register_buffer("A0", start.A if start else None)
        # PEFT's name for it, so that the names of weights are those of a model in PEFT.
        self.base_layer = base_layer
        self.scale = scale
        self.dropout = dropout
        self.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        """An attribute of the frozen layer, where this layer has none of that name: ``weight``, ``in_features`` …"""
        # torch keeps parameters, buffers and submodules where only its own __getattr__ looks for them.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # does not exist yet while the layer is built, copied or unpickled
                raise
            return getattr(self.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a parameter of the frozen layer there, since transformers ties weights by setting them."""
        # It is read from __dict__, since attribute access would recurse before nn.Module.__init__ has run.
        base = self.__dict__.get("_modules", {}).get("base_layer")
        if base is not None and name in base._parameters and name not in self._parameters:
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    @staticmethod
    def matrix(layer: nn.Module) -> Tensor:
        """The weight of a layer of this kind as (out, in), without a copy."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return weight

    def forward(self, input: Tensor) -> Tensor:
        """The output of the adapted layer, in the dtype of the output of the frozen layer."""
        y: Tensor = self.base_layer(input)
        x = self.apply_dropout(input)
        adapted = self.add_update(y, x) if self.magnitude is None else dora.rescale(self, y, x, dropped=x is not input)
        return adapted.to(y.dtype)

    def apply_dropout(self, x: Tensor) -> Tensor:
        """The input of A: the input of the layer, with dropout in training."""
        # The same object where nothing is dropped: `forward` compares, and a copy would cost memory.
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def add_update(self, y: Tensor, x: Tensor) -> Tensor:
        """The sum y + scale · B A x, in the wider of the two dtypes."""
        y = self.add_pair(y, x, self.B, self.A, self.scale)
        if self.B0 is None or self.A0 is None:
            return y
        return self.add_pair(y, x, self.B0, self.A0, -self.scale)

    def add_pair(self, y: Tensor, x: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
        """The sum y + scale · B A x of any pair that fits this layer."""
        return add_product(y, F.linear(cast(x, A), A), B, scale)

    @property
    def rank(self) -> int:
        """The rank of the trained pair."""
        return int(self.A.shape[0])

    @property
    def kernel(self) -> tuple[int, ...]:
        """The size of the kernel of a convolution; empty for every other layer."""
        return ()

    def along_channels(self, numbers: Tensor) -> Tensor:
        """Numbers, one for each output, in a shape that multiplies the channels of y."""
        return numbers

    def extra_repr(self) -> str:
        """The rank, the scale, and the dropout if there is any, for ``print(model)``."""
        settings = [f"rank={self.rank}", f"scale={self.scale:g}"]
        settings += [f"dropout={self.dropout:g}"] if self.dropout else []
        return ", ".join(settings)


class LinearLayer(LoRALayer):
    """The layer for ``nn.Linear``."""


class TransposedLayer(LoRALayer):
    """The layer for ``Conv1D`` of transformers, a linear layer whose weight is stored as (in, out)."""

    @staticmethod
    def matrix(layer: nn.Module) -> Tensor:
        """The weight as (out, in)."""
        return LoRALayer.matrix(layer).T


def cast(x: Tensor, factor: Tensor) -> Tensor:
    """The input in the dtype of a factor; unchanged under autocast, which would cast it back."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(factor.dtype)


def add_product(y: Tensor, z: Tensor, B: Tensor, scale: float) -> Tensor:
    """The sum y + scale · z Bᵀ, as one product that adds to y where the dtypes allow it.

    Parameters
    ----------
    y : tensor, shape (…, out)
    z : tensor, shape (…, r)
    B : tensor, shape (out, r)
    """
    # addmm saves a tensor of the size of y. It needs one dtype; under autocast y may have 16 bits and z be float32. And
    # autocast would round a float32 y, such as the rows of a frozen embedding, before the sum.
    rounds = y.dtype == torch.float32 and torch.is_autocast_enabled(y.device.type)
    if y.dtype == z.dtype and not rounds:
        flat = torch.addmm(y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1]), B.T, alpha=scale)
        return flat.view(y.shape)
    return torch.add(y, F.linear(z, B), alpha=scale)
