"""What an undo file holds: records of a merge as named arrays and one JSON object, and back.

Arrays, for each stored tensor KEY that the merge changed and the base has:

    KEY#patch.I         the deflated streams of its patch, U8
    KEY#gain.START      DoRA's gain of the slab that begins at row START, F32
    KEY#B.START.I       the factors of the I-th update of that slab, as they were in the adapter
    KEY#A.START.I
    KEY#whole           a tensor that the merge left out (scales of float8 weights), as it was

JSON: ``version``; ``adapters``, what was merged; ``dropped``, keys that the merge left out; ``copies``, KEY → SHA-256
of every tensor that it did not touch; ``headers``, ``texts``, what stood at the head of shards and in other files that
the merge changed, and ``digest``, the SHA-256 of both (older files have none); ``tensors``, KEY → ``dtype``, ``shape``,
``matrix``, ``base`` and ``merged`` (SHA-256), ``coding``, ``different``, ``against``, ``slabs``: ``module``, ``start``,
``stop``, ``transposed``, ``factors`` (strength and scale of each update), ``gain`` (its axis, or null).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, final

import ml_dtypes  # noqa: F401 - teaches NumPy the names of narrow floats
import numpy as np

from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank
from loralens.errors import FormatError, ShapeError, place
from loralens.merging.gain import Gain
from loralens.merging.plan import Slab, as_matrix
from loralens.merging.record import TensorRecord
from loralens.merging.undo.entry import check_arrays, check_entry, check_factor, check_outline
from loralens.merging.undo.patch import Blob
from loralens.merging.undo.restore import TensorUndo

VERSION = 1
_DAMAGED = "the undo file is damaged: use another copy"


def digest(headers: Mapping[str, str], texts: Mapping[str, str]) -> str:
    """The SHA-256 of what an undo file holds besides numbers, which have hashes of their own."""
    content = json.dumps([sorted(headers.items()), sorted(texts.items())], ensure_ascii=True)
    return sha256(content.encode("ascii")).hexdigest()


def packed(record: TensorRecord) -> tuple[dict[str, LazyArray], dict[str, Any]]:
    """The arrays and the JSON entry of one tensor."""
    plan, patch = record.plan, record.patch
    assert plan.base is not None
    assert patch is not None
    arrays = {f"{plan.key}#patch.{i}": stream for i, stream in enumerate(patch.streams)}
    factors = record.against == "subtracted"
    for slab in plan.slabs if factors else ():
        if slab.start in record.gains:
            arrays[f"{plan.key}#gain.{slab.start}"] = LazyArray.of(record.gains[slab.start].values)
        for i, (_, update) in enumerate(slab.terms):
            B, A = update.factors
            arrays |= {f"{plan.key}#B.{slab.start}.{i}": B, f"{plan.key}#A.{slab.start}.{i}": A}
    entry = {
        "dtype": str(plan.base.dtype),
        "shape": list(plan.base.shape),
        "matrix": list(plan.matrix if plan.base.shape == plan.shape else as_matrix(plan.base.shape)),
        "base": record.base_hash,
        "merged": record.merged_hash,
        "coding": patch.coding,
        "different": patch.different,
        "against": record.against,
        "slabs": [_slab_entry(slab, record) for slab in plan.slabs] if factors else [],
    }
    return arrays, entry


def _slab_entry(slab: Slab, record: TensorRecord) -> dict[str, Any]:
    gain = record.gains.get(slab.start)
    return {
        "module": slab.module,
        "start": slab.start,
        "stop": slab.stop,
        "transposed": slab.transposed,
        "factors": [[strength, update.scale] for strength, update in slab.terms],
        "gain": gain.axis if gain else None,
    }


@final
@dataclass(frozen=True, slots=True)
class MergeUndo:
    """An undo file as it was read; made by `merge_undo`.

    Attributes
    ----------
    entries : mapping of str to mapping
        Of every tensor that changed.
    arrays : mapping of str to LazyArray
    dropped : mapping of str to LazyArray
        Tensors that the merged model lacks.
    copies : mapping of str to str
        SHA-256 of the tensors that stayed as they were.
    headers, texts : mapping of str to str
        By the name of their file.
    """

    entries: Mapping[str, Mapping[str, Any]]
    arrays: Mapping[str, LazyArray]
    dropped: Mapping[str, LazyArray]
    copies: Mapping[str, str]
    headers: Mapping[str, str]
    texts: Mapping[str, str]

    def tensor(self, key: str) -> TensorUndo:
        """The undo of one tensor; its patch stays in the file.

        Raises
        ------
        FormatError
            Something is missing, or of another kind than it has to be.
        """
        with _entry(key):
            return _unpacked(key, self.entries[key], self.arrays)

    def outline(self, key: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Dtype and shape of a tensor of the base that the merge changed or left out. Raises as `tensor`."""
        if key in self.dropped:
            return self.dropped[key].dtype, self.dropped[key].shape
        with _entry(key):
            check_outline(self.entries[key])
            return np.dtype(self.entries[key]["dtype"]), tuple(int(n) for n in self.entries[key]["shape"])


@contextmanager
def _entry(key: str) -> Iterator[None]:
    """What goes wrong in reading the entry of a tensor is a FormatError that names it."""
    with place(key):
        try:
            yield
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, ShapeError) as error:
            raise FormatError(f"its entry is not as it was written ({ascii(error)[:120]})", fix=_DAMAGED) from error


def merge_undo(arrays: Mapping[str, LazyArray], content: Mapping[str, Any]) -> MergeUndo:
    """What an undo file holds, its outline checked.

    Raises
    ------
    FormatError
        Something is missing, or it is of a version that we do not know.
    """
    if content.get("version") != VERSION:
        raise FormatError(
            f"is an undo file of version {content.get('version')!r}",
            fix=f"unmerge with a loralens that writes version {VERSION}",
        )
    parts = {name: content.get(name) for name in ("tensors", "copies", "headers", "texts")}
    missing = [name for name, part in parts.items() if not isinstance(part, dict)]
    texts = ("copies", "headers", "texts")
    if not missing and not all(isinstance(text, str) for name in texts for text in content[name].values()):
        missing = ["texts"]
    dropped = content.get("dropped")
    if missing or not isinstance(dropped, list) or any(f"{key}#whole" not in arrays for key in map(str, dropped)):
        raise FormatError("its outline is not as it was written", fix=_DAMAGED)
    written = digest(content["headers"], content["texts"])
    if content.get("digest", written) != written:
        raise FormatError("its headers and texts are not as they were written", fix=_DAMAGED)
    return MergeUndo(
        content["tensors"], arrays, {key: arrays[f"{key}#whole"] for key in dropped},
        content["copies"], content["headers"], content["texts"],
    )  # fmt: skip


def _unpacked(key: str, entry: Mapping[str, Any], arrays: Mapping[str, LazyArray]) -> TensorUndo:
    """What `packed` made arrays and an entry of."""
    check_entry(entry)
    streams = tuple(arrays[name] for name in _numbered(f"{key}#patch.", arrays))
    rows, columns = entry["matrix"]
    undo = TensorUndo(
        key,
        np.dtype(entry["dtype"]),
        tuple(entry["shape"]),
        (int(rows), int(columns)),
        tuple(_slab(key, one, arrays) for one in entry["slabs"]),
        {
            one["start"]: Gain(arrays[f"{key}#gain.{one['start']}"].read(), one["gain"])
            for one in entry["slabs"]
            if one["gain"]
        },
        Blob(entry["coding"], int(entry["different"]), streams),
        entry["against"],
        entry["base"],
        entry["merged"],
    )
    check_arrays(undo)
    return undo


def _slab(key: str, entry: Mapping[str, Any], arrays: Mapping[str, LazyArray]) -> Slab:
    start = int(entry["start"])

    def factor(side: str, i: int) -> LazyArray:
        return check_factor(arrays[f"{key}#{side}.{start}.{i}"])

    terms = tuple(
        (float(strength), LowRank(factor("B", i), factor("A", i), float(scale)))
        for i, (strength, scale) in enumerate(entry["factors"])
    )
    return Slab(entry["module"], start, int(entry["stop"]), terms, bool(entry["transposed"]))


def _numbered(stem: str, names: Iterable[str]) -> list[str]:
    """The names that begin with ``stem``, in the order of the numbers behind it."""
    return sorted((name for name in names if name.startswith(stem)), key=lambda name: int(name[len(stem) :]))
