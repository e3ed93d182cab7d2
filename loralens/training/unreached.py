"""Layers that a step does not reach: they get no gradient, and DDP waits for it."""

from collections import Counter

from loralens.core.messages import warn
from loralens.core.names import kind, some
from loralens.errors import OptionError
from loralens.training.injection import Injection


def unreached_layers(injection: Injection) -> list[str]:
    """The names of layers and heads with a parameter that got no gradient, after a backward pass."""
    trained = {**injection.layers, **injection.heads}
    return [
        name
        for name, module in trained.items()
        # Without recursion for a layer, whose frozen part gets none.
        for parameters in [module.parameters(recurse=name in injection.heads)]
        if any(parameter.requires_grad and parameter.grad is None for parameter in parameters)
    ]


def warn_of_unreached(injection: Injection, names: list[str]) -> None:
    """Warn of LoRA layers that the first step has not reached: if the model never calls them, their updates stay 0.

    The state space models of transformers, such as Jamba, use the weight of ``dt_proj`` without calling the layer. An
    expert that is a module of its own may only not have been chosen.
    """
    layers = [name for name in names if name in injection.layers]
    if layers:
        kinds = ",".join(dict.fromkeys(kind(name) for name in layers))
        warn(
            f"the first step gives no gradient to {_kinds_text(layers)}, which the model has not called",
            f"leave out layers that it never calls: exclude {kinds} (--exclude {kinds})",
        )


def unreached_error(names: list[str]) -> OptionError:
    """The error for a step of several processes in which this one does not reach some layers.

    DDP takes the mean of the gradients of a step when all of them are there, so those of the step are not complete.
    """
    kinds = ",".join(dict.fromkeys(kind(name) for name in names))
    return OptionError(
        f"a step gives no gradient to {_kinds_text(names)}, which DDP needs: the model has not called these layers",
        fix=f"leave them out: exclude {kinds} (--exclude {kinds}); or train in one process or with --shard",
    )


def _kinds_text(names: list[str]) -> str:
    counts = Counter(kind(name) for name in names)
    return some([f"{name} ({n} of them)" if n > 1 else name for name, n in counts.items()])
