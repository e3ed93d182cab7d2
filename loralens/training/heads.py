"""Heads: modules of a model that are trained in full, in float32 whatever the dtype of the model."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loralens.core.layers import compute_dtype

# An update at a usual learning rate is below half a unit in the last place of these dtypes, and rounding loses it.
HALF = (torch.float16, torch.bfloat16)


@torch.no_grad()
def widen_heads(heads: Iterable[nn.Module]) -> tuple[RemovableHandle, ...]:
    """Convert 16-bit heads to float32, with inputs and outputs in the dtypes that they had.

    The steps of an optimiser are too small for 16 bits, and the ε of Adam, 1e-8, is 0 in float16. Whoever removes the
    handles must also restore the 16-bit tensors.
    """
    handles: list[RemovableHandle] = []
    for layer in (layer for head in heads for layer in head.modules()):
        narrow = [t for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)) if t.dtype in HALF]
        if narrow:
            handles += [
                # Models of transformers call their modules with keywords too.
                layer.register_forward_pre_hook(_cast_inputs, with_kwargs=True),
                layer.register_forward_hook(_cast_output_to(narrow[0].dtype)),
            ]
        for tensor in narrow:
            # Through .data, so that the parameter stays the same object for the optimiser and for tied weights.
            tensor.data = tensor.data.to(compute_dtype(tensor))
    return tuple(handles)


def _cast_inputs(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    del layer
    return tuple(map(_to_float32, args)), {name: _to_float32(value) for name, value in kwargs.items()}


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def _cast_output_to(dtype: torch.dtype) -> Any:
    """A hook that rounds the output to the dtype in which the model continues."""

    def hook(layer: nn.Module, inputs: Any, output: Any) -> Any:
        del layer, inputs
        return output.to(dtype) if isinstance(output, Tensor) and output.is_floating_point() else output

    return hook


def copy_tensors(heads: Iterable[nn.Module]) -> tuple[tuple[Tensor, Tensor], ...]:
    """The parameters and buffers of heads, each with a copy."""
    tensors = [tensor for head in heads for tensor in (*head.parameters(), *head.buffers())]
    return tuple((tensor, tensor.detach().clone()) for tensor in tensors)


@torch.no_grad()
def restore_tensors(copies_before: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set the tensors of heads to the values and the dtypes of their copies."""
    for tensor, before in copies_before:
        tensor.data = tensor.data.to(before.dtype)
        tensor.copy_(before)
