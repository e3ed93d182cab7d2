"""Chooses the layers that are adapted, by glob or as "all-linear", and the class of LoRA layer for each."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from loralens.choices import ScaleRule, StartName
from loralens.core.adapter import Adapter
from loralens.core.attached import compute_dtype
from loralens.core.lowrank import scale_of
from loralens.core.messages import note
from loralens.core.names import kind, natural_key, some
from loralens.core.selection import matches, select
from loralens.errors import OptionError
from loralens.exports import Options
from loralens.training.course import TrainingMethod, as_float, as_int, training_method
from loralens.training.layers import ConvLayer, EmbeddingLayer, LinearLayer, LoRALayer, TransposedLayer

# The scale multiplies float32 factors, and PiSSA divides by it: neither the scale nor its reciprocal may underflow, or
# exceed the largest float32, 3.4e38.
TINY = 1e-38
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Options):
    """Layers: which are adapted, at which rank, and by which method.

    Parameters
    ----------
    targets : str or sequence of str
        Globs for the names or kinds of layers. ``all-linear``, alone or among globs, means every linear layer except
        for the one that maps to the vocabulary.
    exclude : str or sequence of str
        Globs for modules in which nothing is adapted.
    rank : int
        The rank of every layer. A layer whose matrix is narrower gets the largest rank that it allows, and a note of
        the logger ``loralens`` names it.
    rank_pattern : mapping of str to int, optional
        Globs for layers that get another rank; of several that match a layer, the last one counts.
    alpha : float
        The scale is α/r, for rsLoRA α/√r, with the rank r of each layer, as in PEFT.
    method : str
        The name of a row of `loralens.training.course.METHODS`: a combination of the five options below.
    scale_rule, start, magnitude, lr_ratio, freeze_a : optional
        Each replaces the one of the method: the scale ``lora`` (α/r) or ``rslora`` (α/√r); the first factors
        ``kaiming``, ``gaussian``, ``pissa``, ``olora`` or ``lora-ga``, for `fit` also an adapter that has them; whether
        the length of every output is trained (DoRA); the learning rate of B divided by that of A; whether A is not
        trained.
    heads : str or sequence of str
        Globs for the names of modules that are trained in full, in float32 even if the model has 16 bits.
    dropout : float
        The probability of dropout on the input of every A, in training only.
    seed : int
        The seed of the first factors, and in `fit` of dropout.
    """

    targets: str | Sequence[str] = ALL_LINEAR
    exclude: str | Sequence[str] = ()
    rank: int = 8
    rank_pattern: Mapping[str, int] | None = None
    alpha: float = 16.0
    method: str = "lora"
    scale_rule: ScaleRule | None = None
    start: "StartName | Adapter | None" = None
    magnitude: bool | None = None
    lr_ratio: float | None = None
    freeze_a: bool | None = None
    heads: str | Sequence[str] = ()
    dropout: float = 0.0
    seed: int = 0

    @property
    def row(self) -> TrainingMethod:
        """The method with its axes; those of an adapter to start with are plain."""
        axes = {name: getattr(self, name) for name in ("scale_rule", "start", "magnitude", "lr_ratio", "freeze_a")}
        return training_method(self.method, **axes | ({"start": None} if isinstance(self.start, Adapter) else {}))


def check_model(model: nn.Module) -> None:
    """Refuse what is no model, or has LoRA layers already."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"the model is a {type(model).__name__}, not a module", fix="give a torch.nn.Module")
    # The names of the modules would be those of the wrapper, and PEFT's own layers would be adapted.
    if hasattr(model, "peft_config"):
        raise OptionError("the model is wrapped by PEFT already", fix="give its base: model.unload()")
    for name, layer in modules_by_name(model).items():
        if isinstance(layer, LoRALayer):
            raise OptionError(f"{name} is a LoRA layer already", fix="remove the layers first: injection.remove()")


def check_numbers(options: LoraOptions) -> dict[str, Any]:
    """The numbers of an injection by their names in it, converted to numbers of Python, with which JSON can be written.

    Raises
    ------
    OptionError
        A number is not in its range, or ``rank_pattern`` is not a mapping of strings to ranks.
    """
    alpha, dropout, seed, pattern = options.alpha, options.dropout, options.seed, options.rank_pattern or {}
    r, a, part, s = check_rank(options.rank), as_float(alpha), as_float(dropout), as_int(seed)
    # α by itself too: some dialects write it as float32.
    if a is None or not (TINY < a < 1 / TINY and TINY <= scale_of(a, r, options.row.formula) <= 1 / TINY):
        what = f"alpha {alpha!r} is not a positive number with a scale that float32 holds"
        raise OptionError(what, fix="give a number like 16 or 32")
    if part is None or not 0 <= part < 1:
        raise OptionError(f"dropout {dropout!r} is not in [0, 1)", fix="give a probability, such as 0 or 0.1")
    if s is None:
        raise OptionError(f"seed {seed!r} is not a whole number", fix="give 0, 1 …")
    if not isinstance(pattern, Mapping) or not all(isinstance(glob, str) for glob in pattern):
        what = f"rank_pattern {pattern!r} is not a mapping of globs to ranks"
        raise OptionError(what, fix='give globs and their ranks: {"down_proj": 4}')
    ranks = {glob: check_rank(rank, f"rank_pattern {glob!r}:") for glob, rank in pattern.items()}
    return {"rank": r, "rank_pattern": ranks, "alpha": a, "dropout": part, "seed": s}


# The names of parameters in the models of transformers that are stacks of experts, (experts, out, in).
STACKS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "v1", "w2")


class ExpertStack(LoRALayer):
    """What stands for a stack of experts in a plan; only PEFT has a layer for it."""

    kind: ClassVar[str] = "experts"


def expert_stacks(module: nn.Module) -> list[str]:
    """The names of the parameters of a module that are stacks of experts."""
    own = module.named_parameters(recurse=False)
    return [name for name, parameter in own if name in STACKS and parameter.ndim == 3 and parameter.is_floating_point()]


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
    adapts_stacks: bool = False,
) -> dict[str, type[LoRALayer]]:
    """The names of the layers to adapt, in natural order, each with its class of LoRA layer.

    Parameters
    ----------
    model : nn.Module
    targets : str or sequence of str
        Globs as in `loralens.core.selection`: ``q_proj`` means every layer of that kind. ``all-linear``, alone
        or among globs, means every linear layer except for the output embedding, which maps to the vocabulary. Stacks
        of experts are layers by the names of their parameters, and linear.
    heads : sequence of str
        Modules that are trained in full. ``all-linear`` leaves out the layers in them, and no glob may match one.
    exclude : str or sequence of str
        Globs for modules that are not adapted, and nothing in them is.
    adapts_stacks : bool
        Whether stacks of experts are adapted; otherwise ``all-linear`` leaves them out, and no glob may match one.

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
        # The output embedding is large, and often tied to the input embedding.
        head, kinds = output_embedding_of(model), ("linear", *(["experts"] if adapts_stacks else []))
        linear = {name for name, layer_class in fitting.items() if layer_class.kind in kinds}
        chosen = {name for name in linear if named[name] is not head and not _is_within(name, heads)}
        if not chosen:
            raise OptionError("the model has no linear layer to adapt", fix="name the layers: targets=...")
    if other_globs := [glob for glob in globs if glob != ALL_LINEAR]:
        chosen.update(_select_layers(named, fitting, other_globs))
    excluded = excluded_modules(named, exclude)
    names = [name for name in chosen if not _is_within(name, excluded)]
    if not names:
        raise OptionError("no layer is left to adapt: all targets are excluded", fix="exclude fewer modules")
    for name in names:
        if not adapts_stacks and fitting[name] is ExpertStack:
            fix = "exclude it, or train it by TRL: --backend trl, without dropout and DoRA"
            raise OptionError(f"{name} is a stack of experts, which is not adapted here", fix=fix)
    for name in names:
        if _is_within(name, heads):
            raise OptionError(
                f"{name} cannot be both adapted and trained in full", fix="name it among the targets or the heads only"
            )
    return {name: fitting[name] for name in sorted(names, key=natural_key)}


def has_codes(layer: nn.Module) -> bool:
    """Whether a layer is a linear one of a library for quantised models, whose weights are whole numbers."""
    if "linear" not in type(layer).__name__.lower() or not hasattr(layer, "in_features"):
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
    is never called; routers; weights that are not floating point, except for the codes of linear layers; and classes
    that only have the name of a layer of torch.
    """
    if name.rpartition(".")[2] in expert_stacks(layer):
        return ExpertStack
    # For PEFT's layers; `inject` refuses it.
    if has_codes(layer):
        return LinearLayer
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
        unfit = next((name for name in named if name and matches(name, glob)), None)
        if unfit is not None and not any(matches(name, glob) for name in fitting):
            kinds = ", ".join([*(layer.__name__ for layer in LAYERS), f"transformers' {TRANSPOSED}"])
            module = type(named[unfit])
            raise OptionError(
                f"{glob!r} matches {unfit}, a {module.__qualname__} of {module.__module__}, which cannot be adapted",
                fix=f"choose layers of floating point that are torch's {kinds}, without groups or max_norm",
            )
    return select(fitting, globs, prefixes=False)


def _is_within(name: str, modules: Sequence[str]) -> bool:
    """Whether a module is one of ``modules`` or inside one of them."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def check_rank(rank: object, name: str = "rank") -> int:
    """A rank as a number of Python; OptionError if it is not a whole number of 1 or more."""
    number = as_int(rank)
    if number is None or number < 1:
        raise OptionError(f"{name} {rank!r} is not a whole number of 1 or more", fix="give a rank of 1 or more")
    return number


def layer_ranks(sides: Mapping[str, int], *, rank: int, pattern: Mapping[str, int], say: bool = True) -> dict[str, int]:
    """The rank of every layer, at most the smaller side of its matrix; a note names the layers that have less.

    Parameters
    ----------
    sides : mapping of str to int
        The names of the layers, each with the smaller side of its matrix.
    rank : int
        The rank of layers that no glob matches.
    pattern : mapping of str to int
        Globs with their ranks. Of several that match a layer, the last one counts.
    say : bool
        Whether to log the note.

    Raises
    ------
    OptionError
        A glob matches no layer; a rank is larger than every matrix allows.
    """
    for glob in pattern:
        select(sides, [glob], prefixes=False)  # which has the message for a glob that matches nothing
    wishes = {
        name: next((r for glob, r in reversed([*pattern.items()]) if matches(name, glob)), rank) for name in sides
    }
    # More directions than the smaller side has cannot exist, and PiSSA could not take them from W.
    ranks = {name: min(wishes[name], side) for name, side in sides.items()}
    narrow = [name for name in sides if ranks[name] < wishes[name]]
    # A rank that fits nowhere is a mistake, not a model with a few narrow layers.
    if len(narrow) == len(sides):
        name = max(narrow, key=lambda layer: sides[layer])
        raise OptionError(
            f"rank {wishes[name]} is larger than the matrix of any target allows: that of {name} allows {sides[name]}",
            fix=f"give a rank of at most {sides[name]}",
        )
    if narrow and say:
        counts = Counter(f"{kind(name)} gets rank {ranks[name]}" for name in narrow)
        note(f"some layers are narrower than the rank: {some(counted(counts))}")
    return ranks


def counted(counts: Mapping[str, int]) -> list[str]:
    """Texts, each with its number if that is more than 1."""
    return [f"{text} ({n} of them)" if n > 1 else text for text, n in counts.items()]


class LayerPlan(NamedTuple):
    """What an injection would adapt.

    Attributes
    ----------
    named : dict of str to nn.Module
        All modules of the model, and its stacks of experts, by name.
    kinds : dict of str to type
        The layers that are adapted, each with its class of LoRA layer.
    ranks : dict of str to int
        Their ranks.
    heads : list of str
        The modules that are trained in full.
    numbers : dict of str to number
        The rank, α, dropout and seed, and the ranks of globs, by their names in an `Injection`.
    """

    named: dict[str, nn.Module]
    kinds: Mapping[str, type[LoRALayer]]
    ranks: Mapping[str, int]
    heads: Sequence[str]
    numbers: Mapping[str, Any]


def plan_layers(model: nn.Module, options: LoraOptions, *, stacks: bool = False, say: bool = False) -> LayerPlan:
    """Choose the layers, their ranks and the heads, as `inject` does, and leave the model as it is.

    ``stacks`` says whether stacks of experts are adapted.

    Raises
    ------
    OptionError
        A glob matches nothing, a number is not in its range, or the rank is larger than any matrix allows.
    """
    numbers = check_numbers(options)
    named = with_stacks(modules_by_name(model))
    tops = choose_heads(model, options.heads)
    kinds = choose_layers(model, options.targets, heads=tops, exclude=options.exclude, adapts_stacks=stacks)
    sides = {name: min(matrix_shape(named[name], kind, name)) for name, kind in kinds.items()}
    ranks = layer_ranks(sides, rank=numbers["rank"], pattern=numbers["rank_pattern"], say=say)
    return LayerPlan(named, kinds, ranks, tops, numbers)


def matrix_shape(module: nn.Module, kind: type[LoRALayer], name: str) -> tuple[int, int]:
    """(out, in) of the matrix of a layer, whose weight may be codes, or of that of each expert of a stack."""
    if has_codes(module):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    W = getattr(module, name.rpartition(".")[2])[0] if kind is ExpertStack else kind.matrix(module)
    if W.is_meta or is_lazy(W):
        raise OptionError(f"{name}: its weight holds no numbers yet", fix="load the model's weights first")
    return W.shape[0], W.shape[1]


# An update at a usual learning rate is below half a unit in the last place of these dtypes, and rounding loses it.
HALF = (torch.float16, torch.bfloat16)


@torch.no_grad()
def widen_heads(heads: Iterable[nn.Module]) -> tuple[RemovableHandle, ...]:
    """Convert 16-bit heads to float32, with inputs and outputs in the dtypes that they had.

    The steps of an optimiser are too small for 16 bits, and the ε of Adam, 1e-8, is 0 in float16. Whoever removes the
    handles must also restore the 16-bit tensors.
    """
    handles: list[RemovableHandle] = []
    for layer in (layer for head in heads for layer in head.modules()):
        narrow = [t for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)) if t.dtype in HALF]
        if narrow:
            handles += [
                # Models of transformers call their modules with keywords too.
                layer.register_forward_pre_hook(_cast_inputs, with_kwargs=True),
                layer.register_forward_hook(_cast_output_to(narrow[0].dtype)),
            ]
        for tensor in narrow:
            # Through .data, so that the parameter stays the same object for the optimiser and for tied weights.
            tensor.data = tensor.data.to(compute_dtype(tensor))
    return tuple(handles)


def _cast_inputs(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    del layer
    return tuple(map(_to_float32, args)), {name: _to_float32(value) for name, value in kwargs.items()}


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def _cast_output_to(dtype: torch.dtype) -> Any:
    """A hook that rounds the output to the dtype in which the model continues."""

    def hook(layer: nn.Module, inputs: Any, output: Any) -> Any:
        del layer, inputs
        return output.to(dtype) if isinstance(output, Tensor) and output.is_floating_point() else output

    return hook


def copy_tensors(heads: Iterable[nn.Module]) -> tuple[tuple[Tensor, Tensor], ...]:
    """The parameters and buffers of heads, each with a copy."""
    tensors = [tensor for head in heads for tensor in (*head.parameters(), *head.buffers())]
    return tuple((tensor, tensor.detach().clone()) for tensor in tensors)


@torch.no_grad()
def restore_tensors(copies_before: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set the tensors of heads to the values and the dtypes of their copies."""
    for tensor, before in copies_before:
        tensor.data = tensor.data.to(before.dtype)
        tensor.copy_(before)


# Below this share of the weights of the layers nobody misses what is left out, such as the router of a mixture.
SMALL = 0.01


def note_left_out(model: nn.Module, adapted: Collection[str], passed_over: Collection[str]) -> None:
    """Log a note on weights that are neither adapted nor passed over by the user, if they are a large share.

    Parameters
    ----------
    model : nn.Module
        The model before the injection.
    adapted : collection of str
        The names of the layers and of the stacks of experts that are adapted.
    passed_over : collection of str
        The names of modules that the user has excluded, or that are trained in full.
    """
    head = output_embedding_of(model)
    total = missed = 0
    kinds: Counter[str] = Counter()
    for path, module in model.named_modules():
        # Embeddings are not linear layers, and nobody expects them to be adapted.
        if isinstance(module, nn.Embedding) or module is head:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            name = plain_name(f"{path}.{own}")
            if parameter.ndim < 2 or "bias" in own:
                continue
            total += parameter.numel()
            within = any(f"{name}.".startswith(f"{top}.") for top in passed_over)
            if not within and name not in adapted and name.removesuffix(".weight") not in adapted:
                missed += parameter.numel()
                kinds[".".join(part for part in name.split(".")[-3:] if not part.isdecimal())] += 1
    if total and missed / total >= SMALL:
        left_out = some(counted(dict(kinds.most_common())))
        note(f"all-linear leaves out {100 * missed / total:.1f} % of the weights of the layers: {left_out}")
