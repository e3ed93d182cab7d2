"""The optimisers of a run, made from its course."""

from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from loralens.errors import OptionError
from loralens.training.course import Course, optimiser_name

Groups = list[dict[str, Any]]
FACTORS = ("A", "B")  # the names of the groups whose parameters are matrices of pairs


def make_optimiser(groups: Groups, course: Course, *, device: torch.device, shard: bool = False) -> Optimizer:
    """The optimiser of a course for the parameter groups of an injection.

    Raises
    ------
    OptionError
        This torch has no Muon; the function of the caller returns no optimiser, or one of other parameters.
    """
    if callable(course.optimiser):
        return _of_caller(groups, course)
    if course.optimiser == "sgd":
        return SGD(groups, lr=course.lr)
    if course.optimiser == "muon":
        return _muon(groups, course, device=device, shard=shard)
    return _adamw(groups, course, device=device, shard=shard)


def _adamw(groups: Groups, course: Course, *, device: torch.device, shard: bool) -> AdamW:
    # One kernel for all parameters on a GPU of CUDA. Not for shards, which not every torch can fuse; there torch itself
    # updates all parameters together (foreach). On a CPU the numbers stay those of torch's plain loop.
    fused = device.type == "cuda" and not shard
    return AdamW(
        groups,
        lr=course.lr,
        betas=(course.beta1, course.beta2),
        eps=course.epsilon,
        weight_decay=course.weight_decay,
        fused=True if fused else None,
    )


def _muon(groups: Groups, course: Course, *, device: torch.device, shard: bool) -> Optimizer:
    """Muon for the factors, and AdamW for magnitudes and heads, which are no matrices that it is meant for."""
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        what = f"torch {torch.__version__} has no Muon"
        raise OptionError(what, fix="install torch 2.9 or newer, or choose --optimiser adamw")
    if any(parameter.ndim != 2 for group in groups if group["name"] in FACTORS for parameter in group["params"]):
        raise OptionError(
            "Muon takes matrices, and the factors of a stack of experts have three axes",
            fix="leave the stacks out (--exclude), or choose --optimiser adamw",
        )
    factors = [group for group in groups if group["name"] in FACTORS]
    other_groups = [group for group in groups if group["name"] not in FACTORS]
    # Steps of the length that AdamW's have, so that one learning rate serves both.
    first = muon(factors, lr=course.lr, weight_decay=course.weight_decay, adjust_lr_fn="match_rms_adamw")
    if not other_groups:
        return cast(Optimizer, first)
    return Together([first, _adamw(other_groups, course, device=device, shard=shard)])


class Together(Optimizer):
    """Several optimisers as one: each updates its own parameters.

    Parameters
    ----------
    optimisers : sequence of Optimizer
    """

    def __init__(self, optimisers: Sequence[Optimizer]) -> None:
        self.optimisers = list(optimisers)
        super().__init__([group for one in self.optimisers for group in one.param_groups], {})
        # The groups themselves, since each optimiser reads the learning rate of its own.
        self.param_groups = [group for one in self.optimisers for group in one.param_groups]
        self.state = _States(self.optimisers)  # type: ignore[assignment]

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take a step with each."""
        for optimiser in self.optimisers:
            optimiser.step(closure)


class _States(dict[Tensor, Any]):
    """The states of all parameters, each kept by the optimiser that updates it."""

    def __init__(self, optimisers: Sequence[Optimizer]) -> None:
        super().__init__()
        self._owner: dict[Tensor, Any] = {
            parameter: one.state for one in optimisers for group in one.param_groups for parameter in group["params"]
        }

    def get(self, parameter: Tensor, default: Any = None) -> Any:
        return self._owner.get(parameter, {}).get(parameter, default)

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._owner[parameter][parameter]

    def __setitem__(self, parameter: Tensor, state: Any) -> None:
        self._owner[parameter][parameter] = state


def _of_caller(groups: Groups, course: Course) -> Optimizer:
    assert callable(course.optimiser)
    optimiser = course.optimiser(groups)
    name = optimiser_name(course.optimiser)
    if not isinstance(optimiser, Optimizer):
        what = f"optimiser {name} returned a {type(optimiser).__name__}"
        raise OptionError(what, fix="return an optimiser of torch, made of the groups that the function is given")
    # LBFGS, for example, computes the loss several times in a step.
    closure = signature(optimiser.step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        what = f"optimiser {name} needs a closure that computes the loss anew, which a run does not give"
        raise OptionError(what, fix="choose an optimiser that takes a step from gradients alone")
    ours = {id(parameter) for group in groups for parameter in group["params"]}
    theirs = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
    if ours != theirs:
        what = f"optimiser {name} does not have the parameters of the run"
        raise OptionError(what, fix="give it all the groups that the function is given, and nothing else")
    return optimiser
