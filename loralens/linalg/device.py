"""`Device`: the place where a big matrix is worked on, either NumPy on the CPU or torch on a GPU.

Functions that take a device are written for the Python array API and serve both. torch is imported only if a GPU is
requested. For single passes over a matrix, NumPy computes in float64 and torch in float32 without TF32.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, final

import ml_dtypes
import numpy as np

from loralens.errors import OptionError
from loralens.linalg.factor import Array, Floats, ReusedMemory
from loralens.linalg.kernel import (
    BFLOAT16,
    PANEL,
    PART,
    can_multiply_twice,
    join_parts,
    multiply_rows_twice,
    pad_columns,
)
from loralens.requirements import missing_packages

# Rows in one part of a product. The parts do not depend on the number of threads, so neither do the bits of the result.
ROWS = 512
SHARES = 8  # parts of a compiled pass over a matrix
BLOCK = 1 << 18  # numbers cast at a time on the CPU: 2 MiB in float64, which fits into a cache
BLOCK_TORCH = 1 << 25  # numbers cast at a time on a GPU: 128 MiB in float32, so that few copies are launched

Float = Literal["float32", "float64"]
CopyFloat = Literal["bfloat16", "float32", "float64"]
T = TypeVar("T")
R = TypeVar("R")

_CUDA = re.compile(r"cuda(?::(\d+))?")
_memory = ReusedMemory()


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
    pool : ThreadPoolExecutor or None
        The threads of `keep_threads`.
    """

    name: str = "cpu"
    threads: int = 1
    torch: Any = None
    pool: ThreadPoolExecutor | None = None

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
        cast = _memory(block.shape)
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

    def empty(self, shape: tuple[int, int], dtype: CopyFloat) -> Any:
        """An uninitialised array on this device."""
        if self.torch is None:
            return np.empty(shape, dtype)
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.torch)

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether `multiply_twice` is as quick for bfloat16 as for float32."""
        return self.torch is None and can_multiply_twice()

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

    def multiply_twice(self, X: Any, W: Any) -> tuple[Any, Any]:
        """X Wᵀ (b, m) and X WᵀW (b, n) for X (b, n) and W (m, n); on the CPU threads share the rows of W.

        On the CPU W may be in bfloat16 too. The products of float32 and bfloat16 are in float32.
        """
        if self.torch is not None:
            Y = X @ W.T
            return Y, Y @ W
        if W.dtype in (BFLOAT16, np.float32) and W.flags.c_contiguous and can_multiply_twice():
            return self._compiled_pass(X, W)
        # Not @, which keeps the GIL while the result is small.
        Y = np.hstack(list(self._map_rows(W, lambda _, part: np.dot(X, part.T))))
        return Y, self.multiply_left(Y, W)

    def multiply_left(self, Y: Any, W: Any) -> Any:
        """Y W (b, n) for Y (b, m) and W (m, n), which is as in `multiply_twice`."""
        if self.torch is not None:
            return Y @ W
        # The parts are added in order, whatever the number of threads.
        return sum(self._map_rows(W, lambda rows, part: np.dot(Y[:, rows], part)))

    def _map_rows(self, W: Array, work: Callable[[slice, Array], Array]) -> Iterator[Array]:
        """The results of ``work`` for some rows of W at a time, of which bfloat16 is cast to float32; NumPy."""
        dtype = np.dtype(np.float32) if W.dtype == BFLOAT16 else W.dtype
        parts = (slice(start, start + ROWS) for start in range(0, len(W), ROWS))
        return self.map(lambda rows: work(rows, W[rows].astype(dtype, copy=False)), parts)

    def _compiled_pass(self, X: Array, W: Array) -> tuple[Array, Array]:
        """The result of `multiply_twice` by the compiled loop, which reads W once."""
        (m, n), b = W.shape, len(X)
        columns, Z = pad_columns(X.T), pad_columns(np.zeros((n, b)))
        Y = np.zeros((m, len(columns) * PART), np.float32)
        # Few parts, since each adds up what it finds in an array of its own.
        length = max(PANEL, -(-m // SHARES // PANEL) * PANEL)

        def part(start: int) -> Array:
            share = np.zeros_like(Z)
            multiply_rows_twice(W[start : start + length], columns, Y[start : start + length], share)
            return share

        for share in self.map(part, range(0, m, length)):
            Z += share
        return Y[:, :b].T, join_parts(Z, n, b)

    @contextmanager
    def keep_threads(self) -> "Iterator[Device]":
        """Yield this device with threads that stay until the end, for many calls of `map` that each take little."""
        if self.threads == 1 or self.pool:
            yield self
            return
        with ThreadPoolExecutor(self.threads) as pool:
            yield replace(self, pool=pool)

    def split(self, parts: int) -> "Device":
        """This device for one of several parts of a work that run side by side on it."""
        return replace(self, threads=-(-self.threads // parts), pool=None)

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield ``work(item)`` of every item, in order; the caller's thread takes items a few ahead of the workers."""
        # No pool for one thread: exceptions and profiles stay simple.
        if self.threads == 1:
            yield from map(work, items)
            return
        with self.keep_threads() as device:
            assert device.pool
            waiting: deque[Future[R]] = deque()
            for item in items:
                waiting.append(device.pool.submit(work, item))
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
