"""Access to the weights of a model in memory: they are read as NumPy arrays and written in place.

On the CPU the array is the memory of the parameter itself, with bf16 and float8 passed as bits. On any other device the
array is a copy, and writing copies it back, one weight at a time.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import ml_dtypes
import numpy as np

from loralens.core.attached import Tree
from loralens.core.lazy import Array, LazyArray
from loralens.errors import MismatchError, OptionError

if TYPE_CHECKING:  # importing torch takes 1.4 s, so functions that use it import it
    from torch import Tensor, nn

# torch's .numpy() knows neither bfloat16 nor float8.
_BITS = {1: "int8", 2: "int16"}  # bytes of a float dtype → integer dtype of torch and NumPy that carries its bits


@final
class ArraySlot:
    """A weight that is a NumPy array."""

    __slots__ = ("_array", "dtype", "shape")

    def __init__(self, array: Array) -> None:
        self._array, self.shape, self.dtype = array, array.shape, array.dtype

    @property
    def address(self) -> int:
        """The address of the first number. Two slots with the same address share their numbers."""
        return int(self._array.__array_interface__["data"][0])

    def read(self) -> Array:
        """The array itself, which must not be modified."""
        return self._array

    def write(self, array: Array) -> None:
        """Overwrite the numbers with others of the same shape and dtype."""
        # casting="no": another dtype here would be a bug, not a conversion.
        np.copyto(self._array, array, casting="no")


@final
class TensorSlot:
    """A weight that is a parameter of a torch module.

    The parameter is looked up at each access, since the module may have replaced it.
    """

    __slots__ = ("_key", "_tree", "dtype", "shape")

    def __init__(self, tree: Tree, key: str) -> None:
        self._tree, self._key = tree, key
        tensor = tree.parameter(key)
        self.shape: tuple[int, ...] = tuple(tensor.shape)
        self.dtype = _dtype(tensor)

    @property
    def address(self) -> int:
        """The address of the first number on its device."""
        return int(self._tensor().data_ptr())

    def read(self) -> Array:
        """The memory of the parameter, or a copy if it is on another device than the CPU. It must not be modified."""
        return _numpy(self._tensor(), self.dtype)

    def write(self, array: Array) -> None:
        """Copy the array into the storage of the parameter."""
        tensor = self._tensor()
        if tensor.device.type == "cpu":
            # The array shares its memory with the parameter, so this writes in place.
            # As bits where NumPy does not have the dtype and would copy number by number.
            target = _numpy(tensor, self.dtype)
            assert array.dtype == target.dtype
            carrier = _BITS.get(self.dtype.itemsize, self.dtype)
            np.copyto(target.view(carrier), array.view(carrier), casting="no")
            return
        import torch

        numbers, bits = np.ascontiguousarray(array), _BITS.get(self.dtype.itemsize)
        tensor.copy_(torch.from_numpy(numbers.view(bits) if bits else numbers).view(tensor.dtype))

    def _tensor(self) -> "Tensor":
        tensor = self._tree.parameter(self._key).detach()
        # Moving a model to another device is allowed; another shape or dtype makes the patch meaningless.
        if tuple(tensor.shape) != self.shape or _dtype(tensor) != self.dtype:
            raise MismatchError(
                f"{self._key} was {self.dtype} {self.shape} and is {_dtype(tensor)} {tuple(tensor.shape)} now",
                fix="make a new Switchboard after changing the model: this one cannot restore its base",
            )
        return tensor


WeightSlot = ArraySlot | TensorSlot


def _dtype(tensor: "Tensor") -> np.dtype[Any]:
    """NumPy's dtype of a tensor; ``void`` if it is quantised or on the meta device."""
    name = str(tensor.dtype).removeprefix("torch.")
    # `void` is no float, so `check_slot_writable` refuses it with a message.
    if tensor.device.type == "meta" or not tensor.dtype.is_floating_point:
        return np.dtype(np.void)
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def _numpy(tensor: "Tensor", dtype: np.dtype[Any]) -> Array:
    """A tensor as an array, which shares its memory on the CPU."""
    import torch

    # float16 could be passed as it is, but it takes the path of bfloat16: both have two bytes.
    bits = _BITS.get(dtype.itemsize)
    array: Array = (tensor.view(getattr(torch, bits)) if bits else tensor).cpu().numpy()
    return array.view(dtype)


def slots_of(model: "nn.Module | Mapping[str, Array]") -> dict[str, WeightSlot]:
    """The weights of a model by key.

    Raises
    ------
    OptionError
        It is neither a torch module nor a mapping of arrays.
    """
    if isinstance(model, Mapping):
        return {key: ArraySlot(array) for key, array in model.items()}
    if not hasattr(model, "named_modules"):
        raise OptionError(f"{type(model).__name__} is not a model", fix="give a torch module, or a mapping of arrays")
    tree = Tree.of(model)
    return {key: TensorSlot(tree, key) for key in tree.parameters}


def has_conv1d_layers(model: "nn.Module | Mapping[str, Array]") -> bool:
    """Whether a torch module has linear layers that store their weight as (in, out), as GPT-2 does."""
    if isinstance(model, Mapping):
        return False
    return any(type(layer).__name__ == "Conv1D" for layer in model.modules())


def lazy_weight(slot: WeightSlot) -> LazyArray:
    """The weight as a `LazyArray`, which matching and merging need."""
    return LazyArray(slot.read, shape=slot.shape, dtype=slot.dtype)


def check_slot_writable(key: str, slot: WeightSlot) -> None:
    """Refuse a weight that cannot be changed in place.

    Raises
    ------
    MismatchError
        The weight is not of a float dtype, or is read-only.
    """
    if slot.dtype.kind not in "fV" or slot.dtype == np.void:
        raise MismatchError(
            f"{key} is not of a float dtype: it is quantised, or on the meta device",
            fix="load the model in 16 or 32 bits",
        )
    if isinstance(slot, ArraySlot) and not slot.read().flags.writeable:
        raise MismatchError(f"{key} is read-only", fix="pass writable arrays: np.array(array)")
