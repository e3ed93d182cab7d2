"""Starts a training with the factors, magnitudes and heads of an adapter, or with its A alone."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.names import some
from loralens.core.scaling import Scaling
from loralens.errors import MismatchError, OptionError
from loralens.training.initialisation import factor_digest
from loralens.training.injection import Injection
from loralens.training.layers.experts import ExpertLayer
from loralens.training.layers.layer import LoRALayer
from loralens.training.method import TrainingMethod

SAVED, MAGNITUDE = "saved", "magnitude"  # roles of extras that a run can start with


class StartOptions(NamedTuple):
    """The arguments of an injection that has the modules, the ranks and the scale of an adapter."""

    targets: list[str]
    rank: int
    rank_pattern: dict[str, int]
    alpha: float


def start_options(adapter: Adapter, *, method: TrainingMethod) -> StartOptions:
    """The arguments with which an injection can start with an adapter.

    Raises
    ------
    OptionError
        The adapter has no modules, modules that are not pairs, or content that a training has no place for.
    """
    formula = method.formula
    _check_content(adapter, magnitude=method.magnitude)
    ranks: dict[str, int] = {}
    alphas: Counter[float] = Counter()
    for name, module in adapter.items():
        assert isinstance(module, LowRank)
        scaling = module.scaling or Scaling()
        # All experts of a stack have one layer.
        ranks[name.rpartition("[")[0] or name] = module.rank
        alphas[scaling.alpha_for(module.scale, module.rank, formula)] += 1
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    alpha = alphas.most_common(1)[0][0]
    # Training needs a positive scale. Any other scale is multiplied into B.
    return StartOptions(list(ranks), rank, {n: r for n, r in ranks.items() if r != rank}, alpha if alpha > 0 else 1.0)


def _check_content(adapter: Adapter, *, magnitude: bool) -> None:
    if not len(adapter):
        raise OptionError("the adapter to start from has no modules", fix="give one that was trained")
    other = [name for name, module in adapter.items() if not isinstance(module, LowRank)]
    if other:
        what = f"{other[0]} of the adapter to start from is no pair of factors"
        raise OptionError(what, fix="give a plain LoRA adapter, such as one that loralens convert has written")
    if magnitude != any(extra.role == MAGNITUDE for extra in adapter.extra.values()):
        has = "has no magnitudes, which dora trains" if magnitude else "has magnitudes, which only dora trains"
        raise OptionError(f"the adapter to start from {has}", fix="give the --method with which it was trained")
    strange = [key for key, extra in adapter.extra.items() if extra.role not in (SAVED, MAGNITUDE)]
    if strange:
        raise OptionError(
            f"the adapter to start from holds what is not trained here: {some(strange)}",
            fix="start from an adapter of factors, magnitudes and heads alone",
        )


@torch.no_grad()
def start_from(injection: Injection, adapter: Adapter) -> Injection:
    """Copy the factors, magnitudes and heads of an adapter into an injection; returns it with the new digests.

    The scales may differ: B is multiplied by their ratio, so that ΔW is that of the adapter.

    Raises
    ------
    MismatchError
        The adapter has other modules, other heads or other shapes than the injection.
    OptionError
        The method starts with other factors.
    """
    if injection.method.subtracted:
        what = f"{injection.method.start} starts with factors of its own, and not with an adapter"
        raise OptionError(what, fix="continue as plain LoRA: method lora")
    digests: dict[str, str] = {}
    started: set[str] = set()
    for name, layer in injection.layers.items():
        count = len(layer.A) if isinstance(layer, ExpertLayer) else 0
        names = [f"{name}[{e}]" for e in range(count)] or [name]
        modules = [_module_of(adapter, each) for each in names]
        started.update(names)
        pairs = [(module.scale / layer.scale * module.B.astype(np.float64), module.A) for module in modules]
        B, A = (np.stack([pair[side] for pair in pairs]) if count else pairs[0][side] for side in (0, 1))
        _copy(layer.B, B, name)
        _copy(layer.A, A, name)
        digests |= {each: factor_digest(layer.A[e] if count else layer.A) for e, each in enumerate(names)}
        _copy_magnitude(layer, adapter, name)
    if unknown := sorted(set(adapter) - started):
        raise MismatchError(f"the run does not adapt {some(unknown)} of the adapter", fix="adapt the same modules")
    _copy_heads(injection, adapter)
    return replace(injection, digests=digests, initialisation="adapter")


@torch.no_grad()
def start_with_a(injection: Injection, adapter: Adapter) -> Injection:
    """Copy the A of every module of an adapter into an injection, whose B stays 0; returns it with the new digests.

    For an embedding it is B that is copied, since its A is 0 at the start.

    Raises
    ------
    MismatchError
        The adapter has no pair for a module of the injection, or one of another rank or shape.
    OptionError
        The method starts with other factors.
    """
    if injection.method.subtracted:
        what = f"{injection.method.start} starts with an A of its own, and not with that of an adapter"
        raise OptionError(what, fix="choose the start kaiming or gaussian")
    digests: dict[str, str] = {}
    for name, layer in injection.layers.items():
        side = "B" if layer.kind == "embedding" else "A"
        count = len(layer.A) if isinstance(layer, ExpertLayer) else 0
        names = [f"{name}[{e}]" for e in range(count)] or [name]
        arrays = [getattr(_module_of(adapter, each), side) for each in names]
        factor: Tensor = getattr(layer, side)
        _copy(factor, np.stack(arrays) if count else arrays[0], name)
        digests |= {each: factor_digest(factor[e] if count else factor) for e, each in enumerate(names)}
    return replace(injection, digests=digests, initialisation="A of an adapter")


def _module_of(adapter: Adapter, name: str) -> LowRank:
    module = adapter.modules.get(name)
    if not isinstance(module, LowRank):
        raise MismatchError(f"the adapter to start from has no pair for {name}", fix="adapt the modules of the adapter")
    return module


def _copy(tensor: Tensor, array: Array, name: str) -> None:
    values = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))
    if values.numel() != tensor.numel():
        shapes = f"{tuple(values.shape)}, where the model needs {tuple(tensor.shape)}"
        raise MismatchError(f"the adapter to start from does not fit: {name} has {shapes}", fix="give another model")
    tensor.copy_(values.reshape(tensor.shape))


def _copy_magnitude(layer: LoRALayer, adapter: Adapter, name: str) -> None:
    if layer.magnitude is None:
        return
    magnitudes = [e for e in adapter.extra.values() if e.role == MAGNITUDE and e.module == name]
    if not magnitudes:
        raise MismatchError(f"the adapter to start from has no magnitude of {name}", fix="give another --method")
    _copy(layer.magnitude, magnitudes[0].tensor.read(), name)


def _copy_heads(injection: Injection, adapter: Adapter) -> None:
    tensors: Mapping[str, Any] = {
        f"{name}.{own}": tensor
        for name, head in injection.heads.items()
        for own, tensor in head.state_dict(keep_vars=True).items()
    }
    for extra in adapter.extra.values():
        if extra.role == SAVED:
            key = f"{extra.module}.{extra.parameter}"
            if key not in tensors:
                what = f"the adapter to start from brings {extra.module} in full, which the run does not train"
                raise MismatchError(what, fix=f"give --heads {extra.module}")
            _copy(tensors[key], extra.tensor.read(), key)
