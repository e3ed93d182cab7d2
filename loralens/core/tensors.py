"""Tensors and models of torch, read as arrays.

torch itself is not imported here, because whoever has a tensor has imported it.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from loralens.core.lazy import Array, LazyArray

if TYPE_CHECKING:
    from torch import Tensor

# Types of torch that NumPy itself does not have. Their bits are passed on as whole numbers of the same width.
BITS = {
    "torch.bfloat16": (np.dtype(ml_dtypes.bfloat16), "int16"),
    "torch.float8_e4m3fn": (np.dtype(ml_dtypes.float8_e4m3fn), "uint8"),
    "torch.float8_e5m2": (np.dtype(ml_dtypes.float8_e5m2), "uint8"),
}


def is_tensor(value: object) -> bool:
    """Whether a value is a tensor of torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_model(value: object) -> bool:
    """Whether a value is a module of torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def full_tensor(tensor: "Tensor") -> "Tensor":
    """A tensor without its gradient, gathered if it is sharded, which all processes must do at the same time."""
    gather = getattr(tensor, "full_tensor", None)
    gathered: Tensor = (gather() if gather else tensor).detach()
    return gathered


def array_of(tensor: "Tensor") -> Array:
    """A tensor as an array of the same dtype; it shares the memory of a tensor on the CPU."""
    held = full_tensor(tensor).cpu()
    wide, bits = BITS.get(str(held.dtype), (None, ""))
    if wide is None:
        array: Array = held.numpy()
        return array
    return np.asarray(held.view(getattr(sys.modules["torch"], bits)).numpy().view(wide))


def numpy_of(tensor: "Tensor") -> Array:
    """A copy of a tensor as an array of the same dtype."""
    return np.array(array_of(tensor), order="C")


def lazy_tensor(read: "Callable[[], Tensor]") -> LazyArray:
    """The tensor that ``read`` returns, which is copied to the CPU each time that the array is read."""
    tensor = read()
    dtype = array_of(tensor.detach().new_empty(0, device="cpu")).dtype
    return LazyArray(lambda: numpy_of(read()), shape=tuple(tensor.shape), dtype=dtype)


def lazy_value(value: Any) -> LazyArray:
    """A tensor or an array of a state dict, unread."""
    return lazy_tensor(lambda: value) if is_tensor(value) else LazyArray.of(np.asarray(value))
