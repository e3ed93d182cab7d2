"""Freezes the running statistics (batch and spectral norm) of a frozen model, also in training mode.

In training mode a batch norm normalises by the batch and updates its running mean and variance, with or without
gradients; the parametrisation of a spectral norm updates its estimate of the leading directions of the weight. An
adapter does not contain these statistics, so on the original base it would compute something else than was trained.
While a model is adapted, the normalisation of its frozen part is therefore that of evaluation.
"""

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils.hooks import RemovableHandle

_MODE = "_mode_outside"  # attribute of a layer during its call: the mode it was in


def freeze_statistics(model: nn.Module, *, heads: Collection[nn.Module] = ()) -> tuple[RemovableHandle, ...]:
    """Freeze the running statistics of every layer outside ``heads`` until the handles are removed."""
    # The statistics of heads are saved with them, as buffers.
    trained = {id(layer) for head in heads for layer in head.modules()}
    handles: list[RemovableHandle] = []
    for layer in model.modules():
        # A norm without running statistics normalises by the batch in evaluation too.
        moving = isinstance(layer, _SpectralNorm) or (isinstance(layer, _NormBase) and layer.running_mean is not None)
        if moving and id(layer) not in trained:
            # Hooks, since model.train() at any time would undo a mode that is set once.
            handles.append(layer.register_forward_pre_hook(_enter_evaluation))
            # always_call, so that the mode is restored after an exception too.
            handles.append(layer.register_forward_hook(_restore_mode, always_call=True))
    return tuple(handles)


def _enter_evaluation(layer: nn.Module, inputs: Any) -> None:
    del inputs
    setattr(layer, _MODE, layer.training)
    layer.training = False


def _restore_mode(layer: nn.Module, inputs: Any, output: Any) -> None:
    del inputs, output
    layer.training = layer.__dict__.pop(_MODE)
