"""Chooses the layers that are adapted, by glob or as "all-linear", and the class of LoRA layer for each."""

import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from loralens.core.names import natural_key
from loralens.core.naming.selection import select
from loralens.errors import OptionError
from loralens.training.layers.conv import ConvLayer
from loralens.training.layers.embedding import EmbeddingLayer
from loralens.training.layers.experts import ExpertLayer, expert_stacks
from loralens.training.layers.layer import LinearLayer, LoRALayer, TransposedLayer
from loralens.training.layers.quantised import QuantisedLayer, weight_kind

ALL_LINEAR = "all-linear"

# None of these classes is a subclass of another, so that the order does not matter.
LAYERS: Mapping[type[nn.Module], type[LoRALayer]] = {
    nn.Linear: LinearLayer,
    nn.Conv1d: ConvLayer,
    nn.Conv2d: ConvLayer,
    nn.Conv3d: ConvLayer,
    nn.Embedding: EmbeddingLayer,
}
COMPILED = "_orig_mod"  # the name that torch.compile gives to the module that it wraps
TRANSPOSED = "Conv1D"  # of transformers; recognised by name and shape, so that transformers is not imported


def plain_name(name: str) -> str:
    """The name of a module or parameter without the wrappers of ``torch.compile``."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by their plain names; the name of the model itself is empty."""
    # A wrapper and the module in it have one plain name. The module comes later, so that it stays.
    return {plain_name(name): module for name, module in model.named_modules()}


def choose_layers(
    model: nn.Module,
    targets: str | Sequence[str],
    *,
    heads: Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    no_experts: str = "",
) -> dict[str, type[LoRALayer]]:
    """The names of the layers to adapt, in natural order, each with its class of LoRA layer.

    Parameters
    ----------
    model : nn.Module
    targets : str or sequence of str
        Globs as in `loralens.core.naming.selection`: ``q_proj`` means every layer of that kind. ``all-linear``, alone
        or among globs, means every linear layer except for the output embedding, which maps to the vocabulary. Stacks
        of experts are layers by the names of their parameters, and linear.
    heads : sequence of str
        Modules that are trained in full. ``all-linear`` leaves out the layers in them, and no glob may match one.
    exclude : str or sequence of str
        Globs for modules that are not adapted, and nothing in them is.
    no_experts : str
        Why stacks of experts cannot be adapted, if they cannot: ``all-linear`` leaves them out, and no glob may match
        one.

    Raises
    ------
    OptionError
        A glob is not a string, matches nothing (the message has the nearest names), or matches something that cannot be
        adapted; no layer is left.
    """
    named = with_stacks(modules_by_name(model))
    # The model itself has the empty name; a layer can only be replaced inside a parent.
    fitting: dict[str, type[LoRALayer]] = {
        name: layer_class for name, layer in named.items() if name and (layer_class := layer_class_for(layer, name))
    }
    globs = glob_list(targets, "targets")
    if not globs:
        raise OptionError("no targets are given", fix=f"give globs for module names, or {ALL_LINEAR!r}")
    chosen: set[str] = set()
    if ALL_LINEAR in globs:
        usable = {name: kind for name, kind in fitting.items() if not (no_experts and kind is ExpertLayer)}
        chosen.update(_linear_layers(model, named, usable, heads))
    if other_globs := [glob for glob in globs if glob != ALL_LINEAR]:
        chosen.update(_select_layers(named, fitting, other_globs))
    names = _without(chosen, exclude, named)
    for name in names:
        if no_experts and fitting[name] is ExpertLayer:
            fix = "leave it out, exclude it, or choose another method"
            raise OptionError(f"{name} is a stack of experts, which {no_experts} does not adapt", fix=fix)
    compiled = {id(inner) for module in model.modules() if (inner := module._modules.get(COMPILED)) is not None}
    for name in names:
        if _is_within(name, heads):
            raise OptionError(
                f"{name} cannot be both adapted and trained in full", fix="name it among the targets or the heads only"
            )
        # The wrapper calls the code of the layer itself, and would never call what takes its place.
        if id(named[name]) in compiled:
            raise OptionError(
                f"{name} is compiled by itself, so that no layer can take its place",
                fix="compile the model or its blocks instead, or compile it after the injection",
            )
    return {name: fitting[name] for name in sorted(names, key=natural_key)}


def _linear_layers(
    model: nn.Module, named: Mapping[str, nn.Module], fitting: Mapping[str, type[LoRALayer]], heads: Sequence[str]
) -> list[str]:
    """The names of the linear layers that ``all-linear`` means."""
    # The output embedding is large, and often tied to the input embedding.
    head = output_embedding_of(model)
    names = [
        name
        for name, layer_class in fitting.items()
        if layer_class.kind in ("linear", "experts") and named[name] is not head and not _is_within(name, heads)
    ]
    if not names:
        coded = [layer for layer in named.values() if _has_codes(layer)]
        if coded:
            what = f"the weights of the linear layers are codes ({type(coded[0]).__name__}), which cannot be adapted"
            raise OptionError(what, fix="load the model in 16 or 32 bits, or in NF4 or int8 by bitsandbytes")
        raise OptionError("the model has no linear layer to adapt", fix="name the layers: targets=...")
    return names


def _has_codes(layer: nn.Module) -> bool:
    """Whether a layer is a linear one of a library for quantised models, whose weights are whole numbers."""
    if "linear" not in type(layer).__name__.lower():
        return False
    # Libraries store the codes as parameters or as buffers, and under several names.
    tensors = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    return any(tensor.ndim == 2 and not tensor.is_floating_point() for tensor in tensors)


def excluded_modules(named: Mapping[str, nn.Module], exclude: str | Sequence[str]) -> list[str]:
    """The names that the globs match; none without globs.

    Raises
    ------
    OptionError
        A glob matches nothing, or is not a string.
    """
    globs = glob_list(exclude, "exclude")
    # Among all modules, so that a glob may mean a block or an encoder, and a misspelt one is an error.
    return select([name for name in named if name], globs, prefixes=False) if globs else []


def _without(names: Iterable[str], exclude: str | Sequence[str], named: Mapping[str, nn.Module]) -> list[str]:
    """The names of layers that are neither excluded nor inside an excluded module."""
    excluded = excluded_modules(named, exclude)
    remaining = [name for name in names if not _is_within(name, excluded)]
    if excluded and not remaining:
        raise OptionError("no layer is left to adapt: all targets are excluded", fix="exclude fewer modules")
    return remaining


def choose_heads(model: nn.Module, globs: str | Sequence[str]) -> list[str]:
    """The names of the outermost modules that match the globs, which are trained in full.

    Raises
    ------
    OptionError
        A glob matches nothing, or is not a string; or a parameter of a head is tied to one of a module that is no head.
    """
    globs = glob_list(globs or (), "heads")
    if not globs:
        return []
    matches = select([name for name in modules_by_name(model) if name], globs, prefixes=False)
    tops = [name for name in matches if not any(name.startswith(f"{other}.") for other in matches)]
    # With duplicates, since a tied parameter has a name in both modules.
    everywhere = [(plain_name(name), tensor) for name, tensor in model.named_parameters(remove_duplicate=False)]
    trained = {id(parameter): name for name, parameter in everywhere if _is_within(name, tops)}
    for name, parameter in everywhere:
        if id(parameter) in trained and not _is_within(name, tops):
            raise OptionError(
                f"{trained[id(parameter)]} is tied to {name}, which would be trained with it",
                fix=f"name {name.rpartition('.')[0]} among the heads too, or adapt both",
            )
    return tops


def output_embedding_of(model: nn.Module) -> nn.Module | None:
    """The layer of a transformers model that maps to the vocabulary; None if there is none."""
    method = getattr(model, "get_output_embeddings", None)
    head = method() if callable(method) else None
    return head if isinstance(head, nn.Module) else None


def with_stacks(named: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules by name, and each stack of experts by the name of its parameter with the module that has it."""
    stacks = {f"{name}.{own}": module for name, module in named.items() if name for own in expert_stacks(module)}
    return {**named, **stacks}


def layer_class_for(layer: nn.Module, name: str = "") -> type[LoRALayer] | None:
    """The class of LoRA layer for a layer; None if a pair could not be a low-rank update of the weight of the layer.

    ``name`` tells a stack of experts from the module that has it.

    These are not adapted: grouped convolutions, for which PEFT's pair is not an update of the weight; embeddings with a
    ``max_norm``, which change their weight when they are called; the ``out_proj`` of ``nn.MultiheadAttention``, which
    is never called; routers; weights that are not floating point, except for codes of bitsandbytes; and classes that
    only have the name of a layer of torch.
    """
    if name.rpartition(".")[2] in expert_stacks(layer):
        return ExpertLayer
    if weight_kind(layer):
        return QuantisedLayer
    weight = getattr(layer, "weight", None)
    # The attribute "weight" of a ParametrizationList is a module, not a tensor.
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    class_names = {base.__name__ for base in type(layer).__mro__}
    # torch's class of the out_proj; attention passes its weight to a function.
    if "NonDynamicallyQuantizableLinear" in class_names or getattr(layer, "groups", 1) != 1:
        return None
    # A router of transformers (Llama 4) is a linear layer by its class, and returns several tensors.
    if isinstance(layer, nn.Linear) and "router" in type(layer).__name__.lower():
        return None
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return None
    # nf is the width of the output: it tells transformers' Conv1D from another class of that name.
    if TRANSPOSED in class_names and weight.ndim == 2 and weight.shape[1] == getattr(layer, "nf", None):
        return TransposedLayer
    return next((lora_class for torch_class, lora_class in LAYERS.items() if isinstance(layer, torch_class)), None)


def warn_of_doubles(model: nn.Module, named: Mapping[str, nn.Module]) -> None:
    """Warn of layers that are in several places of the model, of which PEFT would adapt only the first.

    A layer inside a module that is in several places is itself in one place only.
    """
    names = {id(layer): name for name, layer in named.items()}
    for parent, module in model.named_modules():
        for own, child in module._modules.items():
            place = plain_name(f"{parent}.{own}" if parent else own)
            first = names.get(id(child), place)
            if first != place:
                warnings.warn(
                    f"{place} is the same layer as {first}: it is adapted in both places, but PEFT would adapt {first} "
                    f"alone; leave it out of the targets where PEFT is to load the adapter",
                    stacklevel=3,
                )


def glob_list(globs: str | Iterable[str], name: str) -> list[str]:
    """Globs as a list, where a single string is one glob.

    Raises
    ------
    OptionError
        A glob is not a string.
    """
    listed = [globs] if isinstance(globs, str) else list(globs) if isinstance(globs, Iterable) else [globs]
    if not all(isinstance(glob, str) for glob in listed):
        raise OptionError(f"{name} {globs!r} are not strings", fix='give globs for module names: ["q_proj", "v_proj"]')
    return listed


def _select_layers(named: Mapping[str, nn.Module], fitting: Mapping[str, object], globs: Sequence[str]) -> list[str]:
    """The names that match the globs; an error names a module that is the only match and cannot be adapted."""
    for glob in globs:
        unfit_names = [] if _matching_names(fitting, glob) else _matching_names((name for name in named if name), glob)
        if unfit_names:
            layer_names = ", ".join([*(kind.__name__ for kind in LAYERS), f"transformers' {TRANSPOSED}"])
            raise OptionError(
                f"{glob!r} matches {unfit_names[0]}, {_describe_layer(named[unfit_names[0]])}, which cannot be adapted",
                fix=f"choose layers of floating point that are torch's {layer_names}, convolutions without groups",
            )
    return select(fitting, globs, prefixes=False)


def _describe_layer(layer: nn.Module) -> str:
    """The class of a layer that cannot be adapted, and the reason if it is not the class."""
    kind = type(layer)
    if getattr(layer, "groups", 1) != 1:
        return f"a {kind.__name__} of {layer.groups} groups"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "an Embedding with a max_norm, so that its weight changes when it is called"
    # With its module, where the bare name would be that of a layer which can be adapted.
    alike = kind.__name__ in {TRANSPOSED, *(known.__name__ for known in LAYERS)}
    return f"a {kind.__module__}.{kind.__qualname__}" if alike else f"a {kind.__name__}"


def _matching_names(names: Iterable[str], glob: str) -> list[str]:
    """The names that match, which may be none."""
    try:
        return select(names, [glob], prefixes=False)
    except OptionError:
        return []


def _is_within(name: str, modules: Sequence[str]) -> bool:
    """Whether a module is one of ``modules`` or inside one of them."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)
