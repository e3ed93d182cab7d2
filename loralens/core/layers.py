"""The forward computation of a pair next to the torch layer that it adapts, for each type of layer.

There is one class for each type of layer, with four methods. ``inside`` gives the bottleneck z = A x, whose last axis
has the r numbers of each position, and ``outside`` gives the update scale · B z in the shape of the output. ``back``
gives Bᵀg, the gradient at z that follows from the gradient g at the output. ``squares`` gives ‖x‖² for every position
of z. ``axis`` is the axis of the channels in the output. Everything is computed in float32 (float64 in float64 models),
whatever the dtype of the model.
"""

from typing import TYPE_CHECKING, Any, final

import numpy as np

from loralens.core.lowrank import LowRank
from loralens.errors import MismatchError

if TYPE_CHECKING:  # importing torch takes 1.4 s, so functions import it where they need it
    import torch
    from torch import Tensor, nn


@final
class LinearSteps:
    """A pair of ``nn.Linear`` or of GPT-2's Conv1D, a linear layer with its weight stored as (in, out)."""

    axis = -1

    def __init__(self, A: "Tensor", B: "Tensor", scale: float) -> None:
        self.A, self.B, self.scale = A, B, scale

    def inside(self, x: "Tensor") -> "Tensor":
        """(…, in) → (…, r)."""
        return x.to(self.A.dtype) @ self.A.T

    def squares(self, x: "Tensor") -> "Tensor":
        """(…, in) → (…)."""
        return x.to(self.A.dtype).square().sum(-1)

    def outside(self, z: "Tensor") -> "Tensor":
        """(…, r) → (…, out)."""
        # The scale is applied to z, which has fewer numbers than the output.
        return (self.scale * z) @ self.B.T

    def back(self, g: "Tensor") -> "Tensor":
        """(…, out) → (…, r)."""
        return g.to(self.B.dtype) @ self.B


@final
class ConvolutionSteps:
    """A pair of a convolution without groups: A is a kernel of the same size with r outputs, B is a 1 × 1 kernel."""

    def __init__(self, A: "Tensor", B: "Tensor", scale: float, layer: Any) -> None:
        self.A, self.B, self.scale = A.reshape(len(A), *layer.weight.shape[1:]), B, scale
        self.layer = layer
        # The weight has as many axes as a batch of outputs, and in both the channels are on axis 1. The axis is counted
        # from the end, because the batch axis may be missing.
        self.axis = 1 - layer.weight.ndim

    def inside(self, x: "Tensor") -> "Tensor":
        """(…, in, size…) → (…, size'…, r), with the padding and stride of the layer."""
        # The layer's own method applies its stride, dilation and padding mode.
        z: Tensor = self.layer._conv_forward(x.to(self.A.dtype), self.A, None)
        return z.movedim(self.axis, -1)

    def squares(self, x: "Tensor") -> "Tensor":
        """(…, in, size…) → (…, size'…), summed over the patch under the kernel, with the padding of the layer."""
        # A kernel of ones sums the squares under it.
        ones = self.A.new_ones((1, *self.A.shape[1:]))
        sums: Tensor = self.layer._conv_forward(x.to(self.A.dtype).square(), ones, None)
        return sums.squeeze(self.axis)

    def outside(self, z: "Tensor") -> "Tensor":
        """(…, size'…, r) → (…, out, size'…)."""
        return ((self.scale * z) @ self.B.T).movedim(-1, self.axis)

    def back(self, g: "Tensor") -> "Tensor":
        """(…, out, size'…) → (…, size'…, r)."""
        return g.to(self.B.dtype).movedim(self.axis, -1) @ self.B


@final
class EmbeddingSteps:
    """A pair of ``nn.Embedding``: x is one-hot, so A x is a column of A. Gemma's embeddings also scale the update."""

    axis = -1

    def __init__(self, A: "Tensor", B: "Tensor", scale: float, layer: Any) -> None:
        # Contiguous, so that a lookup reads the r numbers of a token in one place.
        self.columns, self.B, self.scale = A.T.contiguous(), B, scale
        # Gemma multiplies the embedding by √hidden in the layer itself.
        self.outer = getattr(layer, "embed_scale", 1.0)

    def inside(self, x: "Tensor") -> "Tensor":
        """(…) of whole numbers → (…, r)."""
        return self.columns[x]

    def squares(self, x: "Tensor") -> "Tensor":
        """(…) → (…): one-hot vectors have length 1."""
        return self.columns.new_ones(x.shape)

    def outside(self, z: "Tensor") -> "Tensor":
        """(…, r) → (…, dim)."""
        return (self.scale * z) @ self.B.T * self.outer

    def back(self, g: "Tensor") -> "Tensor":
        """(…, dim) → (…, r)."""
        return (self.outer * g).to(self.B.dtype) @ self.B


Steps = LinearSteps | ConvolutionSteps | EmbeddingSteps


def steps(module: LowRank, layer: "nn.Module") -> Steps | None:
    """The steps of a pair for its layer; None if a hook on the layer cannot apply the pair.

    This is the case for parameters that are not the weight of a layer, for unknown types of layers, for grouped
    convolutions (every group has its own A x), and for the ``out_proj`` of ``nn.MultiheadAttention``, which is never
    called.
    """
    from torch import nn

    # Types are compared by the names of all base classes: transformers' Conv1D may be subclassed, and importing it only
    # for this comparison would be slow.
    names = {base.__name__ for base in type(layer).__mro__}
    weight: Any = getattr(layer, "weight", None)
    # torch's fast path of attention uses the weight of out_proj without calling the layer.
    if weight is None or "NonDynamicallyQuantizableLinear" in names:
        return None
    dtype = compute_dtype(weight)
    A, B, scale = tensor(module.A, weight, dtype), tensor(module.B, weight, dtype), module.scale
    if isinstance(layer, nn.Embedding):
        _check(module, tuple(weight.shape[::-1]))
        return EmbeddingSteps(A, B, scale, layer)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        # In a grouped convolution every group reads other channels.
        return ConvolutionSteps(A, B, scale, layer) if layer.groups == 1 else None
    if not (isinstance(layer, nn.Linear) or "Conv1D" in names):
        return None
    _check(module, tuple(weight.shape[::-1] if "Conv1D" in names else weight.shape))
    return LinearSteps(A, B, scale)


def _check(module: LowRank, shape: tuple[int, ...]) -> None:
    """Check that the update has the orientation of the layer; matching by shapes accepts both orientations."""
    if module.shape != shape:
        raise MismatchError(
            f"its update has the shape {module.shape}, and the layer has {shape}",
            fix="give the model that it was trained for",
        )


def compute_dtype(like: "Tensor") -> "torch.dtype":
    """float64 for float64 weights, float32 for all others."""
    import torch

    return torch.float64 if like.dtype == torch.float64 else torch.float32


def tensor(array: Any, like: "Tensor", dtype: "torch.dtype") -> "Tensor":
    """A torch copy of a NumPy array of any float dtype, on the device of ``like``."""
    import torch

    # torch does not know the types of ml_dtypes, so narrower floats are converted to float32, which holds all of their
    # values.
    wide = np.float64 if dtype == torch.float64 or array.dtype == np.float64 else np.float32
    return torch.from_numpy(np.array(array, wide)).to(like.device, dtype)
