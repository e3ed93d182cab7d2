"""A fingerprint of what an adapter does, the same in every dialect that holds the same numbers."""

from hashlib import blake2b

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.matching import normal_form
from loralens.core.structured import Update

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
        _digest(extra.role, normal_form(extra.module), extra.tensor.read())
        for extra in adapter.extra.values()
        if extra.role not in LEFT_OUT
    ]
    return blake2b(b"".join(sorted(parts)), digest_size=BYTES).hexdigest()


def _module(name: str, update: Update) -> bytes:
    factors = (update.B, update.A) if isinstance(update, LowRank) else (update.dense() / update.scale,)
    return _digest("pair", name, np.float64(update.scale), *factors)


def _digest(role: str, name: str, *arrays: Array | LazyArray | np.float64) -> bytes:
    """Hash of some arrays under a name; each is preceded by its shape, so that no two lists of arrays are one."""
    hashed = blake2b(f"{role}\0{name}\0".encode("utf-8", "backslashreplace"), digest_size=BYTES)
    for array in arrays:
        values = _canonical(np.asarray(array))
        hashed.update(f"{values.dtype}{values.shape}\0".encode())
        hashed.update(values.data)
    return hashed.digest()


def _canonical(array: Array) -> Array:
    """The same values in the one dtype that all carriers of them agree on: float32 where it holds them, else float64.

    Little-endian, in C order; −0 is 0, and all NaN are one.
    """
    wide = array.astype(np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    chosen = narrow if np.array_equal(narrow, wide, equal_nan=True) else wide
    chosen = np.where(np.isnan(chosen), chosen.dtype.type(np.nan), chosen + chosen.dtype.type(0))
    return np.ascontiguousarray(chosen, dtype=chosen.dtype.newbyteorder("<"))
