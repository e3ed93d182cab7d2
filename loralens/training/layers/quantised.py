"""The LoRA layer for a linear layer whose frozen weight is stored in codes of bitsandbytes: NF4, FP4 or int8 (QLoRA).

The frozen layer computes with its codes, and the pair beside it is float32. bitsandbytes is an extra: its layers are
recognised by their classes, so that it is imported only where there are some.
"""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loralens.training.layers.layer import LinearLayer

FOUR_BITS, EIGHT_BITS = "Linear4bit", "Linear8bitLt"  # classes of bitsandbytes
_MODE = "_mode_outside"  # attribute of a layer during its call: the mode it was in
LARGEST = 127.0  # the largest code of int8, which stands for the largest entry of a row


class QuantisedLayer(LinearLayer):
    """The layer for ``Linear4bit`` and ``Linear8bitLt`` of bitsandbytes."""

    @staticmethod
    def matrix(layer: nn.Module) -> Tensor:
        """The weight as (out, in), decoded: a copy."""
        weight: Any = layer.weight
        if weight_kind(layer) == EIGHT_BITS:
            # After the first call the scales are in the state of the layer.
            state: Any = layer.state
            codes = weight.data if state.CB is None else state.CB
            scales = weight.SCB if state.SCB is None else state.SCB
            decoded: Tensor = codes.float() * (scales.float() / LARGEST)[:, None]
            return decoded
        from bitsandbytes.functional import dequantize_4bit

        matrix: Tensor = dequantize_4bit(*_plain_codes(weight)).view(weight.quant_state.shape)
        return matrix


def keep_codes(model: nn.Module) -> tuple[RemovableHandle, ...]:
    """Let gradients pass through all layers with codes of a model until the handles are removed.

    In evaluation mode on a CPU, bitsandbytes puts the codes into another order at the first call without gradients, and
    from then on its products have no gradients. In training mode it does neither.
    """
    handles: list[RemovableHandle] = []
    for layer in model.modules():
        if kind := weight_kind(layer):
            if kind == FOUR_BITS:
                weight: Any = layer.weight
                weight.data, weight.quant_state = _plain_codes(weight)
            handles.append(layer.register_forward_pre_hook(_enter_training))
            handles.append(layer.register_forward_hook(_restore_mode, always_call=True))
    return tuple(handles)


def _plain_codes(weight: Any) -> tuple[Tensor, Any]:
    """The codes of 4 bits in the order in which they are stored, and their state; nothing is changed."""
    if not getattr(weight.quant_state, "packing_format_for_cpu", False):
        return weight.data, weight.quant_state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, copy(weight.quant_state))
    return data, state


def _enter_training(layer: nn.Module, inputs: Any) -> None:
    del inputs
    setattr(layer, _MODE, layer.training)
    layer.training = True


def _restore_mode(layer: nn.Module, inputs: Any, output: Any) -> None:
    del inputs, output
    layer.training = layer.__dict__.pop(_MODE)


def weight_kind(layer: nn.Module) -> str | None:
    """The class of bitsandbytes that a linear layer with codes has; None for every other layer."""
    for base in type(layer).__mro__:
        if base.__module__.partition(".")[0] == "bitsandbytes" and base.__name__ in (FOUR_BITS, EIGHT_BITS):
            # A layer that has not been moved to its device holds its weight as it was.
            weight: Any = getattr(layer, "weight", None)
            quantised = isinstance(weight, Tensor) and weight.dtype in (torch.uint8, torch.int8)
            return base.__name__ if quantised else None
    return None


def codes_of(model: nn.Module) -> str | None:
    """The name of the codes in which the weights of a model are stored, such as ``nf4``; None if there are none."""
    for layer in model.modules():
        kind = weight_kind(layer)
        if kind == EIGHT_BITS:
            return "int8"
        if kind == FOUR_BITS:
            return str(layer.weight.quant_state.quant_type)  # type: ignore[union-attr]
    return None
