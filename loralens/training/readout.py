"""Reads the trained layers of a model out as an `Adapter`."""

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
from loralens.training.initial import Pair, combined_digest
from loralens.training.injection import Injection
from loralens.training.layer import LoRALayer, TransposedLayer
from loralens.training.pissa import difference

PREFIX = "base_model.model."  # of every key in a PEFT file

__all__ = ["RECORD", "numpy_of", "read_injection", "record_of", "settings"]


def read_injection(
    injection: Injection,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> Adapter:
    """The adapter as it stands now: a copy, which goes on training does not change.

    ΔW is relative to the model as it was before the injection, for every method: of PiSSA's it is B A − B₀ A₀, as a
    pair of rank 2r.

    Parameters
    ----------
    injection : Injection
    base_model : str, optional
        What to call the base; by default what a transformers model says that it was loaded from.
    task_type : str, optional
        In PEFT's words, ``CAUSAL_LM``, ``SEQ_CLS`` …: which of its model classes loads the file by itself.
    training : mapping, optional
        More to be recorded about the run, as JSON holds it.

    Returns
    -------
    Adapter
        In the words of PEFT, and written as PEFT's where no other format is asked for. Magnitudes of DoRA have the
        role ``magnitude``, heads the role ``saved``. The metadata has a record, `record_of`, with the method, the seed
        and the digest of A₀.
    """
    extra = dict(_read_magnitudes(injection)) | dict(_read_heads(injection))
    digests = {"A0": combined_digest(injection.digests), "A0_of": dict(injection.digests)}
    record = {**settings(injection), **digests, **(training or {})}
    base = base_model or getattr(getattr(injection.model, "config", None), "_name_or_path", None) or None
    return Adapter(
        modules={name: _read_module(layer, injection) for name, layer in injection.layers.items()},
        extra=extra,
        config=_peft_config(injection, base, task_type),
        metadata={"format": "pt", RECORD: json.dumps(record, sort_keys=True)},
        base_model=base,
    )


def settings(injection: Injection) -> dict[str, Any]:
    """What an injection was asked for, but for the places, as JSON holds it."""
    return {
        "method": injection.method.name,
        "rank": injection.rank,
        "alpha": injection.alpha,
        "dropout": injection.dropout,
        "seed": injection.seed,
        "initialisation": injection.initialisation,
    }


def _read_module(layer: LoRALayer, injection: Injection) -> LowRank:
    pair, scaling = Pair(_full_tensor(layer.B), _full_tensor(layer.A)), injection.scaling
    if layer.B0 is not None and layer.A0 is not None:
        pair = difference(pair, Pair(_full_tensor(layer.B0), _full_tensor(layer.A0)))
        scaling = Scaling(scaling.rule, 2 * injection.alpha, 2 * injection.rank, scaling.origin)
        assert scaling.value == layer.scale
    layout = Layout(layer.kind, kernel=layer.kernel, transposed=isinstance(layer, TransposedLayer))
    return LowRank(numpy_of(pair.B), numpy_of(pair.A), layer.scale, scaling=scaling, layout=layout)


def _read_magnitudes(injection: Injection) -> Iterator[tuple[str, Extra]]:
    for name, layer in injection.layers.items():
        if layer.magnitude is not None:
            m = numpy_of(layer.magnitude)
            if layer.kernel:
                m = m.reshape(1, -1, *(1 for _ in layer.kernel))
            yield f"{PREFIX}{name}.lora_magnitude_vector", Extra("magnitude", name, LazyArray.of(m))


def _read_heads(injection: Injection) -> Iterator[tuple[str, Extra]]:
    for name, head in injection.heads.items():
        for own, tensor in head.state_dict().items():
            inner, _, parameter = f"{name}.{own}".rpartition(".")
            yield f"{PREFIX}{name}.{own}", Extra("saved", inner, LazyArray.of(numpy_of(tensor)), parameter)


def _peft_config(injection: Injection, base: str | None, task_type: str | None) -> dict[str, Any]:
    """The part of PEFT's configuration that tensors do not say; ranks, α and targets are the writer's."""
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layer, TransposedLayer) for layer in injection.layers.values()),
        "inference_mode": True,
        "lora_dropout": injection.dropout,
        "modules_to_save": list(injection.heads) or None,
        "use_dora": injection.method.magnitude,
        "use_rslora": injection.method.rule == "alpha/sqrt(r)",
    }


def _full_tensor(tensor: Tensor) -> Tensor:
    """A tensor without its gradient; where it is in shards, put together, which all processes must do at once."""
    gather = getattr(tensor, "full_tensor", None)
    gathered: Tensor = (gather() if gather else tensor).detach()
    return gathered


def numpy_of(tensor: Tensor) -> Array:
    """A copy of a tensor as NumPy has it, in its own dtype."""
    copy = _full_tensor(tensor).cpu().clone().contiguous()
    if copy.dtype == torch.bfloat16:
        bits: Array = copy.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: Array = copy.numpy()
    return array
