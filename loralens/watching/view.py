"""`live`: a view of the adapter of a model in memory, whose numbers are those of the moment at which they are read."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import prod, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loralens.core.adapter import Adapter
from loralens.core.attached import Tree, plain_path, unwrap
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank, Scaling
from loralens.core.names import nearest, without_wrappers
from loralens.core.structured import Update
from loralens.core.tensors import lazy_tensor, numpy_of
from loralens.core.together import sum_adapters
from loralens.errors import MismatchError, OptionError
from loralens.exports import checks_keywords
from loralens.formats import check_peft_type, plain_value
from loralens.formats.dialects.peft.config import PREFIX
from loralens.formats.dialects.peft.reader import read
from loralens.formats.files.container import Stored
from loralens.linalg.rounding import ulp
from loralens.requirements import missing_packages
from loralens.training.injection import Injection
from loralens.training.readout import view_injection
from loralens.watching.snapshots import WeightSize

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
        # Entries at equal distances along every axis: a flattened weight would be copied if it is not contiguous.
        step = max(1, int((own.numel() / SAMPLE) ** (1 / max(1, own.ndim))))
        entries = numpy_of(own[(slice(None, None, step),) * own.ndim])
        units = ulp(entries, entries.dtype) if parameter.dtype in NARROW else np.zeros(1)
        means = [float(np.square(numbers.astype(np.float64)).mean()) for numbers in (entries, units)]
        # Parts may differ in size.
        totals = own.numel() * np.array([*means, 1.0])
    squares, unit_squares, count = sum_over_shards(torch.from_numpy(totals), parameter).tolist()
    return squares / count, unit_squares / count


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
    trained = (path for path, parameter in inner.named_parameters() if parameter.requires_grad)
    # The parameter is called A in our layers, and weight below lora_A in those of PEFT.
    return any(path.endswith(".A") or "lora_A" in path for path in trained)


def is_sharded(model: "nn.Module | Injection") -> bool:
    """Whether FSDP2 has divided parameters of the model, so that all processes must read a parameter together."""
    inner = model.model if isinstance(model, Injection) else model
    return any(hasattr(parameter, "full_tensor") for parameter in inner.parameters())


@checks_keywords
def live(model: "nn.Module | Injection", adapter: str | None = None) -> Adapter:
    """The adapter of a model in memory, as a view: every analysis takes it, and `loralens.save` writes it.

    Its factors are read anew whenever they are asked for, and are copied to the CPU one module at a time. So the
    numbers are always the current ones, and a view takes no memory. Names, ranks and scales are those at the time of
    this call.

    Parameters
    ----------
    model : nn.Module or Injection
        A model of PEFT (or of transformers and diffusers with ``add_adapter``), or an injection of
        `loralens.training`. The model may be inside others: DDP, a LightningModule, what ``accelerator.prepare`` or
        ``torch.compile`` returns. If it is sharded by FSDP2, each factor is gathered when it is read, and all
        processes must read the same factors in the same order. Analyses read in threads, so give them
        ``live(model).load()``, which all processes call.
    adapter : str, optional
        The name of one of PEFT's adapters. By default the active one; if several are active, their sum, which is what
        the model computes.

    Returns
    -------
    Adapter
        As it would be read from the file that PEFT saves, except that a scale that was set in the layers counts
        (``set_scale``), and that an embedding is not saved in full beside its pair.

    Raises
    ------
    OptionError
        The model has no adapter, or none of that name; its parameters are divided by DeepSpeed.
    FormatError
        The adapter is of a type whose update is not a sum, such as IA³ or prompt tuning.
    """
    if isinstance(model, Injection):
        return _named(view_injection(model), model.model)
    if not isinstance(model, nn.Module):
        raise OptionError(f"{type(model).__name__} is not a model", fix="give a torch module with an adapter")
    wrapped = peft_model(model)
    if wrapped is None:
        fix = "give a model that PEFT adapted, or the Injection of loralens.training.inject"
        raise OptionError("the model has no adapter of PEFT", fix=fix)
    names = [adapter] if adapter is not None else active_adapters(wrapped)
    views = [_peft_view(wrapped, name) for name in names]
    return _named(views[0] if len(views) == 1 else sum_adapters([(view, 1.0) for view in views]), model, *names)


def _named(adapter: Adapter, model: nn.Module, *names: str) -> Adapter:
    """The adapter with its source: the class of the model, the base, and the names of PEFT's adapters."""
    of = f" of {adapter.base_model}" if adapter.base_model else ""
    # PEFT's own name for an adapter that was not given one says nothing.
    called = " + ".join(names) if names and names != ("default",) else ""
    return replace(adapter, source=f"in memory: {type(model).__name__}{of}" + (f" ({called})" if called else ""))


def live_gradients(model: "nn.Module | Injection", adapter: str | None = None) -> Adapter:
    """The gradients of the factors as the factors of a view; those of parameters without one are 0."""
    if isinstance(model, Injection):
        pairs = {
            name: LowRank(
                lazy_tensor(partial(_gradient_of, layer, "B")), lazy_tensor(partial(_gradient_of, layer, "A"))
            )
            for name, layer in model.layers.items()
        }
        return Adapter(modules=pairs)
    name = one_active(peft_model(model)) if adapter is None else adapter
    return _peft_view(peft_model(model), name, gradients=True)


def _gradient_of(module: "nn.Module", own: str) -> Tensor:
    """The gradient of a parameter; 0 if it has none."""
    parameter: Tensor = getattr(module, own)
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def active_adapters(model: "nn.Module") -> list[str]:
    """The names of the active adapters of a model of PEFT.

    Raises
    ------
    OptionError
        None is active.
    """
    # In every kind of model the layers know what is active. The method of transformers refuses older releases of PEFT.
    layer: Any = next((module for module in model.modules() if hasattr(module, "adapter_layer_names")), model)
    active = getattr(layer, "active_adapters", None) or getattr(layer, "active_adapter", None)
    names = [active] if isinstance(active, str) else list(active or ())
    if not names:
        raise OptionError("no adapter of the model is active", fix="name one: live(model, adapter='default')")
    return names


def one_active(model: "nn.Module") -> str:
    """The name of the only active adapter.

    Raises
    ------
    OptionError
        Several are active, whose factors and gradients are not those of their sum.
    """
    names = active_adapters(model)
    if len(names) > 1:
        raise OptionError(f"{len(names)} adapters are active: {', '.join(names)}", fix="name one: adapter=…")
    return names[0]


def peft_model(model: "nn.Module") -> Any:
    """The outermost module in a model that has adapters of PEFT; None if there is none."""
    holders = [(path, module) for path, module in model.named_modules() if hasattr(module, "peft_config")]
    if not holders:
        return None
    first, holder = holders[0]
    # PEFT's inner modules know the configuration too. A holder elsewhere is another model, such as a reference.
    elsewhere = [path for path, _ in holders[1:] if first and not path.startswith(f"{first}.")]
    if elsewhere:
        raise OptionError(f"there are models with adapters at {first} and at {elsewhere[0]}", fix="give one of the two")
    return holder


def _peft_view(model: Any, name: str, *, gradients: bool = False) -> Adapter:
    """One adapter of a model of PEFT, read as its file would be; or the gradients in the place of the factors."""
    if name not in model.peft_config:
        raise OptionError(
            f"no adapter is called {name!r}", fix=f"the nearest names are {nearest(name, model.peft_config)}"
        )
    config = _file_config(model, name)
    check_peft_type(config)
    tensors = {_file_key(key): tensor for key, tensor in _peft_tensors(model, name, gradients=gradients)}
    view = read(Stored(tensors, {"format": "pt"}, config))
    # A writer prefers the stored tensors of a pair, and those of a view change even after its factors were loaded.
    view = view.map(lambda module: module.without_origin() if isinstance(module, LowRank) else module)
    return _with_layer_scales(view, model, name)


def _file_config(model: Any, name: str) -> dict[str, Any]:
    """The configuration as PEFT writes it beside the file of an adapter."""
    config = model.peft_config[name]
    base = getattr(model, "get_base_model", lambda: model)()
    fields: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=plain_value))
    path = config.base_model_name_or_path or getattr(getattr(base, "config", None), "_name_or_path", None)
    return {**fields, "base_model_name_or_path": path or None, "inference_mode": True}


def _peft_tensors(model: Any, name: str, *, gradients: bool) -> Iterator[tuple[str, LazyArray]]:
    """The tensors of one adapter, or their gradients, by the keys in PEFT's file."""
    try:
        from peft import get_peft_model_state_dict
    except ImportError as error:  # pragma: no cover - whoever has a model of PEFT has PEFT
        raise missing_packages("a model of PEFT", ("peft",), error) from error

    def state() -> dict[str, Tensor]:
        # keep_vars gives the parameters themselves, which tells from where each tensor comes.
        own = model.state_dict(keep_vars=True)
        # "auto" may ask the Hub whether the vocabulary was resized.
        tensors: dict[str, Tensor] = get_peft_model_state_dict(
            model, state_dict=own, adapter_name=name, save_embedding_layers=False
        )
        return tensors

    places = {id(tensor): path for path, tensor in model.state_dict(keep_vars=True).items()}
    for key, tensor in state().items():
        if getattr(tensor, "ds_id", None) is not None:
            raise OptionError(
                "the parameters are divided by DeepSpeed (ZeRO-3)",
                fix="read them within deepspeed.zero.GatheredParameters, or save a checkpoint and load it",
            )
        path = places.get(id(tensor))
        # PEFT computes a few tensors when it saves them, such as the ranks that AdaLoRA keeps.
        yield key, lazy_tensor(partial(_at, model, path, gradients) if path else partial(lambda key: state()[key], key))


def _at(model: "nn.Module", path: str, gradient: bool = False) -> Tensor:
    """The parameter or buffer at a path, looked up anew, since moving a model may replace its parameters."""
    *names, own = path.split(".")
    module = model
    for name in names:
        # As `get_submodule` does it, in a tenth of the time: a merge reads two factors of every layer.
        module = module._modules[name]  # type: ignore[assignment]
    tensor: Tensor = _gradient_of(module, own) if gradient else getattr(module, own)
    return tensor


def _file_key(key: str) -> str:
    """The key in a file of PEFT: with its prefix, which the names in a model with ``add_adapter`` lack."""
    key = without_wrappers(key)
    return key if key.startswith(PREFIX) else PREFIX + key


def _with_layer_scales(adapter: Adapter, model: "nn.Module", name: str) -> Adapter:
    """The adapter with the scales of the layers, which may have been set after the configuration was made."""
    scales: dict[str, float] = {}
    for path, layer in model.named_modules():
        layer_scales = getattr(layer, "scaling", None)
        # Attention has a number of this name.
        if isinstance(layer_scales, dict) and name in layer_scales:
            # A wrapper of a parameter, such as a stack of experts, says which one it is.
            parameter = getattr(layer, "parameter_name", "")
            own = f"{plain_path(path)}.{parameter}".removesuffix(".").removeprefix(PREFIX)
            scales[own] = float(layer_scales[name])
    modules: dict[str, Update] = {}
    for own, module in adapter.items():
        # An expert has the scale of its stack.
        scale = scales.get(own, scales.get(own.partition("[")[0]))
        # PEFT adds the update of an attention's out_proj twice.
        if scale is not None and scale * (1 + module.scaling.twice) != module.scale:
            scaling = Scaling("given", origin="the scale of the layer")
            scaling = scaling.doubled() if module.scaling.twice else scaling
            module = module.rescaled(scale * (1 + module.scaling.twice), scaling)
        modules[own] = module
    return replace(adapter, modules=modules)
