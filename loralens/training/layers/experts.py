"""The LoRA layer of a stack of experts: one pair for each expert of a parameter with three axes.

The parameter belongs to a module that computes all experts, so its weights are replaced for the call of that module:
W' = W + scale · B A for each expert, as in PEFT's ``target_parameters``. This needs memory of the size of the stack.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from loralens.training.initialisation import Pair
from loralens.training.layers.layer import LoRALayer

# The names of such parameters in the models of transformers. The order in which PEFT nests their pairs in a file is
# known for these (`loralens.formats.dialects.peft.reader.REGISTERED`).
STACKS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "v1", "w2")


class ExpertLayer(LoRALayer):
    """The layer for one parameter (experts, out, in) of a module; B is (experts, out, r), A is (experts, r, in).

    If the module says that it ``is_transposed``, the parameter is (experts, in, out). Several parameters of one module
    have layers that are nested, and the outermost is called in place of the module.
    """

    kind: ClassVar[str] = "experts"

    def __init__(self, base_layer: nn.Module, pair: Pair, *, parameter: str, scale: float) -> None:
        super().__init__(base_layer, pair, scale=scale)
        self.parameter = parameter

    @staticmethod
    def stack(module: nn.Module, parameter: str) -> Tensor:
        """The weights of a parameter as (experts, out, in), without a copy."""
        weights: Tensor = getattr(innermost(module), parameter)
        return weights.transpose(1, 2) if is_transposed(module) else weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the experts, computed with the adapted weights."""
        weights: dict[str, Tensor] = {}
        layer: nn.Module = self
        while isinstance(layer, ExpertLayer):
            weights[layer.parameter] = layer.adapted()
            layer = layer.base_layer
        return functional_call(layer, weights, args, kwargs)

    def adapted(self) -> Tensor:
        """W + scale · B A of every expert, in the shape and the dtype of the parameter."""
        W: Tensor = getattr(innermost(self), self.parameter)
        # Each factor is transposed before the product, so that no copy of the product is made.
        update = torch.bmm(self.A.mT, self.B.mT) if is_transposed(self) else torch.bmm(self.B, self.A)
        return torch.add(W, update, alpha=self.scale).to(W.dtype)

    @property
    def rank(self) -> int:
        """The rank of the pair of each expert."""
        return int(self.A.shape[1])


def innermost(module: nn.Module) -> nn.Module:
    """The module of the model inside of all expert layers."""
    while isinstance(module, ExpertLayer):
        module = module.base_layer
    return module


def is_transposed(module: nn.Module) -> bool:
    """Whether the parameters of a module of experts are (experts, in, out): transformers says so by an attribute."""
    return bool(getattr(innermost(module), "is_transposed", False))


def expert_stacks(module: nn.Module) -> list[str]:
    """The names of the parameters of a module that are stacks of experts, in natural order."""
    return sorted(
        name
        for name, parameter in module.named_parameters(recurse=False)
        if name in STACKS and parameter.ndim == 3 and parameter.is_floating_point()
    )
