"""A fingerprint of what an adapter does, the same in every dialect that holds the same numbers."""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.naming.normal_form import normal_form
from loralens.core.structured import Dense, Update

BLOCK = 1 << 18  # numbers hashed at a time
BYTES = 16  # of a fingerprint: 2⁶⁴ adapters before two are likely to share one
LEFT_OUT = frozenset({"copy", "shape"})  # roles that say nothing which other tensors do not


def fingerprint(adapter: Adapter) -> str:
    """32 hexadecimal digits of the modules of an adapter: their names in normal form, shapes, scales and factors.

    Equal for the same numbers under the names of two dialects, in any order, in any float dtype that holds them, with
    any metadata. Trained biases, heads and magnitudes count, as they change what the adapter does. Different for the
    same update in another gauge or under another split of the scale: rounding makes those nearly, never exactly,
    equal, and a hash knows no nearly; `loralens.analysis.survey.duplicates` finds them by their norms.
    """
    parts = [_module(normal_form(name), update) for name, update in adapter.items()]
    parts += [
        _digest(extra.role, normal_form(extra.module), extra.tensor)
        for extra in adapter.extra.values()
        if extra.role not in LEFT_OUT
    ]
    return blake2b(b"".join(sorted(parts)), digest_size=BYTES).hexdigest()


def _module(name: str, update: Update) -> bytes:
    """Hash of one module. Of a form the matrix counts, scaled in float64 and unscaled again."""
    scale = np.float64(update.scale)
    if isinstance(update, LowRank):
        return _digest("pair", name, scale, update.B, update.A)
    if isinstance(update.form, Dense):
        return _digest("pair", name, scale, _difference(update.form.array.reshape(*update.shape), update.scale))
    return _digest("pair", name, scale, _unscaled(update.form.dense(), update.scale))


def _unscaled(matrix: Array, scale: float) -> Array:
    """A float64 matrix scaled and unscaled again, which rounds it twice; as it is where the scale is 0."""
    return (scale * matrix) / scale if scale else matrix


def _difference(stored: LazyArray, scale: float) -> LazyArray:
    """A full difference as every other form is hashed; its rows stay lazy."""

    def rows(start: int, stop: int) -> Array:
        return _unscaled(stored.rows(start, stop).read().astype(np.float64), scale)

    streamed = rows if stored.streams else None
    return LazyArray(lambda: rows(0, stored.shape[0]), shape=stored.shape, dtype=np.float64, rows=streamed)


def _digest(role: str, name: str, *arrays: Array | LazyArray | np.float64) -> bytes:
    """Hash of some arrays under a name; each is preceded by its shape, so that no two lists of arrays are one."""
    hashed = blake2b(f"{role}\0{name}\0".encode("utf-8", "backslashreplace"), digest_size=BYTES)
    for array in arrays:
        tensor = LazyArray.of(array if isinstance(array, LazyArray) else np.asarray(array))
        dtype: np.dtype[Any] = np.dtype(np.float32 if all(map(_narrow, _blocks(tensor))) else np.float64)
        hashed.update(f"{dtype}{tensor.shape or (1,)}\0".encode())
        for rows in _blocks(tensor):
            hashed.update(_canonical(rows, dtype).data)
    return hashed.digest()


def _blocks(tensor: LazyArray) -> Iterator[Array]:
    """All numbers in order, some rows at a time where they can be read alone."""
    if not (tensor.streams and tensor.size):
        yield tensor.read()
        return
    step = max(1, BLOCK * tensor.shape[0] // tensor.size)
    for start in range(0, tensor.shape[0], step):
        yield tensor.rows(start, min(start + step, tensor.shape[0])).read()


def _narrow(array: Array) -> bool:
    """Whether float32 holds these numbers."""
    if array.dtype.kind in "fV" and array.dtype.itemsize < 8:
        return True
    wide = array.astype(np.float64)
    with np.errstate(over="ignore"):
        return np.array_equal(wide.astype(np.float32), wide, equal_nan=True)


def _canonical(array: Array, dtype: np.dtype[Any]) -> Array:
    """The same values in the one dtype that all carriers of them agree on: float32 where it holds them, else float64.

    Little-endian, in C order; −0 is 0, and all NaN are one.
    """
    wide = array.astype(dtype)
    wide += dtype.type(0)
    wide[np.isnan(wide)] = np.nan
    return np.ascontiguousarray(wide, dtype=dtype.newbyteorder("<"))
