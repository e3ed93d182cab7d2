"""Device: where the work on a big matrix is done: NumPy on the CPU, or torch, by the same functions.

What is called with a device is written against the Python array API, so torch is imported only where a GPU is asked
for. NumPy works in float64 where one pass over the matrix is all there is; torch in float32, TF32 off.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, final

import ml_dtypes
import numpy as np
from array_api_compat import array_namespace

from loralens.errors import OptionError
from loralens.linalg.factor import Array, Floats, Scratch

ROWS = 512  # of a matrix in one piece of a product: pieces do not depend on the threads, so neither do the bits
BLOCK = 1 << 18  # numbers cast at a time on the CPU: 2 MiB in float64, which a cache holds
BLOCK_TORCH = 1 << 25  # ... on a GPU: 128 MiB in float32

Float = Literal["float32", "float64"]
T = TypeVar("T")
R = TypeVar("R")

_CUDA = re.compile(r"cuda(?::(\d+))?")
_scratch = Scratch()


@final
@dataclass(frozen=True, slots=True)
class Device:
    """Where arrays are worked on.

    Attributes
    ----------
    name : str
        ``cpu`` (NumPy), ``cuda`` or ``cuda:N``.
    threads : int
        How many of our own share the work on the CPU. More than one pays only where BLAS itself uses one.
    torch : torch.device or None
        Where torch does the work; None for NumPy.
    """

    name: str = "cpu"
    threads: int = 1
    torch: Any = None

    @classmethod
    def of(cls, name: "str | Device", *, threads: int = 1) -> "Device":
        """The device of this name, ``threads`` for the CPU; a device as it is.

        Raises
        ------
        OptionError
            An unknown name, no torch, or no such GPU.
        """
        if isinstance(name, Device):
            return name
        if name == "cpu":
            return cls(name, threads)
        found = _CUDA.fullmatch(name)
        if not found:
            raise OptionError(f"no device is called {name!r}", fix="choose cpu, cuda or cuda:N")
        return cls(name, 1, _cuda(int(found[1] or 0)))

    @property
    def dtype(self) -> Float:
        """What one pass over a matrix is computed in."""
        return "float64" if self.torch is None else "float32"

    @property
    def block(self) -> int:
        """How many numbers of a matrix are best cast at a time."""
        return BLOCK if self.torch is None else BLOCK_TORCH

    def put(self, array: Array, dtype: Float | None = None) -> Any:
        """An array of any float dtype of NumPy, here, in ``dtype``; a copy unless it is here and of that dtype."""
        dtype = dtype or self.dtype
        if self.torch is None:
            return np.asarray(array, dtype=dtype)
        import torch

        return _tensor(array).to(device=self.torch, dtype=getattr(torch, dtype))

    def cast(self, block: Array) -> Any:
        """A block of a matrix, here, in the device's dtype; on the CPU gone when the same thread casts the next."""
        if self.torch is not None:
            return self.put(block)
        if block.dtype == np.float64:
            return block
        cast = _scratch.of(block.size)[: block.size].reshape(block.shape)
        np.copyto(cast, block)
        return cast

    def empty(self, shape: tuple[int, int], dtype: Float) -> Any:
        """An array here, to be filled."""
        if self.torch is None:
            return np.empty(shape, dtype)
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.torch)

    def numpy(self, array: Any) -> Floats:
        """An array from here as NumPy's, float64."""
        return np.asarray(array if self.torch is None else array.cpu().numpy(), dtype=np.float64)

    def squares(self, x: Any) -> float:
        """Σx², added up in float64: torch's own float32 norm errs by 2e-5 for a million numbers."""
        if self.torch is None:
            flat = x.reshape(-1)
            return float(np.dot(flat, flat))
        return float((x * x).sum(dtype=array_namespace(x).float64))

    def matmul(self, X: Any, Y: Any) -> Any:
        """X @ Y; on the CPU some rows of X at a time, in threads."""
        if self.torch is not None or X.shape[0] <= ROWS:
            return X @ Y
        product = np.empty((X.shape[0], Y.shape[1]), X.dtype)

        def multiply(start: int) -> None:
            rows = slice(start, start + ROWS)
            np.matmul(X[rows], Y, out=product[rows])

        for _ in self.map(multiply, range(0, X.shape[0], ROWS)):
            pass
        return product

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """``work`` of every item, in order; items are drawn by the caller, a few ahead of the threads that work."""
        if self.threads == 1:
            yield from map(work, items)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            waiting: deque[Future[R]] = deque()
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def _cuda(index: int) -> Any:
    """The GPU of this number, float32 products in full float32."""
    try:
        import torch
    except ImportError as error:
        raise OptionError("a GPU is used through torch, which is not installed", fix="pip install torch") from error
    if not torch.cuda.is_available():
        raise OptionError("torch sees no CUDA device here", fix="leave out --device, or install a CUDA build of torch")
    if index >= torch.cuda.device_count():
        raise OptionError(f"there is no cuda:{index}", fix=f"the last one is cuda:{torch.cuda.device_count() - 1}")
    torch.set_float32_matmul_precision("highest")
    return torch.device("cuda", index)


def _tensor(array: Array) -> Any:
    """The same numbers as a torch tensor on the CPU; bfloat16 stays what it is, narrower floats become float32."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16)
    plain = array if array.dtype in (np.float16, np.float32, np.float64) else array.astype(np.float32)
    return torch.from_numpy(np.array(plain))  # a copy: torch takes no read-only memory
