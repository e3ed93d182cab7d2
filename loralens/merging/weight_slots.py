"""Access to the weights of a model in memory: they are read as NumPy arrays and written in place.

On the CPU the array is the memory of the parameter itself, with bf16 and float8 passed as bits. On any other device the
array is a copy, and writing copies it back, one weight at a time. Of a weight that several processes share (FSDP2), the
array has the rows of this process.
"""

from collections.abc import Mapping
from math import ceil, prod
from typing import TYPE_CHECKING, Any, Self, final

import ml_dtypes
import numpy as np

from loralens.core.attached import Tree
from loralens.core.lazy import Array, LazyArray
from loralens.errors import MismatchError, OptionError

if TYPE_CHECKING:
    from torch import Tensor, nn


@final
class Shard:
    """The rows of a weight that this process has.

    Parameters
    ----------
    shape : tuple of int
        The shape of the whole weight.
    start, stop : int
        The range of its first axis.
    """

    def __init__(self, shape: tuple[int, ...], start: int, stop: int) -> None:
        self.shape, self.start, self.stop = shape, start, stop

    @classmethod
    def of(cls, tensor: "Tensor") -> Self | None:
        """The shard of a distributed tensor; None if it is divided otherwise than along its first axis."""
        distributed: Any = tensor
        shape, start, stop = tuple(tensor.shape), 0, tensor.shape[0] if tensor.ndim else 0
        divided = [(axis, place) for axis, place in enumerate(distributed.placements) if not place.is_replicate()]
        # The class, since other kinds of shards (strided ones, as of tensor parallelism) are subclasses.
        if len(divided) > 1 or any(type(place).__name__ != "Shard" or place.dim != 0 for _, place in divided):
            return None
        if divided:
            mesh, axis = distributed.device_mesh, divided[0][0]
            # As torch.chunk: all parts are equal, except the last ones, which may be smaller or empty.
            height, rank = ceil(stop / mesh.size(axis)), mesh.get_local_rank(axis)
            start, stop = min(rank * height, stop), min((rank + 1) * height, stop)
        return cls(shape, start, stop) if distributed.to_local().shape[:1] == (stop - start,) else None

    def divides(self, matrix: tuple[int, int]) -> bool:
        """Whether processes have whole rows of the weight as a matrix. A vector is one row."""
        return len(self.shape) > 1 and matrix[0] % max(self.shape[0], 1) == 0

    def rows_of(self, matrix: tuple[int, int]) -> tuple[int, int]:
        """The range of rows of the weight as a matrix: the experts of a stack lie one below the other."""
        height = matrix[0] // max(self.shape[0], 1)
        return self.start * height, self.stop * height

    def as_part(self, own: Array) -> LazyArray:
        """The whole weight as an array of which only the rows of this process, ``own``, can be read."""
        flat, offset = own.reshape(-1), self.start * prod(self.shape[1:])

        def read() -> Array:
            raise AssertionError("rows of other processes were read")

        def numbers(start: int, stop: int) -> Array:
            assert offset <= start <= stop <= offset + flat.size, (start, stop, offset, flat.size)
            return flat[start - offset : stop - offset]

        return LazyArray(read, shape=self.shape, dtype=own.dtype, numbers=numbers)


def gather_shards(own: "Tensor", like: "Tensor") -> "Tensor":
    """The whole weight, from the rows ``own`` of every process; all processes must call this at the same time."""
    from torch.distributed.tensor import DTensor

    distributed: Any = like
    whole_weight: Tensor = DTensor.from_local(
        own, distributed.device_mesh, distributed.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()
    return whole_weight


# torch's .numpy() knows neither bfloat16 nor float8.
_BITS = {1: "int8", 2: "int16"}  # bytes of a float dtype → integer dtype of torch and NumPy that carries its bits


@final
class ArraySlot:
    """A weight that is a NumPy array."""

    shard = None  # an array is always whole

    def __init__(self, array: Array) -> None:
        self._array, self.shape, self.dtype, self.nbytes = array, array.shape, array.dtype, array.nbytes
        # The address of the first number. Two slots with the same address share their numbers.
        self.address = int(array.__array_interface__["data"][0])

    def read(self) -> Array:
        """The array itself, which must not be modified."""
        return self._array

    def whole_weight(self, own: Array) -> Array:
        """The whole weight: ``own`` itself."""
        return own

    def write(self, array: Array) -> None:
        """Overwrite the numbers with others of the same shape and dtype."""
        # casting="no": another dtype here would be a bug, not a conversion.
        np.copyto(self._array, array, casting="no")


@final
class TensorSlot:
    """A weight that is a parameter of a torch module, or the rows of it that this process has.

    The parameter is looked up at each access, since the module may have replaced it.

    Attributes
    ----------
    shape : tuple of int
        The shape of the whole weight.
    is_divided : bool
        Whether several processes share the weight.
    shard : Shard or None
        The rows of this process; None if the weight is not divided, or not by rows.
    """

    def __init__(self, tree: Tree, key: str) -> None:
        self._tree, self._key = tree, key
        tensor = tree.parameter(key)
        self.shape: tuple[int, ...] = tuple(tensor.shape)
        self.dtype, self.is_divided = _dtype(tensor), _is_divided(tensor)
        self.shard = Shard.of(tensor) if self.is_divided else None

    @property
    def address(self) -> int:
        """The address of the first number on its device. Slots with the same address share their numbers."""
        own = self._own()
        # A process without a row has no address. The object is the same where parameters are tied.
        return int(own.data_ptr()) if own.numel() else -id(self._tree.parameter(self._key))

    @property
    def nbytes(self) -> int:
        """The bytes that this process has."""
        return self._own().numel() * self.dtype.itemsize

    def read(self) -> Array:
        """The memory of the parameter, or a copy if it is on another device than the CPU. It must not be modified."""
        return _numpy(self._own(), self.dtype)

    def whole_weight(self, own: Array) -> Array:
        """The whole weight, of which this process has ``own``; all processes that share it must call this."""
        if not self.is_divided:
            return own
        tensor = self._own()
        return _numpy(gather_shards(_tensor(own, tensor.dtype).to(tensor.device), self._parameter()), self.dtype)

    def write(self, array: Array) -> None:
        """Copy the array into the storage of the parameter."""
        tensor = self._own()
        if tensor.device.type == "cpu":
            # The array shares its memory with the parameter, so this writes in place.
            # As bits where NumPy does not have the dtype and would copy number by number.
            target = _numpy(tensor, self.dtype)
            assert array.dtype == target.dtype
            carrier = _BITS.get(self.dtype.itemsize, self.dtype)
            np.copyto(target.view(carrier), array.view(carrier), casting="no")
            return
        tensor.copy_(_tensor(array, tensor.dtype))

    def _own(self) -> "Tensor":
        """The numbers of the parameter that this process has."""
        tensor: Any = self._parameter()
        own: Tensor = tensor.to_local() if self.is_divided else tensor
        return own

    def _parameter(self) -> "Tensor":
        tensor = self._tree.parameter(self._key).detach()
        if _is_divided(tensor) != self.is_divided:
            raise MismatchError(
                f"{self._key} is no longer {'divided' if self.is_divided else 'whole'}",
                fix="call reshard() on the modules of FSDP2 first, or make a new Switchboard",
            )
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


def _is_divided(tensor: "Tensor") -> bool:
    """Whether a parameter is distributed over processes, as by FSDP2."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def _tensor(array: Array, dtype: Any) -> "Tensor":
    """An array as a tensor of this dtype of torch."""
    import torch

    numbers, bits = np.ascontiguousarray(array), _BITS.get(array.dtype.itemsize)
    return torch.from_numpy(numbers.view(bits) if bits else numbers).view(dtype)


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
    """The whole weight as a `LazyArray`, which matching and merging need."""
    return LazyArray(lambda: slot.whole_weight(slot.read()), shape=slot.shape, dtype=slot.dtype)


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
    if isinstance(slot, TensorSlot) and slot.is_divided and slot.shard is None:
        raise MismatchError(
            f"{key} is divided over processes in another way than by its rows",
            fix="shard the model along the first axis, as fully_shard does by default",
        )
    if isinstance(slot, ArraySlot) and not slot.read().flags.writeable:
        raise MismatchError(f"{key} is read-only", fix="pass writable arrays: np.array(array)")
