"""Makes the LoRA layers of an injection, with their first factors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from loralens.core.layers import compute_dtype
from loralens.core.scaling import scale_of
from loralens.training.initialisation import Pair, draw_pair, factor_digest, subtracted_pair
from loralens.training.layers.dora import add_magnitude
from loralens.training.layers.experts import ExpertLayer
from loralens.training.layers.layer import LoRALayer
from loralens.training.layers.quantised import QuantisedLayer
from loralens.training.method import TrainingMethod


def make_layers(
    named: dict[str, nn.Module],
    kinds: Mapping[str, type[LoRALayer]],
    ranks: Mapping[str, int],
    method: TrainingMethod,
    *,
    alpha: float,
    dropout: float,
    seed: int,
    gradients: Mapping[str, Tensor],
) -> tuple[dict[str, LoRALayer], dict[str, str]]:
    """The LoRA layers by name, and the digests of the factors that were drawn, one for each expert of a stack."""
    layers: dict[str, LoRALayer] = {}
    digests: dict[str, str] = {}
    for name, kind in kinds.items():
        if kind is ExpertLayer:
            layers[name] = _make_experts(name, named, method, rank=ranks[name], alpha=alpha, seed=seed)
            digests |= {f"{name}[{e}]": factor_digest(A) for e, A in enumerate(layers[name].A)}
            continue
        layers[name] = layer = _make_layer(
            name,
            named[name],
            kind,
            method,
            rank=ranks[name],
            alpha=alpha,
            dropout=dropout,
            seed=seed,
            gradient=gradients.get(name),
        )
        # The factor that is drawn: for an embedding B, since A is 0. A start from W or a gradient draws neither.
        digests[name] = factor_digest(layer.B if kind.kind == "embedding" and not method.subtracted else layer.A)
    return layers, digests


def no_experts(method: TrainingMethod, dropout: float) -> str:
    """What keeps stacks of experts from being adapted, as in PEFT; empty if nothing does."""
    # The weights of all experts are changed before the inputs are known, so that no input can be dropped.
    return method.name if method.magnitude or method.subtracted else "dropout" if dropout else ""


def matrix_of(module: nn.Module, kind: type[LoRALayer], name: str) -> Tensor:
    """The matrix of a layer, or that of the first expert of a stack."""
    if kind is ExpertLayer:
        return ExpertLayer.stack(module, name.rpartition(".")[2])[0]
    return kind.matrix(module)


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
    gradient: Tensor | None,
) -> LoRALayer:
    """The LoRA layer for one layer, with its first factors on the device of the weight."""
    W, scale = kind.matrix(layer), scale_of(alpha, rank, method.formula)
    start = subtracted_pair(name, W, method, rank=rank, scale=scale, gradient=_as_matrix(gradient, kind))
    if start:
        # Copies, since the pair is trained and the start is not.
        pair = Pair(start.B.clone(), start.A.clone())
    else:
        embedding = kind.kind == "embedding"
        shape = (W.shape[0], W.shape[1])
        drawn = draw_pair(name, shape, rank=rank, seed=seed, start=method.start, embedding=embedding)
        pair = Pair(*(factor.to(W.device, compute_dtype(W)) for factor in drawn))
    lora_layer = kind(layer, pair, scale=scale, dropout=dropout, start=start)
    if method.magnitude:
        add_magnitude(lora_layer)
    return lora_layer


def _as_matrix(gradient: Tensor | None, kind: type[LoRALayer]) -> Tensor | None:
    """The gradient of a weight in the shape (out, in) of the matrix of its layer."""
    # Codes have no gradient of their own, so that whoever gives one gives that of the matrix.
    if gradient is None or kind is QuantisedLayer:
        return gradient
    holder = nn.Module()
    # A layer of any kind finds the matrix in the attribute ``weight``.
    holder.weight = nn.Parameter(gradient, requires_grad=False)
    return kind.matrix(holder)


@torch.no_grad()
def _make_experts(
    name: str,
    named: dict[str, nn.Module],
    method: TrainingMethod,
    *,
    rank: int,
    alpha: float,
    seed: int,
) -> ExpertLayer:
    """The LoRA layer of a stack of experts, which takes the place of its module in ``named`` too."""
    path, _, parameter = name.rpartition(".")
    W = ExpertLayer.stack(named[path], parameter)
    count, out, in_ = W.shape
    drawn = [draw_pair(f"{name}[{e}]", (out, in_), rank=rank, seed=seed, start=method.start) for e in range(count)]
    pair = Pair(*(torch.stack(factors).to(W.device, compute_dtype(W)) for factors in zip(*drawn, strict=True)))
    layer = ExpertLayer(named[path], pair, parameter=parameter, scale=scale_of(alpha, rank, method.formula))
    named[path] = layer  # so that the layer of the next parameter of the module is around this one
    return layer
