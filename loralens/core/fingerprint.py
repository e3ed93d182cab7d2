"""A hash of the update of an adapter that is the same in every dialect with the same numbers."""

from hashlib import blake2b
from typing import Any

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array, LazyArray, row_blocks
from loralens.core.lowrank import LowRank
from loralens.core.names import normal_form
from loralens.core.structured import Dense, Update

# 2 MiB in float64.
BLOCK = 1 << 18  # numbers hashed at a time
BYTES = 16  # bytes of a fingerprint; about 2⁶⁴ adapters are needed before two are likely to have the same one
LEFT_OUT = frozenset({"copy", "shape"})  # roles whose tensors repeat what other tensors say


def fingerprint(adapter: Adapter) -> str:
    """The fingerprint of an adapter, 32 hexadecimal digits: a hash of names in normal form, shapes, scales and factors.

    It is equal for the same numbers in two dialects, in any order, in any float dtype that holds them, and with any
    metadata. Trained biases, heads and magnitudes are included, because they change the effect of the adapter. It
    differs for the same update with other factors or another scale, because rounding makes such updates only nearly
    equal. `loralens.Fleet.copies` finds these.
    """
    parts = [_hash_module(normal_form(name), update) for name, update in adapter.items()]
    parts += [
        _hash_arrays(extra.role, normal_form(extra.module), extra.tensor)
        for extra in adapter.extra.values()
        if extra.role not in LEFT_OUT
    ]
    # Sorted, because dialects store modules in different orders.
    return blake2b(b"".join(sorted(parts)), digest_size=BYTES).hexdigest()


def _hash_module(name: str, update: Update) -> bytes:
    """The hash of one module. For an update of another form it is the hash of its dense matrix."""
    scale = float(update.scale)
    if isinstance(update, LowRank):
        return _hash_arrays("pair", name, scale, update.B, update.A)
    # A full difference is as large as the weight, so it is hashed a block of rows at a time.
    if isinstance(update.form, Dense):
        stored = update.form.array.reshape(*update.shape)
        return _hash_arrays("pair", name, scale, _lazy_difference(stored, update.scale))
    # Another dialect may store this matrix multiplied by the scale. The same rounding here gives both the same hash.
    return _hash_arrays("pair", name, scale, _round_by_scale(update.form.dense(), update.scale))


def _round_by_scale(matrix: Array, scale: float) -> Array:
    """A float64 matrix multiplied by the scale and divided by it, which rounds it twice; unchanged for scale 0."""
    return (scale * matrix) / scale if scale else matrix


def _lazy_difference(stored: LazyArray, scale: float) -> LazyArray:
    """A full difference, rounded by `_round_by_scale` like other updates; its rows are still read on demand."""

    def rows(start: int, stop: int) -> Array:
        return _round_by_scale(stored.rows(start, stop).read().astype(np.float64), scale)

    streamed = rows if stored.streams else None
    return LazyArray(lambda: rows(0, stored.shape[0]), shape=stored.shape, dtype=np.float64, rows=streamed)


def _hash_arrays(role: str, name: str, *arrays: Array | LazyArray | float) -> bytes:
    """The hash of arrays under a name. Each array is preceded by its shape, so different lists have different input."""
    hashed = blake2b(f"{role}\0{name}\0".encode("utf-8", "backslashreplace"), digest_size=BYTES)
    for array in arrays:
        array = np.array([array]) if isinstance(array, float) else array
        # A single number counts as an array of one, in every dialect.
        shape = array.shape or (1,)
        tensor = LazyArray.of(array).reshape(*shape)
        # The narrowest dtype that holds the numbers, so that a float64 copy of float32 numbers has the same hash.
        is_float = array.dtype.kind in "fV" and array.dtype.itemsize < 8
        narrow = is_float or all(_fits_float32(rows) for _, rows in row_blocks(tensor, BLOCK))
        dtype = np.dtype(np.float32 if narrow else np.float64)
        hashed.update(f"{dtype}{shape}\0".encode())
        for _, rows in row_blocks(tensor, BLOCK):
            hashed.update(_canonical_array(rows, dtype).data)
    return hashed.digest()


def _fits_float32(array: Array) -> bool:
    """Whether float32 represents these numbers exactly."""
    wide = array.astype(np.float64)
    with np.errstate(over="ignore"):
        return np.array_equal(wide.astype(np.float32), wide, equal_nan=True)


def _canonical_array(array: Array, dtype: np.dtype[Any]) -> Array:
    """The values in a form that does not depend on how they were stored: ``dtype``, little-endian, in C order.

    −0 becomes 0, and all NaN get the same bits.
    """
    with np.errstate(invalid="ignore"):  # some bits of float16 mean NaN that signal
        wide = array.astype(dtype)
    # −0 + 0 is 0.
    wide += dtype.type(0)
    # NaN has many bit patterns.
    if (nan := np.isnan(wide)).any():
        wide[nan] = np.nan
    return np.ascontiguousarray(wide, dtype=dtype.newbyteorder("<"))
