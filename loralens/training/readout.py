"""Reads the trained layers of a model as an `Adapter`."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import ml_dtypes
import torch
from torch import Tensor, nn

from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import Layout, LowRank
from loralens.core.scaling import Scaling
from loralens.core.training import RECORD, record_of
from loralens.training.initialisation import Pair, combined_digest, difference
from loralens.training.injection import Injection
from loralens.training.layers.experts import ExpertLayer, is_transposed
from loralens.training.layers.layer import LoRALayer, TransposedLayer

PREFIX = "base_model.model."  # of every key in a PEFT file: the names of its wrappers around the model

__all__ = ["RECORD", "full_tensor", "numpy_of", "read_injection", "record_of", "settings", "view_injection"]


def read_injection(
    injection: Injection,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> Adapter:
    """The adapter at this moment, as a copy that further training does not change.

    For every method ΔW is relative to the model before the injection. For PiSSA it is B A − B₀ A₀, as a pair of rank
    2r. If the model is sharded, all processes must call this at the same time.

    Parameters
    ----------
    injection : Injection
    base_model : str, optional
        The name of the base; by default the path or id from which a transformers model was loaded.
    task_type : str, optional
        PEFT's name of the task, such as ``CAUSAL_LM`` or ``SEQ_CLS``, from which PEFT chooses the class that loads the
        file.
    training : mapping, optional
        Further values for the record of the run, as JSON holds them.

    Returns
    -------
    Adapter
        With the names of PEFT, which is also the dialect in which it is written by default. The magnitudes of DoRA have
        the role ``magnitude``, heads the role ``saved``. The metadata contains a record of the method, the seed and the
        digest of A₀, which `record_of` reads.
    """
    view = view_injection(injection, base_model=base_model, task_type=task_type, training=training)
    extra = {key: replace(item, tensor=LazyArray.of(item.tensor.read())) for key, item in view.extra.items()}
    return replace(view.load(), extra=extra)


def view_injection(
    injection: Injection,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> Adapter:
    """The adapter of `read_injection` as a view: its numbers are those of the moment at which they are read."""
    extra = dict(view_magnitudes(injection.layers)) | dict(_view_heads(injection))
    digests = {"A0": combined_digest(injection.digests), "A0_of": dict(injection.digests)}
    record = {**settings(injection), "weights": injection.weights, **digests, **(training or {})}
    base = base_model or getattr(getattr(injection.model, "config", None), "_name_or_path", None) or None
    return Adapter(
        modules=dict(_view_modules(injection)),
        extra=extra,
        config=_peft_config(injection, base, task_type),
        # transformers refuses a safetensors file without the format. Sorted keys give equal runs equal bytes.
        metadata={"format": "pt", RECORD: json.dumps(record, sort_keys=True)},
        base_model=base,
    )


def settings(injection: Injection) -> dict[str, Any]:
    """The arguments of an injection except for its targets and heads, as JSON holds them."""
    return {
        "method": injection.method.name,
        "rank": injection.rank,
        "alpha": injection.alpha,
        "dropout": injection.dropout,
        "seed": injection.seed,
        "initialisation": injection.initialisation,
        # It is left out if it is empty, so that the record of an ordinary run stays short.
        **({"rank_pattern": dict(injection.rank_pattern)} if injection.rank_pattern else {}),
    }


def _view_modules(injection: Injection) -> Iterator[tuple[str, LowRank]]:
    """The modules by name; a stack of experts is one module for each expert."""
    for name, layer in injection.layers.items():
        scaling = injection.scaling(layer)
        if not isinstance(layer, ExpertLayer):
            yield name, view_layer(layer, scaling)
            continue
        layout = Layout(layer.kind, transposed=is_transposed(layer))
        for e in range(len(layer.A)):
            B, A = lazy_tensor(partial(_factor, layer, "B", e)), lazy_tensor(partial(_factor, layer, "A", e))
            yield f"{name}[{e}]", LowRank(B, A, layer.scale, scaling=scaling, layout=layout)


def _factor(layer: ExpertLayer, side: Literal["A", "B"], expert: int) -> Tensor:
    """The factor of one expert of a stack."""
    factors: Tensor = getattr(layer, side)
    return factors[expert]


def view_layer(layer: LoRALayer, scaling: Scaling) -> LowRank:
    """The update of a layer as a view: its factors are copied to the CPU each time they are read.

    ``scaling`` is that of the pair. For PiSSA the view is B A − B₀ A₀, a pair of rank 2r. If the model is sharded, all
    processes must read a factor at the same time.
    """
    B, A = lazy_tensor(lambda: layer.B), lazy_tensor(lambda: layer.A)
    if layer.B0 is not None:
        B, A = lazy_tensor(lambda: _difference(layer).B), lazy_tensor(lambda: _difference(layer).A)
        # The rank doubles, so α doubles too, and the scale α/r stays.
        if scaling.alpha is not None and scaling.rank is not None:
            scaling = Scaling(scaling.formula, 2 * scaling.alpha, 2 * scaling.rank, scaling.origin)
            assert scaling.value == layer.scale
    # Factors are stored 2-D whatever the layer; the writer needs its kind and kernel to restore the shape.
    layout = Layout(layer.kind, kernel=layer.kernel, transposed=isinstance(layer, TransposedLayer))
    return LowRank(B, A, layer.scale, scaling=scaling, layout=layout)


def lazy_tensor(read: Callable[[], Tensor]) -> LazyArray:
    """The tensor that ``read`` returns, which is copied to the CPU each time that the array is read."""
    tensor = read()
    dtype = numpy_of(torch.empty(0, dtype=tensor.dtype)).dtype
    return LazyArray(lambda: numpy_of(read()), shape=tuple(tensor.shape), dtype=dtype)


def _difference(layer: LoRALayer) -> Pair:
    assert layer.B0 is not None
    assert layer.A0 is not None
    trained, start = (
        Pair(full_tensor(layer.B), full_tensor(layer.A)),
        Pair(full_tensor(layer.B0), full_tensor(layer.A0)),
    )
    return difference(trained, start)


def view_magnitudes(layers: Mapping[str, LoRALayer]) -> Iterator[tuple[str, Extra]]:
    """The magnitudes of DoRA as views, with their keys in a PEFT file."""
    for name, layer in layers.items():
        if layer.magnitude is not None:
            m = lazy_tensor(partial(_magnitude, layer))
            # PEFT stores the magnitude of a convolution in the shape in which it multiplies the output.
            if layer.kernel:
                m = m.reshape(1, m.size, *(1 for _ in layer.kernel))
            yield f"{PREFIX}{name}.lora_magnitude_vector", Extra("magnitude", name, m)


def _magnitude(layer: LoRALayer) -> Tensor:
    assert layer.magnitude is not None
    return layer.magnitude


def _view_heads(injection: Injection) -> Iterator[tuple[str, Extra]]:
    for name, head in injection.heads.items():
        for own in head.state_dict():
            inner, _, parameter = f"{name}.{own}".rpartition(".")
            tensor = lazy_tensor(partial(_entry, head, own))
            yield f"{PREFIX}{name}.{own}", Extra("saved", inner, tensor, parameter)


def _entry(module: nn.Module, key: str) -> Tensor:
    tensor: Tensor = module.state_dict()[key]
    return tensor


def _peft_config(injection: Injection, base: str | None, task_type: str | None) -> dict[str, Any]:
    """The part of PEFT's configuration that does not follow from tensors; the writer adds ranks, α and targets."""
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layer, TransposedLayer) for layer in injection.layers.values()),
        "inference_mode": True,  # PEFT loads the adapter frozen, as it does its own files
        "lora_dropout": injection.dropout,
        "modules_to_save": list(injection.heads) or None,
        "use_dora": injection.method.magnitude,
        "use_rslora": injection.method.formula == "alpha/sqrt(r)",
    }


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor without its gradient, gathered if it is sharded, which all processes must do at the same time."""
    gather = getattr(tensor, "full_tensor", None)
    gathered: Tensor = (gather() if gather else tensor).detach()
    return gathered


def numpy_of(tensor: Tensor) -> Array:
    """A copy of a tensor as a NumPy array of the same dtype."""
    copy = full_tensor(tensor).cpu().clone().contiguous()
    # torch has no NumPy dtype for bfloat16, so that its bits are passed on as int16.
    if copy.dtype == torch.bfloat16:
        bits: Array = copy.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: Array = copy.numpy()
    return array
