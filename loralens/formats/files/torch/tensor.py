"""The tensors that a torch pickle describes, checked before a byte of their numbers is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any, NamedTuple, final

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

from loralens.core.lazy import Array, LazyArray
from loralens.errors import FormatError
from loralens.formats.files.container import OpenFile

SAVE_AGAIN = "the file is incomplete or was tampered with: download or save it again"
MOST_AXES = 64  # NumPy's limit

# Big-endian files are refused, so all numbers are little-endian.
_CODES = {
    "float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "i1",
    "uint64": "<u8", "uint32": "<u4", "uint16": "<u2", "uint8": "u1", "bool": "?",
}  # fmt: skip
DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(code) for name, code in _CODES.items()}


class Span(NamedTuple):
    """The place of a storage in the file."""

    start: int
    nbytes: int


@final
@dataclass(frozen=True, slots=True)
class TorchStorage:
    """A named block of numbers in the file, as the pickle describes it."""

    key: str
    dtype: np.dtype[Any]
    nbytes: int


@final
@dataclass(frozen=True, slots=True)
class TorchTensor:
    """A view of a storage, as the pickle describes it. `Storages.array` checks it.

    ``offset`` and ``strides`` are in elements of ``dtype``, as in torch.
    """

    storage: TorchStorage
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def reach(self) -> int:
        """The number of elements from the first to the last one of the view, which have to be read."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))


@final
@dataclass(frozen=True, slots=True)
class Storages:
    """The storages of an open file and their places."""

    file: OpenFile
    spans: Mapping[str, Span]

    def array(self, tensor: TorchTensor) -> LazyArray:
        """The array that ``tensor`` describes, which is read when it is needed.

        Raises
        ------
        FormatError
            Its storage is not in the file, or an element lies outside of its storage.
        """
        span = self._span(tensor.storage)
        _check_axes(tensor)
        capacity = tensor.storage.nbytes // tensor.dtype.itemsize
        if tensor.storage.nbytes < 0 or tensor.offset + tensor.reach > capacity:
            raise FormatError(f"it reaches beyond its storage {tensor.storage.key[:40]!a}", fix=SAVE_AGAIN)
        # A stride of 0 repeats numbers. Without this check, four bytes could ask for any amount of memory.
        if prod(tensor.shape) * tensor.dtype.itemsize > self.file.size:
            fix = "it repeats its numbers with a stride of 0: save tensor.contiguous() instead"
            raise FormatError("it asks for more memory than the whole file takes", fix=fix)
        start = span.start + tensor.offset * tensor.dtype.itemsize
        # A bool is read as a byte first, because a byte other than 0 and 1 is not a valid NumPy bool.
        if _is_contiguous(tensor) and tensor.dtype != np.bool_:
            return self.file.array(start, tensor.shape, tensor.dtype)
        return LazyArray(lambda: self._read_strided(tensor, start), shape=tensor.shape, dtype=tensor.dtype)

    def _span(self, storage: TorchStorage) -> Span:
        span = self.spans.get(storage.key)
        if span is None:
            raise FormatError(f"its storage {storage.key[:40]!a} is not in the file", fix=SAVE_AGAIN)
        # Both are claims of the file: the pickle's and the container's.
        if span.nbytes < storage.nbytes or span.start + span.nbytes > self.file.size:
            raise FormatError(f"storage {storage.key[:40]!a} is shorter than the pickle says", fix=SAVE_AGAIN)
        return span

    def _read_strided(self, tensor: TorchTensor, start: int) -> Array:
        raw = np.frombuffer(self.file.read(start, tensor.reach * tensor.dtype.itemsize), np.uint8)
        numbers = raw != 0 if tensor.dtype == np.bool_ else raw.view(tensor.dtype)
        if not numbers.size:
            return numbers.reshape(tensor.shape)
        # The stride of an axis of length 1 is never used and may be anything, so it becomes 0.
        steps = [step * tensor.dtype.itemsize * (n > 1) for n, step in zip(tensor.shape, tensor.strides, strict=True)]
        return as_strided(numbers, tensor.shape, steps).copy()


def _is_contiguous(tensor: TorchTensor) -> bool:
    """Whether the elements are stored one after the other in C order."""
    steps = list(accumulate(reversed(tensor.shape), mul, initial=1))[-2::-1]
    axes = zip(tensor.shape, tensor.strides, steps, strict=True)
    return 0 in tensor.shape or all(n == 1 or stride == step for n, stride, step in axes)


def _check_axes(tensor: TorchTensor) -> None:
    shape, strides = tensor.shape, tensor.strides
    if len(shape) != len(strides) or len(shape) > MOST_AXES:
        raise FormatError(f"it has {len(shape)} sizes and {len(strides)} strides", fix=SAVE_AGAIN)
    if tensor.offset < 0 or min((*shape, *strides), default=0) < 0:
        raise FormatError("its offset, a size or a stride is negative", fix=SAVE_AGAIN)
    if prod(n for n in shape if n) * tensor.dtype.itemsize >= 2**63:
        raise FormatError("its sizes are too big for any array", fix=SAVE_AGAIN)
