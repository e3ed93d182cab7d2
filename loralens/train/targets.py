"""Which layers of a model are adapted: chosen by glob or as "all-linear", and the LoRA layer that fits each."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from loralens.core.names import natural_key, select
from loralens.errors import OptionError
from loralens.train.conv import ConvLayer
from loralens.train.embedding import EmbeddingLayer
from loralens.train.layer import LinearLayer, LoRALayer, TransposedLayer

ALL_LINEAR = "all-linear"

# What a layer is an instance of, by the name of the class: transformers' Conv1D without an import of transformers.
LAYERS: Mapping[str, type[LoRALayer]] = {
    "Linear": LinearLayer,
    "Conv1D": TransposedLayer,
    "Conv1d": ConvLayer,
    "Conv2d": ConvLayer,
    "Conv3d": ConvLayer,
    "Embedding": EmbeddingLayer,
}


def chosen(model: nn.Module, targets: str | Sequence[str], *, apart: Sequence[str] = ()) -> dict[str, type[LoRALayer]]:
    """Name → kind of LoRA layer for every layer that ``targets`` means, in natural order.

    Parameters
    ----------
    model : nn.Module
    targets : str or sequence of str
        Globs as those of `loralens.core.names.select`: ``q_proj`` is every layer of that kind. ``all-linear``: every
        linear layer but the output embedding, which maps to the vocabulary.
    apart : sequence of str
        Modules that are trained in full: nothing in them is meant by ``all-linear``, and nothing may be adapted.

    Raises
    ------
    OptionError
        A glob matches nothing (the message holds the nearest names), or something that cannot be adapted.
    """
    named = dict(model.named_modules())
    fitting = {name: found for name, layer in named.items() if name and (found := fitting_layer(layer))}
    if targets == ALL_LINEAR:
        head = _output(model)
        names = [
            name
            for name, found in fitting.items()
            if found.kind == "linear" and named[name] is not head and not _within(name, apart)
        ]
        if not names:
            raise OptionError("the model has no linear layer to adapt", fix="name the layers: targets=...")
    else:
        globs = [targets] if isinstance(targets, str) else list(targets)
        if not globs:
            raise OptionError("no targets are given", fix=f"give globs over module names, or {ALL_LINEAR!r}")
        names = _selected(named, fitting, globs)
    for name in names:
        if _within(name, apart):
            raise OptionError(f"{name} cannot be both adapted and trained in full", fix="name it once")
    return {name: fitting[name] for name in sorted(names, key=natural_key)}


def heads_named(model: nn.Module, globs: Sequence[str]) -> list[str]:
    """The outermost modules that globs match, to be trained in full.

    Raises
    ------
    OptionError
        A glob matches nothing; or a parameter of a head is also one of a module that is none (tied weights).
    """
    if not globs:
        return []
    found = select([name for name, _ in model.named_modules() if name], list(globs))
    tops = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    everywhere = list(model.named_parameters(remove_duplicate=False))
    trained = {id(parameter): name for name, parameter in everywhere if _within(name, tops)}
    for name, parameter in everywhere:
        if id(parameter) in trained and not _within(name, tops):
            raise OptionError(
                f"{trained[id(parameter)]} is tied to {name}, which would be trained with it",
                fix=f"name {name.rpartition('.')[0]} among the heads too, or adapt both",
            )
    return tops


def fitting_layer(layer: nn.Module) -> type[LoRALayer] | None:
    """The LoRA layer for a layer; None where its update would be no low-rank update of a weight that it multiplies by.

    Not adapted: grouped convolutions (PEFT's pair for them is no update of their weight), the ``out_proj`` of
    ``nn.MultiheadAttention`` (which is never called), and weights that are not floating point.
    """
    names = {base.__name__ for base in type(layer).__mro__}
    weight = getattr(layer, "weight", None)
    if weight is None or not weight.is_floating_point() or "NonDynamicallyQuantizableLinear" in names:
        return None
    if getattr(layer, "groups", 1) != 1:
        return None
    return next((found for name, found in LAYERS.items() if name in names), None)


def _selected(named: Mapping[str, nn.Module], fitting: Mapping[str, object], globs: Sequence[str]) -> list[str]:
    """The names that globs match; where one matches only what does not fit, that is said."""
    for glob in globs:
        others = [] if _hits(fitting, glob) else _hits((name for name in named if name), glob)
        if others:
            layer = named[others[0]]
            groups = getattr(layer, "groups", 1)
            said = type(layer).__name__ + (f" of {groups} groups" if groups != 1 else "")
            raise OptionError(
                f"{glob!r} matches {others[0]}, a {said}, which cannot be adapted",
                fix=f"choose layers of floating point that are {', '.join(LAYERS)}, convolutions without groups",
            )
    return select(fitting, globs)


def _hits(names: Iterable[str], glob: str) -> list[str]:
    """The names that match; none is no error."""
    try:
        return select(names, [glob])
    except OptionError:
        return []


def _output(model: nn.Module) -> nn.Module | None:
    """The output embedding of a transformers model."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _within(name: str, modules: Sequence[str]) -> bool:
    """Whether a module is one of some, or inside one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)
