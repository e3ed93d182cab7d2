"""Unmerging: restoring the base bit for bit with an undo file, or by subtracting an update; the layout of that file.

An undo file has the records of a merge as named arrays and a JSON object.

Arrays for each stored tensor KEY of the base that the merge changed:

    KEY#patch.I         the deflated streams of its patch, U8
    KEY#gain.START      DoRA's factors of the segment that begins at row START, F32
    KEY#B.START.I       the factors of the I-th update of that segment, as they were in the adapter
    KEY#A.START.I

An array for each stored tensor KEY of the base that the merged model does not have, such as codes and scales:

    KEY#whole           the tensor itself

Fields of the JSON object:

    version             of this layout
    adapters            the adapters that were merged
    dropped             keys of tensors that the merged model does not have
    whole               KEY → SHA-256 of the dropped tensors (older files have none)
    copies              KEY → SHA-256 of every tensor that the merge did not touch
    headers, texts      the original headers of shards, and the original texts of other files that the merge changed
    digest              SHA-256 of headers and texts (older files have none)
    tensors             KEY → dtype, shape, matrix, base and merged (SHA-256), coding, different, against, slabs

For a low-bit weight whose codes were moved, KEY is the key of the stored tensor with the codes, and dtype and shape
describe this tensor. The patch is computed from the codes, each as one byte: the difference between the code and the
lowest code of its grid. ``against`` is ``codes``, matrix is the shape of the decoded weight, and the field ``weight``
is the key of the decoded weight.

A slab (`Segment`) has module, start, stop, transposed, factors (strength and scale of each update), and gain (the axis
of DoRA's factors, or null).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from typing import Any, Self, final, get_args

import ml_dtypes  # noqa: F401 - teaches NumPy the names of narrow floats
import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.weights import CodedWeight, Codes
from loralens.errors import FormatError, MismatchError, ShapeError, place
from loralens.linalg.device import Device
from loralens.linalg.rounding import largest_number
from loralens.merging.codec import (
    Against,
    DoraFactors,
    FloatCodec,
    MergedBlock,
    TensorMerge,
    codes_as_bytes,
    encoded_rows,
    feed_hash,
    hash_rows,
)
from loralens.merging.merge_plan import Buffer, MatrixRows, Segment, TensorPlan, as_matrix, cuts, row_ranges
from loralens.merging.merge_record import TensorRecord
from loralens.merging.merge_rounding import merge_entries, round_sums, slices_for, subtract_update
from loralens.merging.patch import Blob, Coding, PatchReader

PIECE = 1 << 16  # letters that are hashed at a time
STREAMS = 8  # most streams of a patch: one for each byte of the widest number
VERSION = 1
WITH_CODES = 2  # the version of files with codes, which older readers would take for floats
VERSIONS = (VERSION, WITH_CODES)
# Far beyond any tensor, and within the range of int64.
MOST = 2**62  # largest number of entries of a tensor
CODINGS, AGAINST = get_args(Coding), get_args(Against)
_DAMAGED = "the undo file is damaged: use another copy"
_ANOTHER = "give the model that this undo file was written for"


@final
@dataclass(frozen=True, slots=True)
class TensorUndo:
    """Everything that is needed to restore one tensor of the base from the merged one.

    Attributes
    ----------
    dtype : dtype
        The dtype of the base.
    shape, matrix : tuple of int
        The shape of the base tensor, and its number of rows and columns as a matrix.
    segments : tuple of Segment
        Their terms hold the factors that were merged.
    segment_factors : dict of int to DoraFactors
        DoRA's factors by the first row of their segment.
    against : str
        What the patch is relative to (see `TensorRecord`).
    base_hash, merged_hash : str
        SHA-256 of the bytes.
    weight : str
        If the patch restores the codes of a low-bit weight, the key of the decoded weight; else empty.
    """

    key: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    segments: tuple[Segment, ...]
    segment_factors: dict[int, DoraFactors]
    patch: Blob
    against: Against
    base_hash: str
    merged_hash: str
    weight: str = ""

    @classmethod
    def of(cls, record: TensorRecord) -> Self:
        """What restores a tensor that was merged just now, for which neither hashes nor a key are needed."""
        plan, patch = record.plan, record.patch
        assert patch is not None
        return cls(
            "", record.dtype, plan.shape, plan.matrix, plan.segments, record.segment_factors, patch, record.against,
            "", "",
        )  # fmt: skip


def restore_tensor(
    undo: TensorUndo,
    merged: LazyArray,
    *,
    weight: CodedWeight | None = None,
    device: Device | None = None,
) -> Iterator[Array]:
    """Yield the rows of the stored tensor of the base in order.

    Parameters
    ----------
    undo : TensorUndo
    merged : LazyArray
        The stored tensor of the merged model.
    weight : CodedWeight or None
        The coded weight of the merged model, if the patch is one of codes; None if it has no such weight.
    device : Device or None
        The device that multiplies the factors of the update.

    Raises
    ------
    MismatchError
        The tensor is not the one that the merge wrote, which is checked before the first row; or the result is not the
        base, which is checked after the last row.
    FormatError
        The patch is damaged.
    """
    # ``undo.matrix`` is the matrix of the base, or of the decoded numbers of a low-bit weight. It fits neither a tensor
    # that the merge resized, nor the stored codes.
    matrix = undo.matrix if merged.shape == undo.shape and not undo.weight else as_matrix(merged.shape)
    # Checked before the first row is yielded: a patch applied to other numbers gives a model that is silently wrong.
    if hash_rows(MatrixRows(merged, matrix).blocks()) != undo.merged_hash:
        raise MismatchError(
            "is not as it was merged: it was changed since, or belongs to another merge",
            fix=f"{_ANOTHER}; if adapters were merged later, unmerge them first",
        )
    digest = sha256()
    if undo.weight:
        # The hash covers neither the scales nor what the configuration says about the layout.
        if weight is None or weight.grid is None or weight.encode is None or weight.shape != undo.matrix:
            raise MismatchError("is not stored as codes that a merge could have moved", fix=_ANOTHER)
        yield from encoded_rows(weight, _restored_codes(undo, weight), digest)
    else:
        for W in restored_rows(undo, merged, device=device):
            feed_hash(digest, W)
            yield W
    # The hash covers every bit of the base, so this comparison proves that the result is exact.
    if digest.hexdigest() != undo.base_hash:
        raise MismatchError(
            "the restored tensor is not the base that was merged",
            fix="the undo file is damaged: use another copy",
        )


def _restored_codes(undo: TensorUndo, weight: CodedWeight) -> Iterator[tuple[int, Codes]]:
    """The first row and the codes of the base of every block."""
    reader = PatchReader(undo.patch, 1)
    for start, stop in row_ranges(*undo.matrix):
        assert weight.grid is not None
        grid = weight.grid(start, stop)
        restored = reader.block(codes_as_bytes(grid.codes, grid.lowest)).reshape(grid.codes.shape)
        codes = restored.astype(np.int16) + np.int16(grid.lowest)
        # Encoders do not check the range of the codes that they pack.
        if codes.max(initial=grid.lowest) > grid.highest:
            raise FormatError(
                "a patch gives codes that the grid does not have", fix="use another copy of the undo file"
            )
        yield start, codes
    reader.finish()


def restored_rows(
    undo: TensorUndo, merged: LazyArray, *, device: Device | None = None, within: tuple[int, int] | None = None
) -> Iterator[Array]:
    """Yield the rows of the base in order, with the dtype of the base; nothing proves them.

    ``within`` is the range of rows, as in `prepare`. Raises FormatError if the patch does not fit.
    """
    reader = PatchReader(undo.patch, undo.dtype.itemsize)
    for R in _references(undo, merged, device, within):
        yield reader.block(R)
    # If entries of the patch are left over, the patch is damaged or belongs to another tensor: this is an error.
    reader.finish()


def _references(
    undo: TensorUndo, merged: LazyArray, device: Device | None, within: tuple[int, int] | None
) -> Iterator[Array]:
    """The rows to which the patch is relative, in the dtype of the base: R = round(W' − D), W' itself, or zeros."""
    dtype = undo.dtype
    if undo.against == "nothing":
        # Zeros block by block, so that no array of the size of the tensor is made.
        yield from (np.zeros((stop - start, undo.matrix[1]), dtype) for start, stop in row_ranges(*undo.matrix))
        return
    # If the patch refers to the merged numbers themselves, there is nothing to subtract.
    plan = TensorPlan(undo.key, merged, undo.matrix, undo.segments if undo.against == "subtracted" else ())
    source, buffers = MatrixRows(merged, undo.matrix), (Buffer(), Buffer())
    products = {segment.start: segment.update(slices_for(dtype), device) for segment in plan.segments}
    merge = TensorMerge(FloatCodec(plan), products, undo.segment_factors)
    for start, stop, segment in cuts(plan, within=within):
        rows = source.rows(start, stop)
        if segment is None:
            yield round_sums(rows, dtype)
        else:
            D, factors = merge.update(segment, start, stop, buffers[0])
            yield subtract_update(rows, D, dtype, dora_factors=factors, out=buffers[1].of(rows.shape))


@final
@dataclass(slots=True)
class Doubt:
    """Counts of the entries of a merged model whose original weight is uncertain.

    Attributes
    ----------
    several : int
        Entries to which at least two weights are rounded. It is unknown which of them was the original.
    none : int
        Entries to which no weight is rounded. The model was not made by this merge, or has been changed since.
    """

    entries: int = 0
    several: int = 0
    none: int = 0


def subtract_tensor(merge: TensorMerge, doubt: Doubt) -> Iterator[Array]:
    """Yield the rows of floats that subtracting an update gives; ``doubt`` counts the entries that are uncertain.

    ``merge`` is prepared with the merged weight in place of that of the base. The update must have no factors of DoRA,
    because they cannot be computed without the base.
    """
    return (_subtract_block(block, doubt) for block in merge.blocks())


def _subtract_block(block: MergedBlock, doubt: Doubt) -> Array:
    """R = round(W' − D) of a block in which ``block.W`` is the merged weight; ``doubt`` counts uncertain entries."""
    merged, D = block.W, block.D
    if D is None:
        return merged
    R = subtract_update(merged, D, merged.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        # Which of R and its two neighbours a merge would round to the given number.
        hits = (merge_entries(R, D, merged.dtype) == merged).astype(np.int8)
        # The next numbers towards ±infinity, or towards the largest number for float8, whose types may lack infinity.
        limit = np.asarray(np.inf if R.dtype.itemsize > 1 else largest_number(R.dtype), dtype=R.dtype)
        for other in (np.nextafter(R, limit), np.nextafter(R, -limit)):
            # The limit has no further neighbour: there, `nextafter` returns the limit itself.
            hits += (other != R) & (merge_entries(other, D, merged.dtype) == merged)
    doubt.entries += R.size
    doubt.several += int(np.count_nonzero(hits > 1))
    doubt.none += int(np.count_nonzero(hits == 0))
    return R


def text_digest(headers: Mapping[str, str], texts: Mapping[str, str]) -> str:
    """The SHA-256 of the texts of an undo file; its arrays have hashes of their own."""
    digest = sha256()
    # Sorted and in ASCII, so that the digest depends on the texts alone.
    for part in json.JSONEncoder(ensure_ascii=True).iterencode([sorted(headers.items()), sorted(texts.items())]):
        # In pieces, since the header of a large base is long.
        for start in range(0, len(part), PIECE):
            digest.update(part[start : start + PIECE].encode("ascii"))
    return digest.hexdigest()


def pack_arrays(record: TensorRecord) -> dict[str, LazyArray]:
    """The arrays of one tensor by what follows its key in their names."""
    patch = record.patch
    assert patch is not None
    arrays = {f"#patch.{i}": stream for i, stream in enumerate(patch.streams)}
    for segment in _packed_segments(record):
        if segment.start in record.segment_factors:
            arrays[f"#gain.{segment.start}"] = LazyArray.of(record.segment_factors[segment.start].values)
        for i, (_, update) in enumerate(segment.terms):
            B, A = update.factors
            arrays |= {f"#B.{segment.start}.{i}": B, f"#A.{segment.start}.{i}": A}
    return arrays


def pack_entry(record: TensorRecord) -> dict[str, Any]:
    """The JSON entry of one tensor."""
    plan, patch, stored = record.plan, record.patch, record.stored
    assert patch is not None
    before = plan.base if stored is None else stored
    assert before is not None
    same = stored is not None or before.shape == plan.shape
    return {
        "dtype": str(before.dtype),
        "shape": list(before.shape),
        "matrix": list(plan.matrix if same else as_matrix(before.shape)),
        **({"weight": plan.key} if stored is not None else {}),
        "base": record.base_hash,
        "merged": record.merged_hash,
        "coding": patch.coding,
        "different": patch.different,
        "against": record.against,
        "slabs": [
            {
                "module": segment.module,
                "start": segment.start,
                "stop": segment.stop,
                "transposed": segment.transposed,
                "factors": [[strength, update.scale] for strength, update in segment.terms],
                "gain": factors.axis if (factors := record.segment_factors.get(segment.start)) else None,
            }
            for segment in _packed_segments(record)
        ],
    }


def _packed_segments(record: TensorRecord) -> Sequence[Segment]:
    """The segments of which the undo file holds factors.

    They are only needed if unmerging computes the update. Otherwise the merged tensor and the patch are enough.
    """
    return record.plan.segments if record.stored is None and record.against == "subtracted" else ()


def layout_version(records: Iterable[TensorRecord]) -> int:
    """The version of an undo file of these records."""
    return WITH_CODES if any(record.against == "codes" for record in records) else VERSION


@final
@dataclass(frozen=True, slots=True)
class MergeUndo:
    """The content of an undo file; `parse_undo` makes it.

    Attributes
    ----------
    entries : mapping of str to mapping
        The JSON entries of all tensors that changed, by key.
    dropped : mapping of str to LazyArray
        Tensors of the base that the merged model does not have.
    dropped_hashes : mapping of str to str
        SHA-256 of dropped tensors, by key.
    copies : mapping of str to str
        SHA-256 of the tensors that did not change, by key.
    headers, texts : mapping of str to str
        Original headers and texts by the name of their file.
    """

    entries: Mapping[str, Mapping[str, Any]]
    arrays: Mapping[str, LazyArray]
    dropped: Mapping[str, LazyArray]
    dropped_hashes: Mapping[str, str]
    copies: Mapping[str, str]
    headers: Mapping[str, str]
    texts: Mapping[str, str]

    def tensor(self, key: str) -> TensorUndo:
        """What restores one tensor. Its patch is not read from the file yet.

        Raises
        ------
        FormatError
            A part is missing or malformed.
        """
        with _entry_errors(key):
            return _parse_entry(key, self.entries[key], self.arrays)

    def outline(self, key: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Dtype and shape of a tensor of the base that the merge changed or dropped. Raises the errors of `tensor`."""
        if key in self.dropped:
            return self.dropped[key].dtype, self.dropped[key].shape
        # Only what is needed here is checked, because a whole entry may hold many factors.
        with _entry_errors(key):
            _check_outline(self.entries[key])
            return np.dtype(self.entries[key]["dtype"]), tuple(self.entries[key]["shape"])


@contextmanager
def _entry_errors(key: str) -> Iterator[None]:
    """Replace an exception by a FormatError that names the tensor whose entry was being read."""
    with place(key):
        try:
            yield
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, ShapeError) as error:
            raise FormatError(f"its entry is malformed ({ascii(error)[:120]})", fix=_DAMAGED) from error


def parse_undo(arrays: Mapping[str, LazyArray], content: Mapping[str, Any]) -> MergeUndo:
    """Check the outline of the content of an undo file.

    Raises
    ------
    FormatError
        A part is missing or malformed, or the version is unknown.
    """
    if content.get("version") not in VERSIONS:
        raise FormatError(
            f"is an undo file of version {content.get('version')!a:.20}, and this loralens reads up to {max(VERSIONS)}",
            fix="unmerge with the loralens that wrote it",
        )
    tensors, dropped = content.get("tensors"), content.get("dropped")
    texts: list[Any] = [content.get(name) for name in ("copies", "headers", "texts")] + [content.get("whole", {})]
    # Hashes and texts come from a file, so their types are checked before they are used.
    if (
        not (isinstance(tensors, dict) and isinstance(dropped, list))
        or not all(isinstance(key, str) and f"{key}#whole" in arrays for key in dropped)
        or not all(isinstance(part, dict) and all(isinstance(text, str) for text in part.values()) for part in texts)
    ):
        raise FormatError("its outline is malformed", fix=_DAMAGED)
    copies, headers, changed_texts, hashes = texts
    written = text_digest(headers, changed_texts)
    # Files of older versions have no digest and are accepted without it.
    if content.get("digest", written) != written:
        raise FormatError("its headers and texts do not match their digest", fix=_DAMAGED)
    whole = {key: arrays[f"{key}#whole"] for key in dropped}
    return MergeUndo(tensors, arrays, whole, hashes, copies, headers, changed_texts)


def _parse_entry(key: str, entry: Mapping[str, Any], arrays: Mapping[str, LazyArray]) -> TensorUndo:
    """Build the `TensorUndo` of one tensor from its entry and arrays, the inverse of `pack_entry` and `pack_arrays`."""
    _check_entry(entry)
    stem = f"{key}#patch."
    # Each is looked up by its name: a search of all arrays for every tensor would take quadratic time.
    streams = tuple(arrays[name] for i in range(STREAMS) if (name := f"{stem}{i}") in arrays)
    patch = Blob(entry["coding"], entry["different"], streams)
    dtype, shape, (rows, columns) = np.dtype(entry["dtype"]), tuple(entry["shape"]), entry["matrix"]
    segments = tuple(_parse_segment(key, segment, arrays) for segment in entry["slabs"])
    segment_factors = {
        segment["start"]: DoraFactors(arrays[f"{key}#gain.{segment['start']}"].read(), segment["gain"])
        for segment in entry["slabs"]
        if segment["gain"]
    }
    hashes = entry["base"], entry["merged"]
    weight = entry["weight"] if entry["against"] == "codes" else ""
    undo = TensorUndo(
        key, dtype, shape, (rows, columns), segments, segment_factors, patch, entry["against"], *hashes, weight
    )
    _check_arrays(undo)
    return undo


def _parse_segment(key: str, entry: Mapping[str, Any], arrays: Mapping[str, LazyArray]) -> Segment:
    start = entry["start"]
    terms = tuple(
        (float(strength), LowRank(arrays[f"{key}#B.{start}.{i}"], arrays[f"{key}#A.{start}.{i}"], float(scale)))
        for i, (strength, scale) in enumerate(entry["factors"])
    )
    return Segment(entry["module"], start, entry["stop"], terms, entry["transposed"])


def _check_outline(entry: Mapping[str, Any]) -> None:
    """Raise a ValueError for a dtype that no merge writes, and for a value that is not a shape."""
    name = entry["dtype"]
    # `np.dtype` would parse "f4,i4" as a list of fields, so only identifiers are passed to it.
    dtype = np.dtype(name) if isinstance(name, str) and name.isidentifier() else None
    # Only the dtype's own name is accepted: aliases such as `longdouble` mean different dtypes on different machines.
    if dtype is None or str(dtype) != name or dtype.hasobject or dtype.names or dtype.itemsize not in (1, 2, 4, 8):
        raise ValueError(f"dtype {ascii(name)[:40]}")
    if not _is_shape(entry["shape"]):
        raise ValueError(f"shape {ascii(entry['shape'])[:40]}")


def _check_entry(entry: Mapping[str, Any]) -> None:
    """Raise a ValueError for an entry whose fields have wrong types or do not fit together."""
    _check_outline(entry)
    matrix, segments, coded = entry["matrix"], entry["slabs"], entry["against"] == "codes"
    # With codes, ``shape`` is that of the stored tensor and ``matrix`` that of the decoded weight: sizes may differ.
    if not _is_shape(matrix) or len(matrix) != 2 or not (coded or prod(matrix) == prod(entry["shape"])):
        raise ValueError(f"matrix {ascii(matrix)[:40]}")
    # Without a name, codes would be taken for floats.
    if coded and not (isinstance(entry["weight"], str) and entry["weight"] and segments == []):
        raise ValueError("its weight is not named, or it has segments")
    if (
        entry["coding"] not in CODINGS
        or entry["against"] not in AGAINST
        or not (_is_count(entry["different"]) and entry["different"] <= prod(matrix))
        or not (isinstance(entry["base"], str) and isinstance(entry["merged"], str))
    ):
        raise ValueError(f"a patch of {ascii(entry['different'])[:20]} entries in {ascii(entry['coding'])[:20]}")
    # Segments lie in order, without overlap, within the rows, so their starts and stops do not decrease.
    ends = [0, *(end for segment in segments for end in (segment["start"], segment["stop"])), matrix[0]]
    if not (isinstance(segments, list) and all(map(_is_segment, segments)) and ends == sorted(ends)):
        raise ValueError(f"segments of rows {ascii(ends[1:-1])[:40]} in {matrix[0]}")


def _is_segment(segment: Mapping[str, Any]) -> bool:
    numbers = [number for pair in segment["factors"] for number in pair]
    return (
        _is_count(segment["start"])
        and _is_count(segment["stop"])
        and isinstance(segment["module"], str)
        and isinstance(segment["transposed"], bool)
        and segment["gain"] in (None, "rows", "columns")
        # Far beyond any scale. NaN and Inf fail the comparison too.
        and all(type(number) in (int, float) and abs(number) < 1e300 for number in numbers)
    )


def _check_arrays(undo: TensorUndo) -> None:
    """Refuse streams that are not 1-D uint8 arrays, and factors whose shapes or dtypes contradict the entry."""
    for stream in undo.patch.streams:
        if stream.dtype != np.uint8 or stream.ndim != 1:
            raise ValueError(f"a stream of {stream.dtype} {stream.shape}")
    for segment in undo.segments:
        shape = segment.stop - segment.start, undo.matrix[1]
        for _, update in segment.terms:
            # The kind V is accepted because ml_dtypes registers bfloat16 and float8 with it.
            if any(factor.dtype.kind not in "fV" for factor in update.factors):
                raise TypeError("a factor that does not hold floats")
            if (update.shape[::-1] if segment.transposed else update.shape) != shape:
                raise ValueError(f"factors of {update.shape} for {shape}")
        if segment.start in undo.segment_factors:
            values, axis = undo.segment_factors[segment.start]
            # Every other dtype would give sums of other bits than those of the merge, or none at all.
            if values.dtype != np.float32 or values.shape != (shape[axis == "columns"],):
                raise ValueError(f"factors of DoRA {values.dtype} {values.shape} for {shape}")


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value)) and prod(n for n in value if n) <= MOST


def _is_count(value: Any) -> bool:
    # `type`, not isinstance: True is an int in Python.
    return type(value) is int and 0 <= value <= MOST
