"""The adapter of an injection: read from its layers, or copied into them to start a run with."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import Array
from loralens.core.lowrank import Layout, LowRank, Scaling, alpha_of
from loralens.core.names import some
from loralens.core.stored import RECORD, record_of
from loralens.core.tensors import full_tensor, lazy_tensor
from loralens.errors import MismatchError, OptionError
from loralens.training.course import TrainingMethod
from loralens.training.initialisation import Pair, combined_digest, factor_digest
from loralens.training.injection import Injection
from loralens.training.layers import LoRALayer, TransposedLayer

PREFIX = "base_model.model."  # of every key in a PEFT file: the names of its wrappers around the model

__all__ = ["RECORD", "read_injection", "record_of", "view_injection"]


def read_injection(
    injection: Injection,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    training: Mapping[str, Any] | None = None,
    view: Adapter | None = None,
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
    view : Adapter, optional
        A view of the adapter, where the layers are those of PEFT.

    Returns
    -------
    Adapter
        With the names of PEFT, which is also the dialect in which it is written by default. The magnitudes of DoRA have
        the role ``magnitude``, heads the role ``saved``. The metadata contains a record of the method, the seed and the
        digest of A₀, which `record_of` reads.
    """
    view = view or view_injection(injection)
    digests = {"A0": combined_digest(injection.digests), "A0_of": dict(injection.digests)}
    record = {**injection.settings, "weights": injection.weights, **digests, **(training or {})}
    base = base_model or view.base_model
    return replace(
        view.load(),
        config={**(view.config or {}), "base_model_name_or_path": base, "task_type": task_type},
        # transformers refuses a safetensors file without the format. Sorted keys give equal runs equal bytes.
        metadata={"format": "pt", RECORD: json.dumps(record, sort_keys=True)},
        base_model=base,
    )


def view_injection(injection: Injection) -> Adapter:
    """The adapter of `read_injection` as a view: its numbers are those of the moment at which they are read."""
    base = getattr(getattr(injection.model, "config", None), "_name_or_path", None) or None
    return Adapter(
        modules={name: view_layer(layer, injection.scaling(layer)) for name, layer in injection.layers.items()},
        extra=dict(view_magnitudes(injection.layers)) | dict(_view_heads(injection)),
        config=_peft_config(injection, base),
        metadata={"format": "pt"},
        base_model=base,
    )


def view_layer(layer: LoRALayer, scaling: Scaling) -> LowRank:
    """The update of a layer as a view: its factors are copied to the CPU each time they are read.

    ``scaling`` is that of the pair. For PiSSA the view is B A − B₀ A₀, a pair of rank 2r. If the model is sharded, all
    processes must read a factor at the same time.
    """
    B, A = lazy_tensor(lambda: layer.B), lazy_tensor(lambda: layer.A)
    if layer.B0 is not None:
        B, A = lazy_tensor(lambda: _difference(layer).B), lazy_tensor(lambda: _difference(layer).A)
        # The rank doubles and the scale stays, so α is multiplied by 2, or by √2 for rsLoRA.
        if scaling.alpha is not None and scaling.rank is not None:
            rank, plain = 2 * scaling.rank, scaling.formula != "alpha/sqrt(r)"
            alpha = 2 * scaling.alpha if plain else alpha_of(layer.scale, rank, scaling.formula)
            scaling = Scaling(scaling.formula, alpha, rank, scaling.origin)
    # Factors are stored 2-D whatever the layer; the writer needs its kind and kernel to restore the shape.
    layout = Layout(layer.kind, kernel=layer.kernel, transposed=isinstance(layer, TransposedLayer))
    return LowRank(B, A, layer.scale, scaling=scaling, layout=layout)


def _difference(layer: LoRALayer) -> Pair:
    """B A − B₀ A₀ as one pair of rank 2r: [B, −B₀] and [A; A₀], the same numbers without rounding."""
    assert layer.B0 is not None
    assert layer.A0 is not None
    B, B0, A, A0 = map(full_tensor, (layer.B, layer.B0, layer.A, layer.A0))
    return Pair(torch.cat([B, -B0], dim=1), torch.cat([A, A0]))


def view_magnitudes(layers: Mapping[str, LoRALayer]) -> Iterator[tuple[str, Extra]]:
    """The magnitudes of DoRA as views, with their keys in a PEFT file."""
    for name, layer in layers.items():
        if layer.magnitude is not None:
            m = lazy_tensor(partial(getattr, layer, "magnitude"))
            # PEFT stores the magnitude of a convolution in the shape in which it multiplies the output.
            if layer.kernel:
                m = m.reshape(1, m.size, *(1 for _ in layer.kernel))
            yield f"{PREFIX}{name}.lora_magnitude_vector", Extra("magnitude", name, m)


def _view_heads(injection: Injection) -> Iterator[tuple[str, Extra]]:
    for name, head in injection.heads.items():
        for own in head.state_dict():
            inner, _, parameter = f"{name}.{own}".rpartition(".")
            tensor = lazy_tensor(partial(lambda head, own: head.state_dict()[own], head, own))
            yield f"{PREFIX}{name}.{own}", Extra("saved", inner, tensor, parameter)


def _peft_config(injection: Injection, base: str | None) -> dict[str, Any]:
    """The part of PEFT's configuration that does not follow from tensors; the writer adds ranks, α and targets."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layer, TransposedLayer) for layer in injection.layers.values()),
        "inference_mode": True,  # PEFT loads the adapter frozen, as it does its own files
        "lora_dropout": injection.dropout,
        "modules_to_save": list(injection.heads) or None,
        "use_dora": injection.method.magnitude,
        "use_rslora": injection.method.formula == "alpha/sqrt(r)",
    }


SAVED, MAGNITUDE = "saved", "magnitude"  # roles of extras that a run can start with


def start_options(adapter: Adapter, *, method: TrainingMethod) -> dict[str, Any]:
    """The targets, ranks and α with which an injection can start with an adapter.

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
        ranks[name] = module.rank
        alphas[scaling.alpha_for(module.scale, module.rank, formula)] += 1
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    alpha = alphas.most_common(1)[0][0]
    pattern = {name: own for name, own in ranks.items() if own != rank}
    # Training needs a positive scale. Any other scale is multiplied into B.
    return {"targets": list(ranks), "rank": rank, "rank_pattern": pattern, "alpha": alpha if alpha > 0 else 1.0}


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
    _check_drawn(injection)
    digests: dict[str, str] = {}
    for name, layer in injection.layers.items():
        module = module_of(adapter, name)
        copy_numbers(layer.B, module.scale / layer.scale * module.B.astype(np.float64), name)
        copy_numbers(layer.A, module.A, name)
        digests[name] = factor_digest(layer.A)
        _copy_magnitude(layer, adapter, name)
    if unknown := sorted(set(adapter) - set(injection.layers)):
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
    _check_drawn(injection)
    digests: dict[str, str] = {}
    for name, layer in injection.layers.items():
        side = "B" if layer.kind == "embedding" else "A"
        copy_numbers(getattr(layer, side), getattr(module_of(adapter, name), side), name)
        digests[name] = factor_digest(getattr(layer, side))
    return replace(injection, digests=digests, initialisation="A of an adapter")


def _check_drawn(injection: Injection) -> None:
    if injection.method.subtracted:
        what = f"{injection.method.start} starts with factors of its own, and not with those of an adapter"
        raise OptionError(what, fix="choose the start kaiming or gaussian, or the method lora")


def module_of(adapter: Adapter, name: str) -> LowRank:
    """The pair of a layer in an adapter to start from."""
    module = adapter.modules.get(name)
    if not isinstance(module, LowRank):
        raise MismatchError(f"the adapter to start from has no pair for {name}", fix="adapt the modules of the adapter")
    return module


def copy_numbers(tensor: Tensor, array: Array, name: str) -> None:
    """Copy an array of an adapter to start from into a tensor of the layer of that name."""
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
    copy_numbers(layer.magnitude, magnitudes[0].tensor.read(), name)


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
            copy_numbers(tensors[key], extra.tensor.read(), key)
