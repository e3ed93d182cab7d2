"""The LoRA layer of a convolution: A is a kernel of the size of the layer's with r outputs, B is a 1 × 1 kernel."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from loralens.training.layers.layer import LoRALayer, cast

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
