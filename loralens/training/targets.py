"""Chooses the layers that are adapted, by glob or as "all-linear", and the LoRA layer for each."""

import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from loralens.core.names import natural_key, select
from loralens.errors import OptionError
from loralens.training.conv import ConvLayer
from loralens.training.embedding import EmbeddingLayer
from loralens.training.layer import LinearLayer, LoRALayer, TransposedLayer

ALL_LINEAR = "all-linear"

LAYERS: Mapping[type[nn.Module], type[LoRALayer]] = {
    nn.Linear: LinearLayer,
    nn.Conv1d: ConvLayer,
    nn.Conv2d: ConvLayer,
    nn.Conv3d: ConvLayer,
    nn.Embedding: EmbeddingLayer,
}
TRANSPOSED = "Conv1D"  # transformers' own, known by its name and shape, so that transformers is not imported


def choose_layers(
    model: nn.Module, targets: str | Sequence[str], *, heads: Sequence[str] = ()
) -> dict[str, type[LoRALayer]]:
    """Name → kind of LoRA layer for every layer that ``targets`` means, in natural order.

    Parameters
    ----------
    model : nn.Module
    targets : str or sequence of str
        Globs as those of `loralens.core.names.select`: ``q_proj`` is every layer of that kind. ``all-linear``: every
        linear layer but the output embedding, which maps to the vocabulary.
    heads : sequence of str
        Modules that are trained in full: nothing in them is meant by ``all-linear``, and nothing may be adapted.

    Raises
    ------
    OptionError
        A glob is no text, matches nothing (the message holds the nearest names), or something that cannot be adapted.
    """
    named = dict(model.named_modules())
    fitting = {name: layer_class for name, layer in named.items() if name and (layer_class := layer_class_for(layer))}
    if targets == ALL_LINEAR:
        head = _output_embedding(model)
        names = [
            name
            for name, layer_class in fitting.items()
            if layer_class.kind == "linear" and named[name] is not head and not _is_within(name, heads)
        ]
        if not names:
            raise OptionError("the model has no linear layer to adapt", fix="name the layers: targets=...")
    else:
        globs = glob_list(targets, "targets")
        if not globs:
            raise OptionError("no targets are given", fix=f"give globs over module names, or {ALL_LINEAR!r}")
        names = _select_layers(named, fitting, globs)
    for name in names:
        if _is_within(name, heads):
            raise OptionError(f"{name} cannot be both adapted and trained in full", fix="name it once")
    return {name: fitting[name] for name in sorted(names, key=natural_key)}


def choose_heads(model: nn.Module, globs: str | Sequence[str]) -> list[str]:
    """The outermost modules that globs match, to be trained in full.

    Raises
    ------
    OptionError
        A glob matches nothing, or is no text; or a parameter of a head is also one of a module that is none (tied
        weights).
    """
    globs = glob_list(globs or (), "heads")
    if not globs:
        return []
    matches = select([name for name, _ in model.named_modules() if name], globs)
    tops = [name for name in matches if not any(name.startswith(f"{other}.") for other in matches)]
    everywhere = list(model.named_parameters(remove_duplicate=False))
    trained = {id(parameter): name for name, parameter in everywhere if _is_within(name, tops)}
    for name, parameter in everywhere:
        if id(parameter) in trained and not _is_within(name, tops):
            raise OptionError(
                f"{trained[id(parameter)]} is tied to {name}, which would be trained with it",
                fix=f"name {name.rpartition('.')[0]} among the heads too, or adapt both",
            )
    return tops


def layer_class_for(layer: nn.Module) -> type[LoRALayer] | None:
    """The LoRA layer for a layer; None where its update would be no low-rank update of a weight that it multiplies by.

    Not adapted: grouped convolutions (PEFT's pair for them is no update of their weight), embeddings with a
    ``max_norm`` (they change their weight as they are called), the ``out_proj`` of ``nn.MultiheadAttention`` (which is
    never called), weights that are not floating point, and classes that merely have the name of a layer of torch.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():  # of a ParametrizationList, "weight" is none
        return None
    if "NonDynamicallyQuantizableLinear" in _class_names(layer) or getattr(layer, "groups", 1) != 1:
        return None
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return None
    # nf is the width of the output: it tells transformers' Conv1D from another class of that name.
    if TRANSPOSED in _class_names(layer) and weight.ndim == 2 and weight.shape[1] == getattr(layer, "nf", None):
        return TransposedLayer
    return next((found for known, found in LAYERS.items() if isinstance(layer, known)), None)


def warn_of_doubles(model: nn.Module, named: Mapping[str, nn.Module]) -> None:
    """Warn of layers that stand in several places, which PEFT would adapt in the first of them alone.

    A layer inside a module that stands in several places is in one place itself.
    """
    names = {id(layer): name for name, layer in named.items()}
    for parent, module in model.named_modules():
        for own, child in module._modules.items():
            place = f"{parent}.{own}" if parent else own
            first = names.get(id(child), place)
            if first != place:
                warnings.warn(
                    f"{place} is the same layer as {first}: it is adapted in both places, but PEFT would adapt {first} "
                    f"alone; leave it out of the targets where PEFT is to load the adapter",
                    stacklevel=3,
                )


def glob_list(globs: str | Iterable[str], name: str) -> list[str]:
    """Globs as a list: one text is one glob.

    Raises
    ------
    OptionError
        They are no texts.
    """
    listed = [globs] if isinstance(globs, str) else list(globs) if isinstance(globs, Iterable) else [globs]
    if not all(isinstance(glob, str) for glob in listed):
        raise OptionError(f"{name} {globs!r} are no texts", fix='give globs over module names: ["q_proj", "v_proj"]')
    return listed


def _select_layers(named: Mapping[str, nn.Module], fitting: Mapping[str, object], globs: Sequence[str]) -> list[str]:
    """The names that globs match; where one matches only what does not fit, that is said."""
    for glob in globs:
        unfit_names = [] if _matching_names(fitting, glob) else _matching_names((name for name in named if name), glob)
        if unfit_names:
            layer_names = ", ".join([*(kind.__name__ for kind in LAYERS), f"transformers' {TRANSPOSED}"])
            raise OptionError(
                f"{glob!r} matches {unfit_names[0]}, {_describe_layer(named[unfit_names[0]])}, which cannot be adapted",
                fix=f"choose layers of floating point that are torch's {layer_names}, convolutions without groups",
            )
    return select(fitting, globs)


def _class_names(layer: nn.Module) -> set[str]:
    """The names of what a layer is an instance of."""
    return {base.__name__ for base in type(layer).__mro__}


def _describe_layer(layer: nn.Module) -> str:
    """The class of a layer that does not fit, and what it is about it."""
    kind = type(layer)
    if getattr(layer, "groups", 1) != 1:
        return f"a {kind.__name__} of {layer.groups} groups"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "an Embedding with a max_norm, so that its weight changes as it is called"
    alike = kind.__name__ in {TRANSPOSED, *(known.__name__ for known in LAYERS)}
    return f"a {kind.__module__}.{kind.__qualname__}" if alike else f"a {kind.__name__}"


def _matching_names(names: Iterable[str], glob: str) -> list[str]:
    """The names that match; none is no error."""
    try:
        return select(names, [glob])
    except OptionError:
        return []


def _output_embedding(model: nn.Module) -> nn.Module | None:
    """The output embedding of a transformers model."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _is_within(name: str, modules: Sequence[str]) -> bool:
    """Whether a module is one of some, or inside one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)
