"""The record of a merge: fidelity, hashes, the patch that undoes it, and the entries of a certificate."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import sqrt
from operator import attrgetter
from typing import Any, Literal, NamedTuple, final

import numpy as np

from loralens.core.lazy import Array
from loralens.merging.codec import Against, Block, DoraFactors, StoredCodes, TensorMerge, feed_hash
from loralens.merging.fidelity import Fidelity, FidelitySums
from loralens.merging.merge_plan import Buffer, TensorPlan, matrix_blocks
from loralens.merging.patch import Blob, Keep, PatchWriter, keep_in_memory
from loralens.tables.numbers import fixed, number
from loralens.tables.table import ALWAYS, Column, Table


@final
@dataclass(frozen=True, slots=True)
class TensorRecord:
    """The record of the merge of one stored tensor.

    Attributes
    ----------
    dtype : dtype
        The dtype of the merged tensor.
    fidelity : tuple of Fidelity
        One for each segment.
    base_hash, merged_hash : str
        SHA-256 of the bytes of the tensor before and after the merge; empty if it was not requested, or if there was no
        such tensor.
    patch : Blob or None
        The patch that restores the base, if requested.
    patch_bytes : int
        Size of the patch. It stays known when the patch itself has been written to a file.
    against : str
        What the patch is relative to: W' − D rounded (``subtracted``), W' itself (``merged``), zeros (``nothing``), or
        the merged codes of a low-bit weight (``codes``).
    segment_factors : dict of int to DoraFactors
        DoRA's factors by the first row of their segment.
    stored : StoredCodes or None
        The stored tensor of a low-bit weight whose codes were moved; the plan is that of the decoded weight.
    """

    plan: TensorPlan
    dtype: np.dtype[Any]
    fidelity: tuple[Fidelity, ...]
    base_hash: str
    merged_hash: str
    patch: Blob | None
    patch_bytes: int
    against: Against
    segment_factors: dict[int, DoraFactors]
    stored: StoredCodes | None = None


@final
class MergeRecorder:
    """Records the blocks of one tensor while they are merged.

    Parameters
    ----------
    merge : TensorMerge
    hashes, fidelity, undo : bool
        What to record. Each of them takes time.
    keep : callable
        Stores parts of the patch while it is made (see `PatchWriter`).
    against : str, optional
        What the patch is relative to, if that is not what the codec says.
    """

    def __init__(
        self,
        merge: TensorMerge,
        *,
        hashes: bool = True,
        fidelity: bool = True,
        undo: bool = True,
        keep: Keep = keep_in_memory,
        against: Against | None = None,
    ) -> None:
        codec = merge.codec
        self._merge, self._codec, self._fidelity = merge, codec, fidelity and codec.measured
        self._base, self._against = codec.before, against or codec.against
        # Codes are compared as bytes.
        itemsize = 1 if self._against == "codes" else self._base.dtype.itemsize if self._base is not None else 0
        self._patch = PatchWriter(itemsize, keep) if undo and self._base is not None else None
        hashed = hashes or (self._against == "codes" and self._patch is not None)
        self._before = sha256() if hashed and self._base is not None else None
        self._after = sha256() if hashes else None
        self._base_hash: str | None = None
        self._sums: dict[int, FidelitySums] = {}

    def blocks(self) -> Iterator[Array]:
        """Yield the merged rows as they are written. When all have been taken, `record` is complete."""
        if self._before:
            self._base_hash = self._codec.hash_before(proven=self._patch is not None)
        yield from self._codec.write(self._taken(), self._after)
        # The rows of a replacement are not those of the base, so the base is read separately, after them.
        if self._merge.plan.replacement is not None and self._base is not None and (self._before or self._patch):
            for rows in matrix_blocks(self._base):
                feed_hash(self._before, rows)
                if self._patch is not None:
                    self._patch.block(rows, np.zeros_like(rows))

    def _taken(self) -> Iterator[Block]:
        """The blocks of the merge, after all was recorded that they show."""
        replaced, buffer = self._merge.plan.replacement is not None, Buffer()
        for block in self._merge.blocks():
            if self._fidelity and block.segment:
                # Blocks come in order, and a segment may have many of them.
                if block.segment.start not in self._sums:
                    self._sums[block.segment.start] = FidelitySums(block.segment, self._codec)
                self._sums[block.segment.start].take(block)
            if not replaced and self._base_hash is None:
                feed_hash(self._before, block.stored)
            if not replaced and self._patch is not None:
                self._patch.block(block.stored, block.reference(self._against, buffer))
            yield block

    def record(self) -> TensorRecord:
        """The record of all blocks."""
        patch = self._patch.finish() if self._patch else None
        return TensorRecord(
            self._merge.plan,
            self._codec.dtype if self._codec.stored is None else self._codec.stored.dtype,
            tuple(sums.fidelity() for _, sums in sorted(self._sums.items())),
            self._base_hash or (self._before.hexdigest() if self._before else ""),
            self._after.hexdigest() if self._after else "",
            patch,
            patch.nbytes if patch else 0,
            self._against,
            self._merge.segment_factors,
            self._codec.stored,
        )


class MergedModule(NamedTuple):
    """The fidelity of an adapted module, and the key of the stored tensor into which it was merged."""

    weight: str
    fidelity: Fidelity


def merged_modules(records: Sequence[TensorRecord]) -> list[MergedModule]:
    """The adapted modules in the order of the plan."""
    return [MergedModule(record.plan.key, fidelity) for record in records for fidelity in record.fidelity]


def _measure(key: str, title: str = "", *, of: str = "", **options: Any) -> Column[MergedModule]:
    """A column with an attribute of `Fidelity`; ``of`` is its name if that differs from the key."""
    return Column(key, f"fidelity.{of or key}", title, **options)


MODULE_COLUMNS: tuple[Column[MergedModule], ...] = (
    _measure("name", "module", of="module", align="left", priority=ALWAYS),
    Column("weight"),
    _measure("gain", "gain", text=fixed(".4f"), priority=ALWAYS),
    _measure("relative_error", "error", of="error", text=number, priority=ALWAYS),
    _measure("subspace_error", "error in its inputs", text=number, priority=4),
    _measure("unmoved", "unmoved", text=fixed(".1%"), priority=3),
    _measure("predicted_gain"),
    _measure("predicted_relative_error", of="predicted_error"),
    _measure("predicted_unmoved"),
    _measure("directions"),
    _measure("surviving"),
    Column(
        "above_noise",
        lambda row: [row.fidelity.surviving, row.fidelity.directions],
        "above noise",
        lambda counts: f"{counts[0]} of {counts[1]}" if counts[1] else "",
        priority=5,
        json=False,
        csv=False,
    ),
    _measure("overflowed"),
)


def _of_codes(key: str, title: str = "", **options: Any) -> Column[MergedModule]:
    """A column with an attribute of `CodeFidelity`."""
    return Column(key, f"fidelity.codes.{key}", title, **options)


# Further columns of a merge into the codes of low-bit weights.
CODE_COLUMNS: tuple[Column[MergedModule], ...] = (
    _of_codes("rounding"),
    _of_codes("changed", "codes changed", text=fixed(".2%"), priority=6),
    _of_codes("clipped", "clipped", text=fixed(".2%"), priority=3),
    _of_codes("mean_move", "steps", text=number, priority=4),
    _of_codes("predicted_changed"),
    _of_codes("predicted_clipped"),
    # The prediction for stochastic rounding; what the merge added is measured as `relative_error`.
    _of_codes("noise"),
)


def module_columns(modules: Sequence[MergedModule]) -> tuple[Column[MergedModule], ...]:
    """The columns of the adapted modules."""
    if not any(module.fidelity.codes for module in modules):
        return MODULE_COLUMNS
    # The table of a merge into codes shows the columns of the codes in place of `above_noise`.
    return (*(column for column in MODULE_COLUMNS if column.key != "above_noise"), *CODE_COLUMNS)


def module_entries(modules: Sequence[MergedModule]) -> list[dict[str, Any]]:
    """One JSON object for each adapted module, for a certificate."""
    return Table("", module_columns(modules), modules).records()


def total_entry(records: Sequence[TensorRecord], *, kept_bytes: int = 0, kept_weights: int = 0) -> dict[str, Any]:
    """The JSON object of the whole merge: gain and errors of all updates together, and the size of the undo patch.

    Parameters
    ----------
    records : sequence of TensorRecord
    kept_bytes : int
        The bytes of the tensors that the undo file keeps whole, because the merged model does not have them.
    kept_weights : int
        The number of weights that are stored in these tensors only.
    """
    parts = [fidelity for record in records for fidelity in record.fidelity]
    # Of a patch that was written to a file, only the size is known here.
    patched = [record for record in records if record.patch is not None or record.patch_bytes]
    size = kept_bytes + sum(record.patch_bytes for record in patched)
    weights = kept_weights + sum(record.plan.base.size for record in patched if record.plan.base is not None)
    coded = [part for part in parts if part.codes]
    of_codes = {
        "changed": _share(coded, "codes.changed"),
        "clipped": _share(coded, "codes.clipped"),
        "mean_move": _share(coded, "codes.mean_move"),
        "noise": _root_mean(coded, "codes.noise"),
        "predicted_clipped": _share(coded, "codes.predicted_clipped"),
        "drawn": sum(part.codes.rounding == "stochastic" for part in coded if part.codes),
    }
    return {
        # A weight that becomes NF4 codes has a record for each of its stored tensors. It counts once.
        "tensors": len({record.plan.key for record in records}),
        "gain": _mean(parts, "gain"),
        "relative_error": _root_mean(parts, "error"),
        "subspace_error": _root_mean(parts, "subspace_error"),
        "unmoved": _share(parts, "unmoved") or 0.0,
        "predicted_gain": _mean(parts, "predicted_gain"),
        "predicted_relative_error": _root_mean(parts, "predicted_error"),
        "predicted_unmoved": _share(parts, "predicted_unmoved"),
        "overflowed": sum(part.overflowed for part in parts),
        "undo_bytes": size if patched or kept_bytes else None,
        "undo_bits_per_weight": 8 * size / weights if weights else None,
        **(of_codes if coded else {}),
    }


def _mean(parts: Sequence[Fidelity], name: str, power: int = 1) -> float | None:
    """The mean of a power of the known values, weighted by the energy of the modules; None if no value is known."""
    weighted = [(value**power, part.norm**2) for part in parts if (value := attrgetter(name)(part)) is not None]
    energy = sum(square for _, square in weighted)
    # Updates of 0 have no weight in the mean, but their gain of 1 is known.
    if not energy:
        return weighted[0][0] if weighted else None
    return float(sum(value * square for value, square in weighted) / energy)


def _root_mean(parts: Sequence[Fidelity], name: str) -> float | None:
    """The root of the mean of squares, weighted as in `_mean`."""
    square = _mean(parts, name, 2)
    return None if square is None else sqrt(square)


def _share(parts: Sequence[Fidelity], name: str) -> float | None:
    """The share of all entries together; None unless it is known for every module."""
    values, total = [attrgetter(name)(part) for part in parts], sum(part.entries for part in parts)
    # A share of only some modules would look like that of all.
    if not total or None in values:
        return None
    return float(sum(value * part.entries for value, part in zip(values, parts, strict=True)) / total)


class Hashed(NamedTuple):
    """Dtype, shape and SHA-256 of the bytes of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


def hashed_tensors(
    records: Sequence[TensorRecord], copies: Mapping[str, Hashed], *, side: Literal["base", "merged"]
) -> dict[str, Hashed]:
    """All tensors of a model: those that were copied, and those of the records before or after the merge."""
    tensors = dict(copies)
    for record in records:
        base, coded = record.plan.base, record.stored
        if coded is not None and (side == "merged" or record.against == "codes"):
            # A merge that moves codes keeps dtype and shape of the stored tensor.
            digest = record.merged_hash if side == "merged" else record.base_hash
            tensors[coded.key] = Hashed(str(coded.dtype), coded.shape, digest)
        elif side == "merged":
            tensors[record.plan.key] = Hashed(str(record.dtype), record.plan.shape, record.merged_hash)
        elif base is not None:
            tensors[record.plan.key] = Hashed(str(base.dtype), base.shape, record.base_hash)
    return dict(sorted(tensors.items()))


def model_hash(tensors: Mapping[str, Hashed]) -> str | None:
    """The SHA-256 of a model, or None if the hash of a tensor is unknown.

    It is computed from a line for every tensor (key, dtype, shape, SHA-256), sorted by key. So it does not depend on
    how the tensors are distributed over files.
    """
    # A hash over some of the tensors would look like that of the model.
    if not all(tensor.digest for tensor in tensors.values()):
        return None
    lines = [f"{key} {tensor.dtype} {list(tensor.shape)} {tensor.digest}" for key, tensor in sorted(tensors.items())]
    return sha256("\n".join(lines).encode("utf-8")).hexdigest() if lines else None
