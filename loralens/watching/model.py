"""What a watcher needs to know of a model besides its adapter: the sizes of its weights, and who writes."""

from math import prod, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loralens.core.adapter import Adapter
from loralens.core.attached import Tree
from loralens.errors import MismatchError
from loralens.linalg.rounding import ulp
from loralens.training.injection import Injection
from loralens.training.readout import numpy_of
from loralens.watching.health import WeightSize
from loralens.watching.view import peft_model, unwrapped

SAMPLE = 1 << 12  # entries of a weight: a mean of squares has an error of a few per cent
NARROW = (torch.float16, torch.bfloat16)  # what float32 weights lose is below anything that is trained


def weigh(model: "nn.Module | Injection", adapter: Adapter) -> dict[str, WeightSize]:
    """The sizes of the adapted weights, estimated from a sample of their entries.

    Quantised weights, and those that are not found under the names of the adapter, are left out.
    """
    inner = model.model if isinstance(model, Injection) else (peft_model(model) or unwrapped(model))
    tree = Tree.of(inner)
    try:
        weights = tree.weights(adapter)
    except MismatchError:
        return {}
    sizes = {}
    for name, weight in weights.modules.items():
        parameter = tree.parameter(weight.key).detach()
        if not parameter.dtype.is_floating_point or not parameter.numel():
            continue
        entries = _sample(parameter)
        squares = float(np.square(entries.astype(np.float64)).mean())
        # One weight may hold the matrices of several modules, of which each has its share.
        norm = sqrt(squares * prod(adapter[name].shape))
        units = ulp(entries, entries.dtype) if parameter.dtype in NARROW else None
        sizes[name] = WeightSize(norm, None if units is None else sqrt(float((units**2).mean()) / 12))
    return sizes


def _sample(parameter: Tensor) -> Any:
    """Entries of a weight at equal distances; of a sharded one those that this process has."""
    own: Tensor = getattr(parameter, "to_local", lambda: parameter)()
    # Along every axis, and not of the flattened weight, which would be copied if it is not contiguous.
    step = max(1, int((own.numel() / SAMPLE) ** (1 / max(1, own.ndim))))
    return numpy_of(own[(slice(None, None, step),) * own.ndim])


def trains_A(model: "nn.Module | Injection") -> bool:
    """Whether the factors A get gradients: methods that freeze A do so on purpose."""
    inner = model.model if isinstance(model, Injection) else model
    trained = {path.rpartition(".")[2] for path, p in inner.named_parameters() if p.requires_grad}
    # A of our layers, weight below lora_A in PEFT's.
    return "A" in trained or any("lora_A" in path for path, p in inner.named_parameters() if p.requires_grad)


def is_sharded(model: "nn.Module | Injection") -> bool:
    """Whether FSDP2 has divided parameters of the model, so that reading one is work of all processes."""
    inner = model.model if isinstance(model, Injection) else model
    return any(hasattr(parameter, "full_tensor") for parameter in inner.parameters())


def is_writer() -> bool:
    """Whether this process writes logs: the first of several."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())
