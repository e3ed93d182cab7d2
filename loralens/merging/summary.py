"""The records of a merge summed up: entries of its certificate, and hashes of whole models."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import sqrt
from typing import Any, Literal, final

import numpy as np

from loralens.merging.record import TensorRecord


def module_entries(records: Sequence[TensorRecord]) -> list[dict[str, Any]]:
    """One JSON object for each adapted module, in the order of the plan."""
    return [
        {
            "name": one.module,
            "weight": record.plan.key,
            "gain": one.gain,
            "relative_error": one.error,
            "subspace_error": one.subspace_error,
            "unmoved": one.unmoved,
            "predicted_gain": one.predicted_gain,
            "predicted_relative_error": one.predicted_error,
            "predicted_unmoved": one.predicted_unmoved,
            "directions": one.directions,
            "surviving": one.surviving,
            "overflowed": one.overflowed,
        }
        for record in records
        for one in record.fidelity
    ]


def total_entry(records: Sequence[TensorRecord]) -> dict[str, Any]:
    """The whole merge: gain and errors of all updates as one, and what the undo patch costs."""
    parts = [one for record in records for one in record.fidelity]
    entries = sum(one.entries for one in parts)
    patched = [record for record in records if record.patch is not None or record.patch_bytes]
    size = sum(record.patch_bytes for record in patched)
    weights = sum(record.plan.base.size for record in patched if record.plan.base is not None)
    return {
        "tensors": len(records),
        "gain": _mean([(one.gain, one.norm) for one in parts]),
        "relative_error": _root_mean([(one.error, one.norm) for one in parts]),
        "subspace_error": _root_mean([(one.subspace_error, one.norm) for one in parts]),
        "unmoved": sum(one.unmoved * one.entries for one in parts) / entries if entries else 0.0,
        "predicted_gain": _mean([(one.predicted_gain, one.norm) for one in parts]),
        "predicted_relative_error": _root_mean([(one.predicted_error, one.norm) for one in parts]),
        "predicted_unmoved": _share([(one.predicted_unmoved, one.entries) for one in parts]),
        "overflowed": sum(one.overflowed for one in parts),
        "undo_bytes": size if patched else None,
        "undo_bits_per_weight": 8 * size / weights if weights else None,
    }


def _mean(values: Iterable[tuple[float | None, float]]) -> float | None:
    """Of the values that are known, each with the energy of its module; None where there are none."""
    known = [(value, norm**2) for value, norm in values if value is not None]
    energy = sum(one for _, one in known)
    if not energy:
        return known[0][0] if known else None
    return sum(value * one for value, one in known) / energy


def _root_mean(values: Iterable[tuple[float | None, float]]) -> float | None:
    """The same of squares, and its root."""
    square = _mean([(None if value is None else value**2, norm) for value, norm in values])
    return None if square is None else sqrt(square)


def _share(values: Iterable[tuple[float | None, int]]) -> float | None:
    """Of all entries together, where it is known of every module."""
    parts = list(values)
    total = sum(entries for _, entries in parts)
    if not total or any(value is None for value, _ in parts):
        return None
    return sum(value * entries for value, entries in parts if value is not None) / total


@final
@dataclass(frozen=True, slots=True)
class Hashed:
    """A tensor known by its dtype, shape and the SHA-256 of its bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    digest: str


def model_hash(
    records: Sequence[TensorRecord], copies: Mapping[str, Hashed], *, side: Literal["base", "merged"]
) -> str | None:
    """SHA-256 over a line for every tensor, in the order of the keys: key, dtype, shape, SHA-256; None without hashes.

    It does not depend on how the tensors are spread over files.
    """
    tensors = dict(copies)
    for record in records:
        base = record.plan.base
        if side == "merged":
            tensors[record.plan.key] = Hashed(record.dtype, record.plan.shape, record.merged_hash)
        elif base is not None:
            tensors[record.plan.key] = Hashed(base.dtype, base.shape, record.base_hash)
    if not all(one.digest for one in tensors.values()):
        return None
    lines = [f"{key} {one.dtype} {list(one.shape)} {one.digest}" for key, one in sorted(tensors.items())]
    return sha256("\n".join(lines).encode("utf-8")).hexdigest() if lines else None
