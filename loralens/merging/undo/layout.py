"""The content of an undo file: the records of a merge as named arrays and a JSON object.

Arrays for each stored tensor KEY of the base that the merge changed:

    KEY#patch.I         the deflated streams of its patch, U8
    KEY#gain.START      DoRA's factors of the slab that begins at row START, F32
    KEY#B.START.I       the factors of the I-th update of that slab, as they were in the adapter
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

A slab has module, start, stop, transposed, factors (strength and scale of each update), and gain (the axis of DoRA's
factors, or null).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, final

import ml_dtypes  # noqa: F401 - teaches NumPy the names of narrow floats
import numpy as np

from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank
from loralens.errors import FormatError, ShapeError, place
from loralens.merging.dora_factors import DoraFactors
from loralens.merging.plan import Slab, as_matrix
from loralens.merging.record import TensorRecord
from loralens.merging.undo.entry import check_arrays, check_entry, check_factor, check_outline
from loralens.merging.undo.patch import Blob
from loralens.merging.undo.restore import TensorUndo

PIECE = 1 << 16  # letters that are hashed at a time
STREAMS = 8  # most streams of a patch: one for each byte of the widest number
VERSION = 1
WITH_CODES = 2  # the version of files with codes, which older readers would take for floats
WITH_ORIGINS = 3  # the version of files that need the adapter, which commit 31ab7467 was the last to read
VERSIONS = (VERSION, WITH_CODES)
_DAMAGED = "the undo file is damaged: use another copy"


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
    for slab in _packed_slabs(record):
        if slab.start in record.slab_factors:
            arrays[f"#gain.{slab.start}"] = LazyArray.of(record.slab_factors[slab.start].values)
        for i, (_, update) in enumerate(slab.terms):
            B, A = update.factors
            arrays |= {f"#B.{slab.start}.{i}": B, f"#A.{slab.start}.{i}": A}
    return arrays


def pack_entry(record: TensorRecord) -> dict[str, Any]:
    """The JSON entry of one tensor."""
    plan, patch, stored = record.plan, record.patch, record.stored
    assert patch is not None
    outline: dict[str, Any]
    if stored is not None:
        outline = {
            "dtype": str(stored.dtype),
            "shape": list(stored.shape),
            "matrix": list(plan.matrix),
            "weight": plan.key,
        }
    else:
        assert plan.base is not None
        outline = {
            "dtype": str(plan.base.dtype),
            "shape": list(plan.base.shape),
            "matrix": list(plan.matrix if plan.base.shape == plan.shape else as_matrix(plan.base.shape)),
        }
    return outline | {
        "base": record.base_hash,
        "merged": record.merged_hash,
        "coding": patch.coding,
        "different": patch.different,
        "against": record.against,
        "slabs": [_slab_entry(slab, record) for slab in _packed_slabs(record)],
    }


def _packed_slabs(record: TensorRecord) -> Sequence[Slab]:
    """The slabs of which the undo file holds factors.

    They are only needed if unmerging computes the update. Otherwise the merged tensor and the patch are enough.
    """
    return record.plan.slabs if record.stored is None and record.against == "subtracted" else ()


def layout_version(records: Iterable[TensorRecord]) -> int:
    """The version of an undo file of these records."""
    return WITH_CODES if any(record.against == "codes" for record in records) else VERSION


def _slab_entry(slab: Slab, record: TensorRecord) -> dict[str, Any]:
    dora_factors = record.slab_factors.get(slab.start)
    return {
        "module": slab.module,
        "start": slab.start,
        "stop": slab.stop,
        "transposed": slab.transposed,
        "factors": [[strength, update.scale] for strength, update in slab.terms],
        "gain": dora_factors.axis if dora_factors else None,
    }


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
            check_outline(self.entries[key])
            return np.dtype(self.entries[key]["dtype"]), tuple(int(n) for n in self.entries[key]["shape"])


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
    if content.get("version") == WITH_ORIGINS:
        raise FormatError(
            "needs the adapter that was merged (--undo-kind adapter), and loralens no longer reads such undo files",
            fix="unmerge with the last commit that reads them, 31ab7467",
        )
    if content.get("version") not in VERSIONS:
        raise FormatError(
            f"is an undo file of version {content.get('version')!a:.20}, and this loralens reads up to {max(VERSIONS)}",
            fix="unmerge with the loralens that wrote it",
        )
    content = {"whole": {}, **content}
    parts = {name: content.get(name) for name in ("tensors", "copies", "headers", "texts", "whole")}
    missing = [name for name, part in parts.items() if not isinstance(part, dict)]
    texts = ("copies", "headers", "texts", "whole")
    # Hashes and texts come from a file, so their types are checked before they are used.
    if not missing and not all(isinstance(text, str) for name in texts for text in content[name].values()):
        missing = ["texts"]
    dropped = content.get("dropped")
    if missing or not isinstance(dropped, list) or not all(isinstance(key, str) for key in dropped):
        raise FormatError("its outline is malformed", fix=_DAMAGED)
    if any(f"{key}#whole" not in arrays for key in dropped):
        raise FormatError("its outline is malformed", fix=_DAMAGED)
    written = text_digest(content["headers"], content["texts"])
    # Files of older versions have no digest and are accepted without it.
    if content.get("digest", written) != written:
        raise FormatError("its headers and texts do not match their digest", fix=_DAMAGED)
    return MergeUndo(
        content["tensors"], arrays, {key: arrays[f"{key}#whole"] for key in dropped}, content["whole"],
        content["copies"], content["headers"], content["texts"],
    )  # fmt: skip


def _parse_entry(key: str, entry: Mapping[str, Any], arrays: Mapping[str, LazyArray]) -> TensorUndo:
    """Build the `TensorUndo` of one tensor from its entry and arrays, the inverse of `pack_entry` and `pack_arrays`."""
    check_entry(entry)
    stem = f"{key}#patch."
    # Each is looked up by its name: a search of all arrays for every tensor would take quadratic time.
    streams = tuple(arrays[name] for i in range(STREAMS) if (name := f"{stem}{i}") in arrays)
    patch = Blob(entry["coding"], int(entry["different"]), streams)
    dtype, shape, (rows, columns) = np.dtype(entry["dtype"]), tuple(entry["shape"]), entry["matrix"]
    slabs = tuple(_parse_slab(key, slab, arrays) for slab in entry["slabs"])
    slab_factors = {
        slab["start"]: DoraFactors(arrays[f"{key}#gain.{slab['start']}"].read(), slab["gain"])
        for slab in entry["slabs"]
        if slab["gain"]
    }
    hashes = entry["base"], entry["merged"]
    weight = entry["weight"] if entry["against"] == "codes" else ""
    undo = TensorUndo(key, dtype, shape, (rows, columns), slabs, slab_factors, patch, entry["against"], *hashes, weight)
    check_arrays(undo)
    return undo


def _parse_slab(key: str, entry: Mapping[str, Any], arrays: Mapping[str, LazyArray]) -> Slab:
    start = int(entry["start"])

    def factor(side: str, i: int) -> LazyArray:
        return check_factor(arrays[f"{key}#{side}.{start}.{i}"])

    terms = tuple(
        (float(strength), LowRank(factor("B", i), factor("A", i), float(scale)))
        for i, (strength, scale) in enumerate(entry["factors"])
    )
    return Slab(entry["module"], start, int(entry["stop"]), terms, bool(entry["transposed"]))
