"""Checks of the entry of one tensor in an undo file, before anything is built from it."""

from collections.abc import Mapping
from itertools import pairwise
from math import prod
from typing import Any, get_args

import numpy as np

from loralens.core.lazy import LazyArray
from loralens.merging.record import Against
from loralens.merging.undo.patch import Coding
from loralens.merging.undo.restore import TensorUndo

# Far beyond any tensor, and within the range of int64.
MOST = 2**62  # largest number of entries of a tensor
CODINGS, AGAINST = get_args(Coding), get_args(Against)


def check_outline(entry: Mapping[str, Any]) -> None:
    """Refuse dtypes that no merge writes, and values that are not shapes.

    Raises
    ------
    ValueError, KeyError, TypeError
        The entry is wrong. The caller raises a FormatError that quotes the message.
    """
    name, shape = entry["dtype"], entry["shape"]
    # `np.dtype` would parse "f4,i4" as a list of fields, so only identifiers are passed to it.
    dtype = np.dtype(name) if isinstance(name, str) and name.isidentifier() else None
    # Only the dtype's own name is accepted: aliases such as `longdouble` mean different dtypes on different machines.
    if dtype is None or str(dtype) != name or dtype.hasobject or dtype.names or dtype.itemsize not in (1, 2, 4, 8):
        raise ValueError(f"dtype {ascii(name)[:40]}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)) or prod(n for n in shape if n) > MOST:
        raise ValueError(f"shape {ascii(shape)[:40]}")


def check_entry(entry: Mapping[str, Any]) -> None:
    """Refuse an entry whose fields have wrong types or do not fit together. Raises the errors of `check_outline`."""
    check_outline(entry)
    matrix, coded = entry["matrix"], entry["against"] == "codes"
    if not isinstance(matrix, list) or len(matrix) != 2 or not all(map(_is_count, matrix)) or prod(matrix) > MOST:
        raise ValueError(f"matrix {ascii(matrix)[:40]}")
    size = prod(matrix)
    # With codes, ``shape`` is that of the stored tensor and ``matrix`` that of the decoded weight: sizes may differ.
    if not coded and size != prod(entry["shape"]):
        raise ValueError(f"matrix {ascii(matrix)[:40]}")
    # Without a name, its codes would be taken for floats.
    if coded and (not isinstance(entry["weight"], str) or not entry["weight"] or entry["slabs"] != []):
        raise TypeError("its weight is not named, or it has slabs")
    if entry["coding"] not in CODINGS or entry["against"] not in AGAINST:
        raise ValueError(f"coding {ascii(entry['coding'])[:20]} against {ascii(entry['against'])[:20]}")
    if not _is_count(entry["different"]) or entry["different"] > size:
        raise ValueError(f"different {ascii(entry['different'])[:40]}")
    if not isinstance(entry["base"], str) or not isinstance(entry["merged"], str):
        raise TypeError("its hashes are not text")
    if not isinstance(entry["slabs"], list):
        raise TypeError("its slabs are not a list")
    # The starts and stops of all slabs must not decrease: slabs lie in order, without overlap, within the rows.
    ends = [0]
    for slab in entry["slabs"]:
        _check_slab(slab)
        ends += [slab["start"], slab["stop"]]
    if any(second < first for first, second in pairwise([*ends, matrix[0]])):
        raise ValueError(f"slabs of rows {ascii(ends[1:])[:40]} in {matrix[0]}")


def _check_slab(slab: Mapping[str, Any]) -> None:
    if not _is_count(slab["start"]) or not _is_count(slab["stop"]) or not isinstance(slab["module"], str):
        raise ValueError(f"a slab from {ascii(slab['start'])[:20]} to {ascii(slab['stop'])[:20]}")
    if not isinstance(slab["transposed"], bool) or slab["gain"] not in (None, "rows", "columns"):
        raise ValueError(f"a slab with gain {ascii(slab['gain'])[:20]}")
    for strength, scale in slab["factors"]:
        if not _is_number(strength) or not _is_number(scale):
            raise ValueError("a slab with a factor that is not a number")


def check_arrays(undo: TensorUndo) -> None:
    """Refuse streams that are not 1-D uint8 arrays, and factors whose shapes contradict those of the entry."""
    for stream in undo.patch.streams:
        if stream.dtype != np.uint8 or stream.ndim != 1:
            raise ValueError(f"a stream of {stream.dtype} {stream.shape}")
    for slab in undo.slabs:
        rows, columns = slab.stop - slab.start, undo.matrix[1]
        for _, update in slab.terms:
            if (update.shape[::-1] if slab.transposed else update.shape) != (rows, columns):
                raise ValueError(f"factors of {update.shape} for {rows} rows of {columns}")
        dora_factors = undo.slab_factors.get(slab.start)
        # Every other dtype would give sums of other bits than those of the merge, or none at all.
        if dora_factors and dora_factors.values.dtype != np.float32:
            raise TypeError(f"factors of DoRA of {dora_factors.values.dtype}")
        if dora_factors and dora_factors.values.shape != (rows if dora_factors.axis == "rows" else columns,):
            raise ValueError(f"factors of DoRA of {dora_factors.values.shape} for {rows} rows of {columns}")


def check_factor(array: LazyArray) -> LazyArray:
    """Return a factor after a check that its dtype is a floating-point one. Raises as `check_outline`."""
    # The kind V is accepted because ml_dtypes registers bfloat16 and float8 with it.
    if np.dtype(array.dtype).kind not in "fV":
        raise TypeError(f"a factor of {array.dtype}")
    return array


def _is_count(value: Any) -> bool:
    # `type`, not isinstance: True is an int in Python.
    return type(value) is int and 0 <= value <= MOST


def _is_number(value: Any) -> bool:
    # Far beyond any scale. NaN and Inf fail the comparison too.
    return type(value) in (int, float) and abs(value) < 1e300
