"""Weights that several processes share, each with some of the rows, as FSDP2 divides them."""

from math import ceil, prod
from typing import TYPE_CHECKING, Any, Self, final

from loralens.core.lazy import Array, LazyArray

if TYPE_CHECKING:  # importing torch takes 1.4 s
    from torch import Tensor


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

    __slots__ = ("shape", "start", "stop")

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
