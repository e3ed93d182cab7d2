"""What a loss function returns: a sum with the number of its terms, or a mean."""

import reprlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from loralens.errors import OptionError
from loralens.training.course import as_float

Loss = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Any]]


def loss_and_count(returned: Any) -> tuple[Tensor, Tensor | float]:
    """The loss and the number of its terms, from the return value of a loss function; 1 where it is a mean."""
    loss, over = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, 1)
    number = over.detach().reshape(()) if isinstance(over, Tensor) and over.numel() == 1 else as_float(over)
    if not isinstance(loss, Tensor) or number is None:
        raise OptionError(
            f"the loss is {reprlib.repr(returned)}, which is not a tensor",
            fix="return a tensor with one number, or a pair of it and the number of its terms",
        )
    if loss.ndim:
        raise OptionError(
            f"the loss has the shape {tuple(loss.shape)}, and it must be one number", fix="return its mean or its sum"
        )
    if not loss.requires_grad:
        raise OptionError(
            "the loss depends on nothing that is trained", fix="compute it from the model's output, with gradients on"
        )
    return loss, number
