"""The LoRA layer of a convolution: A is a kernel like that of the layer with r outputs, B a 1 × 1 kernel."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from loralens.training.layer import LoRALayer, cast

POINTWISE = (F.conv1d, F.conv2d, F.conv3d)  # by the number of dimensions of the kernel


class ConvLayer(LoRALayer):
    """Beside ``nn.Conv1d``, ``Conv2d`` or ``Conv3d``, not grouped; A is (r, in · k…).

    The stride, padding (and its mode) and dilation of the layer are A's. PEFT up to 0.21 leaves the dilation and the
    padding mode out: where a layer has them, what it makes of a file is not what was trained.
    """

    kind: ClassVar[str] = "conv"

    @staticmethod
    def matrix(layer: nn.Module) -> Tensor:
        """The weight as (out, in · k…)."""
        return LoRALayer.matrix(layer).flatten(1)

    def add_pair(self, y: Tensor, x: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
        """The sum y + scale · B A x, y (…, out, size…)."""
        z = self.base_layer._conv_forward(cast(x, A), A.view(-1, *self.weight.shape[1:]), None)  # type: ignore[operator]
        pointwise = POINTWISE[len(self.kernel) - 1]
        return torch.add(y, pointwise(z, B.view(*B.shape, *(1 for _ in self.kernel))), alpha=scale)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Size of the kernel."""
        return tuple(self.weight.shape[2:])

    def along_channels(self, numbers: Tensor) -> Tensor:
        """One number for each output channel, (out, 1…)."""
        return numbers.view(-1, *(1 for _ in self.kernel))
