"""Injection: puts LoRA layers in the place of chosen layers of a model, and takes them out again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from loralens.core.attached import keep_modes
from loralens.core.layers import compute_dtype
from loralens.core.names import natural_key
from loralens.core.scaling import Scaling, scale_of
from loralens.errors import OptionError
from loralens.training.dora import add_magnitude
from loralens.training.heads import copy_tensors, restore_tensors, widen_heads
from loralens.training.initial import INITIALISATIONS, Initialisation, Pair, draw_pair, factor_digest
from loralens.training.layer import LoRALayer
from loralens.training.method import TrainingMethod, training_method
from loralens.training.number import as_float, as_int
from loralens.training.pissa import principal_pair
from loralens.training.running_statistics import freeze_statistics
from loralens.training.targets import ALL_LINEAR, choose_heads, choose_layers, warn_of_doubles

TINY = 1e-38  # a scale is a number of float32, and so is one over it


@final
@dataclass(frozen=True, slots=True, eq=False)
class Injection:
    """LoRA layers at work in a model, and all that reading them back and taking them out needs.

    Attributes
    ----------
    layers : mapping of str to LoRALayer
        By the names of the base model, in natural order.
    heads : mapping of str to nn.Module
        Modules of the model that are trained in full.
    initialisation : str
        How A₀ was made; ``principal`` for PiSSA.
    digests : mapping of str to str
        Of the factor each layer began with: A₀, of embeddings B₀.
    """

    model: nn.Module
    layers: Mapping[str, LoRALayer]
    heads: Mapping[str, nn.Module]
    method: TrainingMethod
    rank: int
    alpha: float
    dropout: float
    seed: int
    initialisation: str
    digests: Mapping[str, str]
    _places: tuple[tuple[nn.Module, str, LoRALayer], ...]
    _nested: tuple[nn.TransformerEncoder, ...]
    _handles: tuple[RemovableHandle, ...]
    _trained: tuple[nn.Parameter, ...]  # before the injection
    _head_tensors: tuple[tuple[Tensor, Tensor], ...]  # of the heads: what is trained, and a copy from before

    @property
    def scaling(self) -> Scaling:
        """Where the scale of every layer comes from."""
        return Scaling(self.method.rule, self.alpha, self.rank, "training")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, each once: factors, magnitudes and heads."""
        return [parameter for group in self.groups(lr=1.0) for parameter in group["params"]]

    @property
    def trainable(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def frozen(self) -> int:
        """How many numbers of the model are not: those of the model as it was, without the heads."""
        ours = {id(parameter) for layer in self.layers.values() for parameter in layer.parameters(recurse=False)}
        return sum(p.numel() for p in self.model.parameters() if not p.requires_grad and id(p) not in ours)

    def groups(self, *, lr: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser of torch: "A", "B", "magnitude" and "heads", those that are not empty.

        All learn at ``lr``, but B at ``lr`` times the method's ratio: 16 for LoRA+. The B of an embedding, which is
        the factor that is drawn, learns at ``lr``.
        """
        parts: dict[str, list[nn.Parameter]] = {"A": [], "B": [], "magnitude": [], "heads": []}
        for layer in self.layers.values():
            parts["A"].append(layer.A)
            parts["A" if layer.kind == "embedding" else "B"].append(layer.B)
            if layer.magnitude is not None:
                parts["magnitude"].append(layer.magnitude)
        parts["heads"] = [parameter for head in self.heads.values() for parameter in head.parameters()]
        # Only LoRA+ has a ratio other than 1.
        rates = {"B": lr * self.method.ratio}
        groups = []
        for name, group_parameters in parts.items():
            params = [parameter for parameter in dict.fromkeys(group_parameters) if parameter.requires_grad]
            if params:
                groups.append({"name": name, "params": params, "lr": rates.get(name, lr)})
        return groups

    @torch.no_grad()
    def remove(self) -> None:
        """Put the layers back that were there: the same objects, the same bits, trainable what was trainable.

        The factors stay in ``layers`` and can still be read. What heads learned is gone, as they get back what they
        held before: an adapter with heads is read first. What the model changes as it is called stays changed, adapted
        or not: ``nn.Embedding(max_norm=…)`` shortens the rows that it looks up.
        """
        for parent, name, layer in self._places:
            if parent._modules.get(name) is layer:
                parent._modules[name] = layer.base_layer
        for encoder in self._nested:
            encoder.use_nested_tensor = True
        for handle in self._handles:
            handle.remove()
        restore_tensors(self._head_tensors)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in self._trained:
            parameter.requires_grad_(True)


def inject(
    model: nn.Module,
    *,
    targets: str | Sequence[str] = ALL_LINEAR,
    rank: int = 8,
    alpha: float = 16.0,
    method: str = "lora",
    heads: str | Sequence[str] = (),
    dropout: float = 0.0,
    seed: int = 0,
    initialisation: Initialisation = "kaiming-uniform",
) -> Injection:
    """Put LoRA layers into a model, freeze the rest of it, and return what was done.

    The model is changed in place, and computes what it did before (DoRA and PiSSA: up to rounding). Its layers keep
    their names with ``.base_layer`` behind them; a model is wrapped for distributed training after this. Its running
    statistics stay as they are, in training too: see `loralens.training.running_statistics`.

    Parameters
    ----------
    model : nn.Module
    targets : str or sequence of str
        Globs over module names, or kinds; ``all-linear``: every linear layer but the one that maps to the vocabulary.
    rank : int
    alpha : float
        The scale is α/r, for rsLoRA α/√r.
    method : str
        A name of `loralens.training.method.METHODS`.
    heads : str or sequence of str
        Globs over the names of modules that are trained in full, in float32 where the model is in 16 bits.
    dropout : float
        On the input of every A, in training only.
    seed : int
    initialisation : str
        ``kaiming-uniform`` or ``gaussian``; PiSSA has its own.

    Returns
    -------
    Injection

    Raises
    ------
    OptionError
        A glob that matches nothing, a rank larger than a matrix, a model that has LoRA layers already, a head whose
        weight is tied to one that is no head, a weight without numbers (meta, lazy; for PiSSA also NaN) … The model
        is then as it was.

    Warns
    -----
    UserWarning
        A layer stands in several places of the model: it is adapted in all of them, and PEFT would adapt the first.
    """
    row = training_method(method)
    _check_model(model)
    rank, alpha, dropout, seed = _check_numbers(row, rank=rank, alpha=alpha, dropout=dropout, seed=seed)
    _check_initialisation(initialisation)
    named = dict(model.named_modules())
    tops = choose_heads(model, heads)
    layers, digests = {}, {}
    with keep_modes(model):  # in training, a weight that is computed as it is looked at may change by that
        model.eval()
        kinds = choose_layers(model, targets, heads=tops)
        warn_of_doubles(model, {name: named[name] for name in kinds})
        for name, kind in kinds.items():
            _check_weight(name, kind.matrix(named[name]), rank)
        for name, kind in kinds.items():
            layers[name] = lora = _make_layer(
                name, named[name], kind, row, rank=rank, alpha=alpha, dropout=dropout, seed=seed, how=initialisation
            )
            # Of an embedding B is drawn and A is 0, but PiSSA draws nothing.
            digests[name] = factor_digest(lora.B if kind.kind == "embedding" and not row.principal else lora.A)
    for layer in layers.values():
        layer.training = layer.base_layer.training
    # Remembered before freezing: remove() makes exactly these trainable again.
    trained = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
    places = _replace_layers(model, layers)
    full = {name: named[name] for name in sorted(tops, key=natural_key)}
    # Copied before anything is widened or trained, so that remove() gives back the same bits.
    before = copy_tensors(full.values())
    _freeze_base(model, layers, full, frozen=row.frozen)
    return Injection(
        model=model,
        layers=layers,
        heads=full,
        method=row,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        seed=seed,
        initialisation="principal" if row.principal else initialisation,
        digests=digests,
        _places=places,
        _nested=_disable_nested_tensors(model, layers),
        _handles=(*freeze_statistics(model, heads=full.values()), *widen_heads(full.values())),
        _trained=trained,
        _head_tensors=before,
    )


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise OptionError(f"the model is a {type(model).__name__}", fix="give a torch.nn.Module")
    if hasattr(model, "peft_config"):
        raise OptionError("the model is wrapped by PEFT already", fix="give its base: model.unload()")
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALayer):
            raise OptionError(f"{name} is a LoRA layer already", fix="take the layers out first: injection.remove()")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise OptionError(f"{name} is lazy: it has no shape yet", fix="run the model on an input first")


def _check_numbers(
    method: TrainingMethod, *, rank: object, alpha: object, dropout: object, seed: object
) -> tuple[int, float, float, int]:
    """The numbers that an injection is given, as Python's own."""
    r, a, part, s = as_int(rank), as_float(alpha), as_float(dropout), as_int(seed)
    if r is None or r < 1:
        raise OptionError(f"rank {rank!r} is no whole number from 1 on", fix="give a rank of 1 or more")
    if a is None or not isfinite(a) or a <= 0:
        raise OptionError(f"alpha {alpha!r} is not a positive number", fix="give a positive number: 16, 32")
    if not TINY <= scale_of(a, r, method.rule) <= 1 / TINY:
        raise OptionError(f"alpha {alpha!r} gives a scale that float32 does not hold", fix="give one like 16 or 32")
    if part is None or not 0 <= part < 1:
        raise OptionError(f"dropout {dropout!r} is not in [0, 1)", fix="give the part that is dropped: 0, 0.1")
    if s is None:
        raise OptionError(f"seed {seed!r} is no whole number", fix="give one: 0, 1 …")
    return r, a, part, s


def _check_initialisation(initialisation: str) -> None:
    if initialisation not in INITIALISATIONS:
        raise OptionError(f"{initialisation!r} is no initialisation", fix=f"choose one of {', '.join(INITIALISATIONS)}")


def _check_weight(name: str, W: Tensor, rank: int) -> None:
    if W.is_meta:
        raise OptionError(
            f"{name}: its weight is on the meta device, which holds no numbers", fix="load the model's weights first"
        )
    out, in_ = W.shape
    # More directions than the smaller side has cannot exist, and PiSSA could not take them from W.
    if rank > min(out, in_):
        raise OptionError(
            f"{name}: rank {rank} is larger than its matrix ({out}, {in_}) can have",
            fix=f"give a rank of at most {min(out, in_)}, or leave this module out of the targets",
        )


@torch.no_grad()
def _make_layer(
    name: str,
    layer: nn.Module,
    kind: type[LoRALayer],
    method: TrainingMethod,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
    how: Initialisation,
) -> LoRALayer:
    """The LoRA layer for one layer, with its first factors on the device of the weight."""
    W, scale = kind.matrix(layer), scale_of(alpha, rank, method.rule)
    out, in_ = W.shape
    if method.principal and not torch.isfinite(W).all():
        raise OptionError(
            f"{name}: its weight is not finite, so it has no leading directions",
            fix=f"mend the model's weights, choose another method than {method.name}, or leave this module out",
        )
    start = principal_pair(W, rank=rank, scale=scale) if method.principal else None
    if start:
        pair = Pair(start.B.clone(), start.A.clone())
    else:
        embedding = kind.kind == "embedding"
        drawn = draw_pair(name, (out, in_), rank=rank, seed=seed, initialisation=how, embedding=embedding)
        pair = Pair(*(factor.to(W.device, compute_dtype(W)) for factor in drawn))
    lora_layer = kind(layer, pair, scale=scale, dropout=dropout, start=start)
    if method.magnitude:
        add_magnitude(lora_layer)
    return lora_layer


def _replace_layers(model: nn.Module, layers: Mapping[str, LoRALayer]) -> tuple[tuple[nn.Module, str, LoRALayer], ...]:
    """Put every layer where its frozen one stands: everywhere, where a model has one layer in several places."""
    ours = {id(layer.base_layer): layer for layer in layers.values()}
    places = [
        (parent, name, ours[id(child)])
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if id(child) in ours
    ]
    for parent, name, layer in places:
        parent._modules[name] = layer
        if isinstance(parent, nn.TransformerEncoderLayer):
            layer.register_forward_pre_hook(_do_nothing)
    return tuple(places)


def _disable_nested_tensors(model: nn.Module, layers: Mapping[str, LoRALayer]) -> tuple[nn.TransformerEncoder, ...]:
    """Keep torch's own encoders from the nested tensors that only their fast path can take; those that were kept."""
    ours = {id(layer) for layer in layers.values()}
    encoders = tuple(
        encoder
        for encoder in model.modules()
        if isinstance(encoder, nn.TransformerEncoder)
        and encoder.use_nested_tensor
        and any(id(layer) in ours for layer in encoder.modules())
    )
    for encoder in encoders:
        encoder.use_nested_tensor = False
    return encoders


def _do_nothing(layer: nn.Module, inputs: Any) -> None:
    """A hook that does nothing: in evaluation ``nn.TransformerEncoderLayer`` calls no layer that has none."""
    del layer, inputs


def _freeze_base(
    model: nn.Module, layers: Mapping[str, LoRALayer], heads: Mapping[str, nn.Module], *, frozen: bool
) -> None:
    """Leave a gradient to the factors, the magnitudes and the heads alone."""
    model.requires_grad_(False)
    for layer in layers.values():
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(True)
        if frozen:
            (layer.B if layer.kind == "embedding" else layer.A).requires_grad_(False)
    for head in heads.values():
        head.requires_grad_(True)
