"""The classes and functions that a torch pickle may name, and their meaning. Nothing is imported by its name."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np

from loralens.errors import FormatError
from loralens.formats.files.torch.tensor import DTYPES, TorchStorage, TorchTensor

CONVERT = "ask for a safetensors file, or convert it with torch where nothing can be harmed and save only the tensors"

# torch's class of a storage → dtype. Newer dtypes have no class and use UntypedStorage.
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip


@final
@dataclass(frozen=True, slots=True)
class Name:
    """The name of a class or function in a pickle, which is never resolved."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:100]


STORAGE_DTYPES: dict[Name, np.dtype[Any]] = {
    **{Name("torch", storage): DTYPES[dtype] for storage, dtype in _STORAGES.items()},
    Name("torch.storage", "UntypedStorage"): DTYPES["uint8"],
}
TENSOR_DTYPES: dict[Name, np.dtype[Any]] = {Name("torch", name): dtype for name, dtype in DTYPES.items()}


def refuse_unusual(what: str) -> Any:
    """Refuse a pickle that makes something in another way than torch."""
    raise FormatError(f"its pickle makes {what} in a way torch does not", fix=CONVERT)


def _integer(value: object) -> int:
    return value if type(value) is int else refuse_unusual("a number")  # isinstance would accept a bool


def _integers(value: object) -> tuple[int, ...]:
    return tuple(map(_integer, value)) if isinstance(value, tuple) else refuse_unusual("a size")


# In the functions below, unpacking the wrong number of arguments raises a ValueError, which the unpickler refuses.
def _ordered_dict(*args: object) -> object:
    return {} if not args else refuse_unusual("an OrderedDict")


def _size(*args: object) -> object:
    (size,) = args
    return _integers(size)


def _parameter(*args: object) -> object:
    # Gradients and hooks belong to training, and are not looked at.
    data, _requires_grad, _hooks = args
    return data if isinstance(data, TorchTensor) else refuse_unusual("a Parameter")


def _tensor(*args: object) -> object:
    storage, offset, size, strides, _requires_grad, _hooks, *metadata = args
    if not isinstance(storage, TorchStorage) or any(metadata):
        return refuse_unusual("a tensor")
    return TorchTensor(storage, storage.dtype, _integer(offset), _integers(size), _integers(strides))


def _tensor_with_dtype(*args: object) -> object:
    storage, offset, size, strides, requires_grad, hooks, dtype, *metadata = args
    tensor = _tensor(storage, offset, size, strides, requires_grad, hooks, *metadata)
    if not isinstance(tensor, TorchTensor) or not isinstance(dtype, Name) or dtype not in TENSOR_DTYPES:
        return refuse_unusual("a tensor")
    return replace(tensor, dtype=TENSOR_DTYPES[dtype])


CALLS: dict[Name, Callable[..., object]] = {
    Name("collections", "OrderedDict"): _ordered_dict,
    Name("torch", "Size"): _size,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v3"): _tensor_with_dtype,  # float8 and the wider unsigned integers
}
NAMES = CALLS.keys() | STORAGE_DTYPES.keys() | TENSOR_DTYPES.keys()
