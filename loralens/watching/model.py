"""What a watcher has to know about a model besides its adapter: the sizes of its weights, and which process writes."""

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
from loralens.watching.view import peft_model, unwrap

SAMPLE = 1 << 12  # entries of a weight: a mean of squares has an error of a few per cent
NARROW = (torch.float16, torch.bfloat16)  # the rounding of float32 weights is smaller than any trained update


def weigh(model: "nn.Module | Injection", adapter: Adapter) -> dict[str, WeightSize]:
    """The sizes of the adapted weights, estimated from a sample of their entries.

    Quantised weights, and those that are not found under the names of the adapter, are left out.
    """
    inner = model.model if isinstance(model, Injection) else (peft_model(model) or unwrap(model))
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
        squares, unit_squares = _mean_squares(parameter)
        # One weight may hold the matrices of several modules, so the mean is scaled to the shape of the module.
        norm = sqrt(squares * prod(adapter[name].shape))
        sizes[name] = WeightSize(norm, sqrt(unit_squares / 12) if parameter.dtype in NARROW else None)
    return sizes


def _mean_squares(parameter: Tensor) -> tuple[float, float]:
    """The means of w² and of u² over a weight, u the unit in the last place, from a sample; 0 for units in float32.

    Of a sharded weight every process samples its own part, and all of them get the means over all parts.
    """
    own: Tensor = getattr(parameter, "to_local", lambda: parameter)()
    totals = np.zeros(3)
    if own.numel():
        entries = _sample(own)
        units = ulp(entries, entries.dtype) if parameter.dtype in NARROW else np.zeros(1)
        means = [float(np.square(numbers.astype(np.float64)).mean()) for numbers in (entries, units)]
        # Parts may differ in size.
        totals = own.numel() * np.array([*means, 1.0])
    squares, unit_squares, count = sum_over_shards(torch.from_numpy(totals), parameter).tolist()
    return squares / count, unit_squares / count


def _sample(own: Tensor) -> Any:
    """Entries of a weight at equal distances."""
    # The steps are along every axis. A flattened weight would be copied if it is not contiguous.
    step = max(1, int((own.numel() / SAMPLE) ** (1 / max(1, own.ndim))))
    return numpy_of(own[(slice(None, None, step),) * own.ndim])


def sum_over_shards(numbers: Tensor, parameter: Tensor) -> Tensor:
    """The sum of ``numbers`` over the processes that have different parts of a parameter, on the CPU."""
    distributed: Any = parameter
    for axis, placement in enumerate(getattr(parameter, "placements", ())):
        if not placement.is_replicate():
            # NCCL adds only what is on its device.
            numbers = numbers.to(distributed.to_local().device)
            torch.distributed.all_reduce(numbers, group=distributed.device_mesh.get_group(axis))
    return numbers.cpu()


def any_process(condition: bool, model: nn.Module) -> bool:
    """Whether the condition holds in one of the processes that share a sharded model; all of them must ask."""
    parameter = next(parameter for parameter in model.parameters() if hasattr(parameter, "full_tensor"))
    return bool(sum_over_shards(torch.tensor([float(condition)]), parameter))


def trains_A(model: "nn.Module | Injection") -> bool:
    """Whether the factors A get gradients: methods that freeze A do so on purpose."""
    inner = model.model if isinstance(model, Injection) else model
    trained = {path.rpartition(".")[2] for path, p in inner.named_parameters() if p.requires_grad}
    # The parameter is called A in our layers, and weight below lora_A in those of PEFT.
    return "A" in trained or any("lora_A" in path for path, p in inner.named_parameters() if p.requires_grad)


def is_sharded(model: "nn.Module | Injection") -> bool:
    """Whether FSDP2 has divided parameters of the model, so that all processes must read a parameter together."""
    inner = model.model if isinstance(model, Injection) else model
    return any(hasattr(parameter, "full_tensor") for parameter in inner.parameters())


def is_writer() -> bool:
    """Whether this process writes logs: the first of several."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())
