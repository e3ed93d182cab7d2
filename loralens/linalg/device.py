"""`Device`: the place where a big matrix is worked on, either NumPy on the CPU or torch on a GPU.

Functions that take a device are written for the Python array API and serve both. torch is imported only if a GPU is
requested. For single passes over a matrix, NumPy computes in float64 and torch in float32 without TF32.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, final

import ml_dtypes
import numpy as np

from loralens.errors import OptionError
from loralens.linalg.blocks import ReusedMemory, Scratch
from loralens.linalg.factor import Array, Floats
from loralens.requirements import missing_packages

# Rows in one part of a product. The parts do not depend on the number of threads, so neither do the bits of the result.
ROWS = 512
BLOCK = 1 << 18  # numbers cast at a time on the CPU: 2 MiB in float64, which fits into a cache
BLOCK_TORCH = 1 << 25  # numbers cast at a time on a GPU: 128 MiB in float32, so that few copies are launched

Float = Literal["float32", "float64"]
T = TypeVar("T")
R = TypeVar("R")

_CUDA = re.compile(r"cuda(?::(\d+))?")
_scratch = Scratch()


@final
@dataclass(frozen=True, slots=True)
class Device:
    """The place where arrays are worked on.

    Attributes
    ----------
    name : str
        ``cpu`` (NumPy), ``cuda`` or ``cuda:N``.
    threads : int
        Number of threads that share the work on the CPU. More than one helps only if BLAS itself uses one.
    torch : torch.device or None
        The device of torch; None for NumPy.
    """

    name: str = "cpu"
    threads: int = 1
    torch: Any = None

    @classmethod
    def of(cls, name: "str | Device", *, threads: int = 1) -> "Device":
        """The device of this name (``threads`` is for the CPU); a `Device` is returned unchanged.

        Raises
        ------
        OptionError
            The name is unknown, torch is not installed, or there is no such GPU.
        """
        if isinstance(name, Device):
            return name
        if name == "cpu":
            return cls(name, threads)
        cuda = _CUDA.fullmatch(name)
        if not cuda:
            raise OptionError(f"no device is called {name!r}", fix="choose cpu, cuda or cuda:N")
        return cls(name, 1, _cuda(int(cuda[1] or 0)))

    @property
    def dtype(self) -> Float:
        """The dtype in which single passes over a matrix are computed."""
        return "float64" if self.torch is None else "float32"

    @property
    def xp(self) -> Any:
        """The functions of the Python array API for arrays of this device."""
        # NumPy has them itself. Its wrapper would load all of NumPy, also what tests and Fortran need: 20 MiB.
        if self.torch is None:
            return np
        import array_api_compat.torch

        return array_api_compat.torch

    @property
    def block(self) -> int:
        """The number of entries of a matrix that is best cast at a time."""
        return BLOCK if self.torch is None else BLOCK_TORCH

    def put(self, array: Array, dtype: Float | None = None) -> Any:
        """A NumPy array of any float dtype on this device, in ``dtype``; it is copied only if necessary."""
        dtype = dtype or self.dtype
        if self.torch is None:
            return np.asarray(array, dtype=dtype)
        import torch

        return _tensor(array).to(device=self.torch, dtype=getattr(torch, dtype))

    def cast(self, block: Array) -> Any:
        """A block of a matrix on this device, in its dtype; on the CPU the next call in the thread overwrites it."""
        if self.torch is not None:
            return self.put(block)
        if block.dtype == np.float64:
            return block
        cast = _scratch.of(block.size)[: block.size].reshape(block.shape)
        np.copyto(cast, block)
        return cast

    def astype(self, X: Any, dtype: Float) -> Any:
        """An array of this device in ``dtype``; it is copied only if necessary."""
        # NumPy has the function of the array API from version 2.1 on.
        return (
            X.astype(dtype, copy=False)
            if self.torch is None
            else self.xp.astype(X, getattr(self.xp, dtype), copy=False)
        )

    def empty(self, shape: tuple[int, int], dtype: Float) -> Any:
        """An uninitialised array on this device."""
        if self.torch is None:
            return np.empty(shape, dtype)
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.torch)

    def memory(self) -> Callable[[tuple[int, int], Float], Any]:
        """A function like `empty` that may give the same memory again, so that only its last array is valid."""
        if self.torch is not None:
            return self.empty  # torch uses freed memory of a GPU again
        reused = ReusedMemory()
        return lambda shape, dtype: reused(shape, np.dtype(dtype))

    def numpy(self, array: Any) -> Floats:
        """An array of this device as a NumPy array, float64."""
        return np.asarray(array if self.torch is None else array.cpu().numpy(), dtype=np.float64)

    def squares(self, x: Any) -> float:
        """Σx², summed in float64, since the float32 norm of torch has an error of 2e-5 for a million numbers."""
        if self.torch is None:
            # np.dot of one long vector runs in BLAS and makes no copy.
            flat = x.reshape(-1)
            return float(np.dot(flat, flat))
        return float((x * x).sum(dtype=self.xp.float64))

    def matmul(self, X: Any, Y: Any) -> Any:
        """X @ Y; on the CPU the threads share the rows of X."""
        if self.torch is not None or X.shape[0] <= ROWS:
            return X @ Y
        product = np.empty((X.shape[0], Y.shape[1]), X.dtype)

        def multiply(start: int) -> None:
            rows = slice(start, start + ROWS)
            np.matmul(X[rows], Y, out=product[rows])

        for _ in self.map(multiply, range(0, X.shape[0], ROWS)):
            pass
        return product

    def multiply_twice(self, X: Any, W: Any) -> tuple[Any, Any]:
        """X Wᵀ (b, m) and X WᵀW (b, n) for X (b, n) and W (m, n); on the CPU W is read once, and threads share it."""
        if self.torch is not None:
            Y = X @ W.T
            return Y, Y @ W
        m, columns = len(W), np.ascontiguousarray(X.T)
        Y, Z = np.empty((len(X), m), W.dtype), np.zeros(X.shape, W.dtype)

        def part(start: int) -> Array:
            # Fewer rows would fit into a core's cache, but their products are slower by more than that saves.
            rows = W[start : start + ROWS]
            own = np.dot(rows, columns)  # not @, which keeps the GIL while the result is small
            Y[:, start : start + ROWS] = own.T
            return np.asarray(np.dot(own.T, rows))

        # The parts are added in order, whatever the number of threads.
        for share in self.map(part, range(0, m, ROWS)):
            Z += share
        return Y, Z

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield ``work(item)`` of every item, in order; the caller's thread takes items a few ahead of the workers."""
        # No pool for one thread: exceptions and profiles stay simple.
        if self.threads == 1:
            yield from map(work, items)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            waiting: deque[Future[R]] = deque()
            for item in items:
                waiting.append(pool.submit(work, item))
                # One item more than there are threads: they never wait, and few results are in memory.
                if len(waiting) > self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def _cuda(index: int) -> Any:
    """The GPU of this number, with float32 products in full precision."""
    try:
        import torch
    except ImportError as error:
        raise missing_packages("a GPU", ["torch"], error) from error
    if not torch.cuda.is_available():
        raise OptionError("torch sees no CUDA device here", fix="leave out --device, or install a CUDA build of torch")
    if index >= torch.cuda.device_count():
        raise OptionError(f"there is no cuda:{index}", fix=f"the last one is cuda:{torch.cuda.device_count() - 1}")
    # TF32 has 10 bits of mantissa, which would be a relative error of 5e-4.
    torch.set_float32_matmul_precision("highest")
    return torch.device("cuda", index)


def _tensor(array: Array) -> Any:
    """The array as a torch tensor on the CPU; bfloat16 stays bfloat16, and float8 becomes float32."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        # torch does not know ml_dtypes, so the bits are passed as int16.
        return torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16)
    plain = array if array.dtype in (np.float16, np.float32, np.float64) else array.astype(np.float32)
    return torch.from_numpy(np.array(plain))  # a copy, because torch does not accept read-only memory
