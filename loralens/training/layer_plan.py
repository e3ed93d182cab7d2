"""What an injection would adapt: the layers, their ranks and the heads. Nothing is changed for it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from loralens.training.checks import check_weight
from loralens.training.layers.construction import matrix_of, no_experts
from loralens.training.layers.experts import ExpertLayer
from loralens.training.layers.layer import LoRALayer
from loralens.training.method import TrainingMethod
from loralens.training.ranks import layer_ranks
from loralens.training.targets import choose_heads, choose_layers, modules_by_name, warn_of_doubles, with_stacks


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
    """

    named: dict[str, nn.Module]
    kinds: Mapping[str, type[LoRALayer]]
    ranks: Mapping[str, int]
    heads: Sequence[str]


def plan_layers(
    model: nn.Module,
    method: TrainingMethod,
    *,
    targets: str | Sequence[str],
    exclude: str | Sequence[str],
    rank: int,
    rank_pattern: Mapping[str, int],
    heads: str | Sequence[str],
    dropout: float,
    say: bool = False,
) -> LayerPlan:
    """Choose the layers, their ranks and the heads, as `inject` does, and leave the model as it is.

    Raises
    ------
    OptionError
        A glob matches nothing, or the rank is larger than any matrix allows.
    """
    named = with_stacks(modules_by_name(model))
    tops = choose_heads(model, heads)
    kinds = choose_layers(model, targets, heads=tops, exclude=exclude, no_experts=no_experts(method, dropout))
    if say:
        warn_of_doubles(model, {name: named[name] for name, kind in kinds.items() if kind is not ExpertLayer})
    sides = {name: check_weight(name, matrix_of(named[name], kind, name)) for name, kind in kinds.items()}
    return LayerPlan(named, kinds, layer_ranks(sides, rank=rank, pattern=rank_pattern, say=say), tops)
