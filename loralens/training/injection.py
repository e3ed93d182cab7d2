"""Injection: replaces chosen layers of a model by LoRA layers, and restores them."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

from loralens.core.attached import compute_dtype, keep_modes
from loralens.core.lowrank import Scaling, scale_of
from loralens.core.messages import warn
from loralens.core.names import kind, natural_key, some
from loralens.errors import OptionError
from loralens.exports import takes_options
from loralens.training.course import TrainingMethod
from loralens.training.initialisation import Pair, draw_pair, factor_digest, subtracted_pair
from loralens.training.layers import LoRALayer, add_magnitude
from loralens.training.targets import (
    ALL_LINEAR,
    LoraOptions,
    check_model,
    copy_tensors,
    counted,
    excluded_modules,
    glob_list,
    has_codes,
    note_left_out,
    plan_layers,
    restore_tensors,
    widen_heads,
)
from loralens.training.world import World


@torch.no_grad()
def make_layers(
    named: dict[str, nn.Module],
    classes: Mapping[str, type[LoRALayer]],
    ranks: Mapping[str, int],
    method: TrainingMethod,
    numbers: Mapping[str, Any],
    *,
    gradients: Mapping[str, Tensor],
) -> tuple[dict[str, LoRALayer], dict[str, str]]:
    """The LoRA layers by name, and the digests of the factors that were drawn."""
    layers: dict[str, LoRALayer] = {}
    digests: dict[str, str] = {}
    for name, layer_class in classes.items():
        rank, embedding = ranks[name], layer_class.kind == "embedding"
        W, scale = layer_class.matrix(named[name]), scale_of(numbers["alpha"], rank, method.formula)
        gradient = _as_matrix(gradients[name], layer_class) if name in gradients else None
        start = subtracted_pair(name, W, method, rank=rank, scale=scale, gradient=gradient)
        if start:
            # Copies, since the pair is trained and the start is not.
            pair = Pair(start.B.clone(), start.A.clone())
        else:
            shape = (W.shape[0], W.shape[1])
            drawn = draw_pair(name, shape, rank=rank, seed=numbers["seed"], start=method.start, embedding=embedding)
            pair = Pair(*(factor.to(W.device, compute_dtype(W)) for factor in drawn))
        layers[name] = layer = layer_class(named[name], pair, scale=scale, dropout=numbers["dropout"], start=start)
        if method.magnitude:
            add_magnitude(layer)
        # The factor that is drawn: for an embedding B, since A is 0. A start from W or a gradient draws neither.
        digests[name] = factor_digest(layer.B if embedding and not method.subtracted else layer.A)
    return layers, digests


def _as_matrix(gradient: Tensor, kind: type[LoRALayer]) -> Tensor:
    """The gradient of a weight in the shape (out, in) of the matrix of its layer."""
    holder = nn.Module()
    # A layer of any kind finds the matrix in the attribute ``weight``.
    holder.weight = nn.Parameter(gradient, requires_grad=False)
    return kind.matrix(holder)


def freeze_statistics(model: nn.Module, undo: ExitStack, *, heads: Collection[nn.Module] = ()) -> None:
    """Keep every layer with running statistics outside ``heads`` in evaluation mode.

    In training mode a batch norm normalises by the batch and updates its running mean and variance, with or without
    gradients; the parametrisation of a spectral norm updates its estimate of the leading directions of the weight. An
    adapter does not contain these statistics, so on the original base it would compute something else than was trained.
    """
    # The statistics of heads are saved with them, as buffers.
    trained = {id(layer) for head in heads for layer in head.modules()}
    for layer in model.modules():
        # A norm without running statistics normalises by the batch in evaluation too.
        moving = isinstance(layer, _SpectralNorm) or (isinstance(layer, _NormBase) and layer.running_mean is not None)
        if moving and id(layer) not in trained:
            undo.callback(setattr, layer, "training", layer.training)
            layer.training = False
            # In the place of the method, since model.train() calls it at any time.
            layer.train = partial(_keep_mode, layer)  # type: ignore[method-assign]
            undo.callback(delattr, layer, "train")


def _keep_mode(layer: nn.Module, mode: bool = True) -> nn.Module:
    del mode
    return layer


# Layer → its weight, from which a function computes the gradients for a start along the gradient.
Gradients = Mapping[str, Tensor] | Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
# The names of starts in the records of adapters and runs, which older releases wrote too.
RECORDED: Final[Mapping[str, str]] = {"kaiming": "kaiming-uniform", "pissa": "principal"}


@dataclass(frozen=True, eq=False)
class Injection:
    """LoRA layers in a model, and everything that is needed to read them and to remove them.

    Attributes
    ----------
    layers : mapping of str to LoRALayer
        The LoRA layers by the names of the layers that they replace, in natural order.
    heads : mapping of str to nn.Module
        The modules of the model that are trained in full.
    rank : int
        The rank of layers that no glob of ``rank_pattern`` matches and that are not narrower, see `ranks`.
    rank_pattern : mapping of str to int
        The ranks that globs were given.
    initialisation : str
        How the initial factors were made: ``kaiming-uniform``, ``gaussian``, ``principal`` (PiSSA), ``olora``,
        ``lora-ga``; ``adapter`` or ``A of an adapter`` where an adapter brought them.
    digests : mapping of str to str
        For each layer a digest of the initial factor that was drawn: A₀, for embeddings B₀.
    """

    model: nn.Module
    layers: Mapping[str, LoRALayer]
    heads: Mapping[str, nn.Module]
    method: TrainingMethod
    rank: int
    rank_pattern: Mapping[str, int]
    alpha: float
    dropout: float
    seed: int
    initialisation: str
    digests: Mapping[str, str]
    _undo: ExitStack  # restores the model

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer: that of the injection, that of a glob, or the most that the layer allows."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def scaling(self, layer: LoRALayer) -> Scaling:
        """The formula of the scale of a layer, with α and its rank."""
        return Scaling(self.method.formula, self.alpha, layer.rank, "training")

    @property
    def weights(self) -> str:
        """The dtype of the frozen weights that are adapted."""
        adapted = next(iter(self.layers.values()))
        own = next(adapted.base_layer.parameters(), None)
        return "" if own is None else str(own.dtype).removeprefix("torch.")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained, each once: factors, magnitudes and heads."""
        return [parameter for group in self.groups(lr=1.0) for parameter in group["params"]]

    @property
    def trainable(self) -> int:
        """The number of parameters that are trained."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def frozen(self) -> int:
        """The number of parameters of the original model that are not trained."""
        # With frozen A a factor has no gradient either, but it is not part of the original model.
        ours = {id(parameter) for layer in self.layers.values() for parameter in layer.parameters(recurse=False)}
        return sum(p.numel() for p in self.model.parameters() if not p.requires_grad and id(p) not in ours)

    def groups(self, *, lr: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser of torch: "A", "B", "magnitude" and "heads", without empty ones.

        The learning rate is ``lr``, and for B ``lr`` times the ratio of the method, such as 16 for LoRA+. The B of an
        embedding is the factor that is drawn at random, so it is in the group "A".
        """
        parts: dict[str, list[nn.Parameter]] = {"A": [], "B": [], "magnitude": [], "heads": []}
        for layer in self.layers.values():
            parts["A"].append(layer.A)
            parts["A" if layer.kind == "embedding" else "B"].append(layer.B)
            if layer.magnitude is not None:
                parts["magnitude"].append(layer.magnitude)
        parts["heads"] = [parameter for head in self.heads.values() for parameter in head.parameters()]
        return self._as_groups(parts, lr)

    def _as_groups(self, parts: Mapping[str, Sequence[Tensor]], lr: float) -> list[dict[str, Any]]:
        rates = {"B": lr * self.method.ratio}
        groups = []
        for name, group_parameters in parts.items():
            # dict.fromkeys, since heads may share a parameter, and an optimiser accepts each once.
            params = [parameter for parameter in dict.fromkeys(group_parameters) if parameter.requires_grad]
            if params:
                groups.append({"name": name, "params": params, "lr": rates.get(name, lr)})
        return groups

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the injection except for its targets and heads, as JSON holds them."""
        return {
            "method": self.method.name,
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "seed": self.seed,
            "initialisation": self.initialisation,
            # It is left out if it is empty, so that the record of an ordinary run stays short.
            **({"rank_pattern": dict(self.rank_pattern)} if self.rank_pattern else {}),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name: factors, magnitudes, and all tensors of the heads."""
        tensors: dict[str, Tensor] = {
            f"{name}.{own}": tensor
            for name, layer in self.layers.items()
            for own, tensor in layer.named_parameters(recurse=False)
            if tensor.requires_grad
        }
        for name, head in self.heads.items():
            # Buffers too: the running statistics of a head change in training.
            tensors |= {f"{name}.{own}": tensor for own, tensor in head.state_dict(keep_vars=True).items()}
        return tensors

    @torch.no_grad()
    def remove(self) -> None:
        """Restore the original layers: the same objects with the same bits, trainable if they were trainable before.

        The factors stay in ``layers`` and can still be read. Heads get their original values back, so an adapter with
        heads must be read before. Changes that the model makes by itself when it is called remain, such as those of
        ``nn.Embedding(max_norm=…)``, which shortens the rows that it looks up.
        """
        self._undo.close()


def keep_trainable(model: nn.Module, undo: ExitStack) -> None:
    """Restore, when all is undone, which parameters are trainable; the heads may not have been."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def restore() -> None:
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)

    undo.callback(restore)


@takes_options
def inject(model: nn.Module, *, options: LoraOptions, gradients: Gradients | None = None) -> Injection:
    """Put LoRA layers into a model, and freeze the rest of it.

    The model is changed in place and computes the same as before (with DoRA and with starts other than ``kaiming`` and
    ``gaussian`` up to rounding). The names of the adapted layers end with ``.base_layer`` now. What ``torch.compile``
    has wrapped has the names of the modules inside. A model is wrapped for distributed training after this call.
    Running statistics are frozen in training too, see `loralens.training.injection`.

    Parameters
    ----------
    model : nn.Module
    options : LoraOptions
        The layers and the method, see `loralens.training.targets.LoraOptions`.
    gradients : mapping of str to tensor, or callable, optional
        For the start ``lora-ga``, the gradient of the loss with respect to the weight of every layer, by the name of
        the layer; or a function that computes these from the weights by name. `loralens.training.fit` gives them.

    Returns
    -------
    Injection
        The layers, and a method `Injection.remove` that restores the model.

    Raises
    ------
    OptionError
        A glob matches nothing; the rank is larger than any matrix allows; the model has LoRA layers already; the weight
        of a head is tied to one of a module that is no head; a weight has no numbers (meta or lazy; for PiSSA also
        infinite numbers and NaN) or holds codes; an argument is not of its type. The model has not been changed.
    """
    row = options.row
    check_model(model)
    # In evaluation mode, since reading a parametrised weight (a spectral norm) in training mode changes it.
    with keep_modes(model):
        model.eval()
        plan = plan_layers(model, options, say=World.current().main)
        named, kinds, ranks, tops, numbers = plan
        if World.current().main and ALL_LINEAR in glob_list(options.targets, "targets"):
            note_left_out(model, kinds, (*tops, *excluded_modules(named, options.exclude)))
        if coded := [name for name in kinds if has_codes(named[name])]:
            what = f"the weight of {coded[0]} is codes, which only PEFT's layers adapt"
            raise OptionError(what, fix="train it by TRL: --backend trl; or load the model in 16 or 32 bits")
        if row.start == "lora-ga" and callable(gradients):
            weights: dict[str, Any] = {name: named[name].weight for name in kinds}
            gradients = gradients(weights)
        given = gradients if isinstance(gradients, Mapping) else {}
        layers, digests = make_layers(named, kinds, ranks, row, numbers, gradients=given)
    undo = ExitStack()
    keep_trainable(model, undo)
    full = {name: named[name] for name in sorted(tops, key=natural_key)}
    # They are copied before anything is widened or trained, so that remove() gives back the same bits.
    undo.callback(restore_tensors, copy_tensors(full.values()))
    _replace_layers(model, layers, undo)
    _freeze_base(model, layers, full, frozen=row.frozen)
    freeze_statistics(model, undo, heads=full.values())
    for handle in widen_heads(full.values()):
        undo.callback(handle.remove)
    how = RECORDED.get(row.start, row.start)
    return Injection(
        model=model, layers=layers, heads=full, method=row, **numbers, initialisation=how, digests=digests, _undo=undo
    )


def _replace_layers(model: nn.Module, layers: Mapping[str, LoRALayer], undo: ExitStack) -> None:
    """Put every LoRA layer in the place of its frozen layer, or in all places if the layer is in several."""
    for layer in layers.values():  # which were built in evaluation mode
        layer.training = layer.base_layer.training
    ours = {id(layer.base_layer): layer for layer in layers.values()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is None or id(child) not in ours:
                continue
            layer = ours[id(child)]
            parent._modules[name] = layer
            undo.callback(_put_back, parent, name, layer)
            # In evaluation nn.TransformerEncoderLayer has a fast path that reads the weights and does not call its
            # layers. It does not take this path if one of them has a hook.
            if isinstance(parent, nn.TransformerEncoderLayer):
                layer.register_forward_pre_hook(_do_nothing)
    for encoder in model.modules():
        # Only that fast path takes nested tensors.
        if isinstance(encoder, nn.TransformerEncoder):
            undo.callback(setattr, encoder, "use_nested_tensor", encoder.use_nested_tensor)
            encoder.use_nested_tensor = False


def _put_back(parent: nn.Module, name: str, layer: LoRALayer) -> None:
    # A place that other code has filled in the meantime is left alone.
    if parent._modules.get(name) is layer:
        parent._modules[name] = layer.base_layer


def _do_nothing(layer: nn.Module, inputs: Any) -> None:
    """A hook that is only there to exist, see `_replace_layers`."""
    del layer, inputs


def _freeze_base(
    model: nn.Module, layers: Mapping[str, LoRALayer], heads: Mapping[str, nn.Module], *, frozen: bool
) -> None:
    """Require gradients only of the factors, the magnitudes and the heads; ``frozen`` excludes the drawn factors."""
    model.requires_grad_(False)
    for layer in layers.values():
        # Without recursion, which would reach the frozen layer.
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(True)
        if frozen:
            (layer.B if layer.kind == "embedding" else layer.A).requires_grad_(False)
    for head in heads.values():
        head.requires_grad_(True)


def check_reached(injection: Injection, *, parallel: bool, first: bool) -> None:
    """Warn of LoRA layers that the first step has not reached: if the model never calls them, their updates stay 0.

    The state space models of transformers, such as Jamba, use the weight of ``dt_proj`` without calling the layer. An
    expert that is a module of its own may only not have been chosen.

    Raises
    ------
    OptionError
        Of several processes, this one does not reach a layer or a head. DDP takes the mean of the gradients of a step
        when all of them are there.
    """
    # Without recursion for a layer, whose frozen part gets no gradient.
    parameters = {name: layer.parameters(recurse=False) for name, layer in injection.layers.items()}
    parameters |= {name: head.parameters() for name, head in injection.heads.items()} if parallel else {}
    names = [name for name, own in parameters.items() if any(p.requires_grad and p.grad is None for p in own)]
    if not names or not (parallel or first):
        return
    counts = Counter(kind(name) for name in names)
    which = some(counted(counts))
    kinds = ",".join(counts)
    if parallel:
        raise OptionError(
            f"a step gives no gradient to {which}, which DDP needs: the model has not called these layers",
            fix=f"leave them out: give {kinds} to --exclude; or train in one process or with --shard",
        )
    warn(
        f"the first step gives no gradient to {which}, which the model has not called",
        f"leave out layers that it never calls: give {kinds} to --exclude",
    )
