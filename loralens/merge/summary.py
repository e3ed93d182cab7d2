"""The records of a merge summed up: entries of its certificate, and hashes of whole models."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from math import sqrt
from typing import Any, Literal

from loralens.merge.record import TensorRecord


def module_entries(records: Sequence[TensorRecord]) -> list[dict[str, Any]]:
    """One JSON object for each adapted module, in the order of the plan."""
    return [
        {
            "name": one.module,
            "weight": record.plan.key,
            "gain": one.gain,
            "relative_error": one.error,
            "unmoved": one.unmoved,
            "predicted_gain": one.predicted_gain,
            "predicted_relative_error": one.predicted_error,
            "directions": one.directions,
            "surviving": one.surviving,
        }
        for record in records
        for one in record.fidelity
    ]


def total_entry(records: Sequence[TensorRecord]) -> dict[str, Any]:
    """The whole merge: gain and error of all updates as one, and what the undo patch costs."""
    parts = [one for record in records for one in record.fidelity]
    energy = sum(one.norm**2 for one in parts)
    gain = sum(one.gain * one.norm**2 for one in parts) / energy if energy else 1.0
    lost = sum((one.error * one.norm) ** 2 for one in parts)
    entries = sum(one.entries for one in parts)
    patched = [record for record in records if record.patch_bytes]
    weights = sum(record.plan.base.size for record in patched if record.plan.base is not None)
    return {
        "tensors": len(records),
        "gain": gain,
        "relative_error": sqrt(lost / energy) if energy else 0.0,
        "unmoved": sum(one.unmoved * one.entries for one in parts) / entries if entries else 0.0,
        "undo_bits_per_weight": 8 * sum(r.patch_bytes for r in patched) / weights if weights else None,
    }


def model_hash(
    records: Sequence[TensorRecord], copies: Mapping[str, str], *, side: Literal["base", "merged"]
) -> str | None:
    """SHA-256 over the key, dtype, shape and SHA-256 of every tensor, in the order of the keys; None without hashes.

    Copied tensors are known by their own hash alone.
    """
    lines = [f"{key} {digest}" for key, digest in copies.items()]
    for record in records:
        digest = record.base_hash if side == "base" else record.merged_hash
        if digest:
            lines.append(f"{record.plan.key} {digest}")
    return sha256("\n".join(sorted(lines)).encode("utf-8")).hexdigest() if lines else None
