"""Heads: modules of a model that are trained in full, in float32 whatever the dtype of the model."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loralens.core.layers import compute_dtype

# Of these dtypes an update of a usual learning rate is lost to rounding.
HALF = (torch.float16, torch.bfloat16)


@torch.no_grad()
def widen_heads(heads: Iterable[nn.Module]) -> tuple[RemovableHandle, ...]:
    """Let heads of 16 bits hold and compute in float32, between inputs and outputs as they were.

    The steps of an optimiser are too small for 16 bits, and the ε of Adam is 0 in float16. Who takes the handles away
    has to put the 16 bits back as well.
    """
    handles: list[RemovableHandle] = []
    for layer in (layer for head in heads for layer in head.modules()):
        narrow = [t for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)) if t.dtype in HALF]
        if narrow:
            handles += [
                layer.register_forward_pre_hook(_cast_inputs, with_kwargs=True),
                layer.register_forward_hook(_cast_output_to(narrow[0].dtype)),
            ]
        for tensor in narrow:
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
    """A hook that rounds the output to what the model goes on with."""

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
    """Let heads hold what their copies do."""
    for tensor, before in copies_before:
        tensor.data = tensor.data.to(before.dtype)
        tensor.copy_(before)
