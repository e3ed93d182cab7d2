"""LoRA layers: a frozen layer and its trainable pair, y = W x + scale · B A x.

The pair is stored as everywhere in loralens: B (out, r), A (r, in), whatever the kind of layer. The update goes through
the bottleneck z = A x, and ΔW is never formed. For the backward pass the layer saves x, z, B and A, which the gradients
of the pair need, and nothing of the size of the output.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - what all torch code calls it

from loralens.training.initialisation import Pair


# DoRA: the length of every output is trained separately from its direction, W' = m · V/‖V‖, V = W + scale · B A. The
# norm is taken over each row of V (out, in), for a convolution over inputs and kernel. m starts as ‖W + ΔW₀‖, so that
# W' = W at first. In the backward pass the norm is a constant (Liu et al. 2024, §4.3), as in PEFT.
def add_magnitude(layer: "LoRALayer") -> None:
    """Give a layer its trainable m, shape (out,), in the dtype of its factors: the row norms as they are now."""
    layer.magnitude = nn.Parameter(row_norms(layer))


# Without gradients, since the norm is a constant in the backward pass: its gradient would need memory of the size of W.
@torch.no_grad()
def row_norms(layer: "LoRALayer") -> Tensor:
    """‖W + ΔW‖ for every row, shape (out,), in the dtype of the factors.

    This costs out · in · r multiplications, and for its duration one matrix of the size of W.
    """
    V = layer.matrix(layer.base_layer).to(layer.B.dtype)
    # bfloat16 has 8 bits of mantissa, and m/‖V‖ must be 1 at the start.
    with torch.autocast(V.device.type, enabled=False):
        V = torch.addmm(V, layer.B, layer.A, alpha=layer.scale)
        if layer.B0 is not None and layer.A0 is not None:
            V = V.addmm_(layer.B0, layer.A0, alpha=-layer.scale)
        length: Tensor = torch.linalg.vector_norm(V, dim=1)
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
        self, base_layer: nn.Module, pair: Pair, *, scale: float, dropout: float = 0.0, start: Pair | None = None
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
        adapted = self.add_update(y, x) if self.magnitude is None else rescale(self, y, x, dropped=x is not input)
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


POINTWISE = (F.conv1d, F.conv2d, F.conv3d)  # by the number of dimensions of the kernel


class ConvLayer(LoRALayer):
    """The layer for ``nn.Conv1d``, ``Conv2d`` and ``Conv3d`` without groups; A is (r, in · k…).

    A has the stride, the padding with its mode, and the dilation of the frozen layer. PEFT up to 0.21 gives A neither
    the dilation nor the padding mode: where a layer has them, PEFT computes something else from a file than was
    trained.
    """

    kind: ClassVar[str] = "conv"

    @staticmethod
    def matrix(layer: nn.Module) -> Tensor:
        """The weight as (out, in · k…)."""
        return LoRALayer.matrix(layer).flatten(1)

    def add_pair(self, y: Tensor, x: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
        """The sum y + scale · B A x, with y (…, out, size…)."""
        # torch's own method, since it alone applies all padding modes; there is no public function that does.
        z = self.base_layer._conv_forward(cast(x, A), A.view(-1, *self.weight.shape[1:]), None)  # type: ignore[operator]
        pointwise = POINTWISE[len(self.kernel) - 1]
        return torch.add(y, pointwise(z, B.view(*B.shape, *(1 for _ in self.kernel))), alpha=scale)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The size of the kernel."""
        return tuple(self.weight.shape[2:])

    def along_channels(self, numbers: Tensor) -> Tensor:
        """One number for each output channel, as (out, 1…)."""
        return numbers.view(-1, *(1 for _ in self.kernel))


class EmbeddingLayer(LoRALayer):
    """The layer for ``nn.Embedding``: B is (dim, r), A is (r, vocab). B is drawn and A is 0, as in loralib and PEFT.

    The column of the padding token gets no gradient. An embedding that scales its output, as Gemma's does, scales the
    update too.
    """

    kind: ClassVar[str] = "embedding"

    @staticmethod
    def matrix(layer: nn.Module) -> Tensor:
        """The weight as (dim, vocab)."""
        return LoRALayer.matrix(layer).T

    def apply_dropout(self, x: Tensor) -> Tensor:
        """The input itself, since the numbers of tokens cannot be dropped."""
        return x

    def add_pair(self, y: Tensor, x: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
        """The sum y + scale · B A x, with y (…, dim)."""
        z = F.embedding(x, A.T, padding_idx=self.padding_idx)
        # transformers' own name: the factor √dim of Gemma's embedding, which is not part of its weight.
        outer = getattr(self.base_layer, "embed_scale", None)
        return add_product(y, z if outer is None else z * outer, B, scale)
