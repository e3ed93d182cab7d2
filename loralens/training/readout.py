"""Reads the trained layers of a model as an `Adapter`."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import torch
from torch import Tensor

from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import Layout, LowRank
from loralens.core.scaling import Scaling
from loralens.core.training import RECORD, record_of
from loralens.training.injection import Injection
from loralens.training.layers.experts import ExpertLayer, is_transposed
from loralens.training.layers.initial import Pair, combined_digest
from loralens.training.layers.layer import LoRALayer, TransposedLayer
from loralens.training.layers.pissa import difference

PREFIX = "base_model.model."  # of every key in a PEFT file: the names of its wrappers around the model

__all__ = ["RECORD", "full_tensor", "numpy_of", "read_injection", "record_of", "settings"]


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
    extra = dict(_read_magnitudes(injection)) | dict(_read_heads(injection))
    digests = {"A0": combined_digest(injection.digests), "A0_of": dict(injection.digests)}
    record = {**settings(injection), "weights": injection.weights, **digests, **(training or {})}
    base = base_model or getattr(getattr(injection.model, "config", None), "_name_or_path", None) or None
    return Adapter(
        modules=dict(_read_modules(injection)),
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
        # Only where there is one, so that the record of an ordinary run stays short.
        **({"rank_pattern": dict(injection.rank_pattern)} if injection.rank_pattern else {}),
    }


def _read_modules(injection: Injection) -> Iterator[tuple[str, LowRank]]:
    """The modules by name; a stack of experts is one module for each expert."""
    for name, layer in injection.layers.items():
        if not isinstance(layer, ExpertLayer):
            yield name, _read_module(layer, injection)
            continue
        layout, scaling = Layout(layer.kind, transposed=is_transposed(layer)), injection.scaling(layer)
        B, A = numpy_of(layer.B), numpy_of(layer.A)
        for e in range(len(A)):
            yield f"{name}[{e}]", LowRank(B[e], A[e], layer.scale, scaling=scaling, layout=layout)


def _read_module(layer: LoRALayer, injection: Injection) -> LowRank:
    pair, scaling = Pair(full_tensor(layer.B), full_tensor(layer.A)), injection.scaling(layer)
    if layer.B0 is not None and layer.A0 is not None:
        pair = difference(pair, Pair(full_tensor(layer.B0), full_tensor(layer.A0)))
        # The rank doubles, so α doubles too, and the scale α/r stays.
        scaling = Scaling(scaling.formula, 2 * injection.alpha, 2 * layer.rank, scaling.origin)
        assert scaling.value == layer.scale
    # Factors are stored 2-D whatever the layer; the writer needs its kind and kernel to restore the shape.
    layout = Layout(layer.kind, kernel=layer.kernel, transposed=isinstance(layer, TransposedLayer))
    return LowRank(numpy_of(pair.B), numpy_of(pair.A), layer.scale, scaling=scaling, layout=layout)


def _read_magnitudes(injection: Injection) -> Iterator[tuple[str, Extra]]:
    for name, layer in injection.layers.items():
        if layer.magnitude is not None:
            m = numpy_of(layer.magnitude)
            # PEFT stores the magnitude of a convolution in the shape in which it multiplies the output.
            if layer.kernel:
                m = m.reshape(1, -1, *(1 for _ in layer.kernel))
            yield f"{PREFIX}{name}.lora_magnitude_vector", Extra("magnitude", name, LazyArray.of(m))


def _read_heads(injection: Injection) -> Iterator[tuple[str, Extra]]:
    for name, head in injection.heads.items():
        for own, tensor in head.state_dict().items():
            inner, _, parameter = f"{name}.{own}".rpartition(".")
            yield f"{PREFIX}{name}.{own}", Extra("saved", inner, LazyArray.of(numpy_of(tensor)), parameter)


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
