"""Reading and writing moments, which are stored in one small safetensors file.

It holds ``<module>.K`` (r, r) and, if the out side was measured, ``<module>.G`` (r, r), float64. The only metadata key,
``loralens.moments``, holds a JSON object with ``version``, ``fingerprint`` of the adapter, ``counts`` and ``traces`` by
module, ``unmeasured`` and ``source``.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.core.stored import Moment, Moments, parse_json
from loralens.errors import FormatError, OptionError, place
from loralens.formats.files.container import Stored, read_safetensors
from loralens.formats.files.disk import check_room
from loralens.formats.files.location import existing_file
from loralens.formats.files.writing import write_safetensors

KEY = "loralens.moments"
VERSION = 1
LARGEST = 1e150  # of an entry: products of two such entries, as an eigenvalue routine makes them, stay finite
# How far K may be from symmetric, and how far below 0 an eigenvalue may be, relative to the largest entry.
ROUNDING = 1e-4
_AGAIN = "measure them again: loralens calibrate"


def save_moments(moments: Moments, path: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Write moments to a safetensors file, which appears complete or not at all. Equal moments give equal bytes.

    Raises
    ------
    OptionError
        The name does not end in ``.safetensors``, its folder does not exist, or the file exists and ``overwrite`` is
        false or it holds something else than moments.
    FormatError
        The file cannot be written.
    """
    path = Path(path)
    check_moments_target(path, overwrite=overwrite)
    tensors = {}
    for name, moment in moments.items():
        tensors[f"{name}.K"] = LazyArray.of(np.ascontiguousarray(moment.K, np.float64))
        if moment.G is not None:
            tensors[f"{name}.G"] = LazyArray.of(np.ascontiguousarray(moment.G, np.float64))
    record = {
        "version": VERSION,
        "fingerprint": moments.fingerprint,
        "counts": {name: moment.count for name, moment in moments.items()},
        "traces": {name: moment.trace for name, moment in moments.items()},
        "unmeasured": dict(moments.unmeasured),
        "source": dict(moments.source),
    }
    write_safetensors(Stored(tensors, {KEY: json.dumps(record, ensure_ascii=True)}), path)


def check_moments_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a path where moments cannot be written, before they are measured."""
    if path.suffix != ".safetensors":
        raise OptionError(f"{path}: moments are written to .safetensors files", fix="give a file of that suffix")
    check_room(path)
    if path.exists() and (path.is_dir() or not overwrite):
        raise OptionError(f"{path}: exists", fix="choose another target, or give --overwrite")
    # --overwrite must not destroy an adapter whose name was given by mistake.
    if path.exists():
        metadata: Mapping[str, str] | None = None
        with suppress(FormatError):
            metadata = read_safetensors(path).metadata
        if KEY not in (metadata or {}):
            raise OptionError(f"{path}: exists, and holds no moments", fix="choose another target")


def load_moments(path: str | PathLike[str]) -> Moments:
    """Read the moments in a file.

    Raises
    ------
    OptionError
        There is no such file.
    FormatError
        The file holds no moments, or they are damaged.
    """
    path = existing_file(Path(path), fix="check the path, or measure the moments: loralens calibrate")
    stored = read_safetensors(path)
    with place(path):
        record = _record(stored)
        counts, traces = record["counts"], record["traces"]
        modules = {name: _moment(name, count, traces.get(name), stored.tensors) for name, count in counts.items()}
        # Only a file that was put together by hand or damaged has a tensor without a count.
        extra = set(stored.tensors) - {f"{name}.{side}" for name in modules for side in "KG"}
        if extra:
            raise FormatError(f"{min(extra)} belongs to no module that was counted", fix=_AGAIN)
    described = {field: record[field] for field in ("fingerprint", "unmeasured", "source")}
    return Moments(modules=modules, **described)


def _record(stored: Stored) -> dict[str, Any]:
    """The record in the metadata, whose fields are checked for their types."""
    if KEY not in (stored.metadata or {}):
        raise FormatError("holds no moments", fix="give the file that loralens calibrate wrote")
    try:
        record = parse_json((stored.metadata or {})[KEY])
    except ValueError as error:
        raise FormatError(f"its record is not valid JSON ({error})", fix=_AGAIN) from error
    version = record.get("version") if isinstance(record, dict) else None
    # A newer version may mean other numbers by the same keys.
    if version != VERSION:
        raise FormatError(
            f"its record is of version {version!a:.20}, not {VERSION}", fix=_AGAIN + ", with this loralens"
        )
    # Every field is used without further checks by the callers.
    kinds = {"fingerprint": str, "counts": dict, "traces": dict, "unmeasured": dict, "source": dict}
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            raise FormatError(f"its record has no {name}", fix=_AGAIN)
    if not all(type(count) is int and count >= 0 for count in record["counts"].values()):
        raise FormatError("its counts are not whole numbers", fix=_AGAIN)
    if not all(x is None or (type(x) in (int, float) and 0 <= x <= LARGEST) for x in record["traces"].values()):
        raise FormatError("its traces are negative, not numbers, or larger than any inputs can cause", fix=_AGAIN)
    if not all(isinstance(reason, str) for reason in record["unmeasured"].values()):
        raise FormatError("its reasons are not text", fix=_AGAIN)
    return dict(record)


def _moment(name: str, count: int, trace: float | None, tensors: Mapping[str, LazyArray]) -> Moment:
    with place(name):
        K, G = (_square(tensors, f"{name}.{side}") for side in "KG")
        if K is None:
            raise FormatError("it was counted, but its moments are missing", fix=_AGAIN)
        return Moment(K, count, G, trace=trace)


def _square(tensors: Mapping[str, LazyArray], key: str) -> Array | None:
    """The matrix of second moments under a key, checked to be symmetric and positive semidefinite; None if missing."""
    if key not in tensors:
        return None
    tensor = tensors[key]
    if tensor.ndim != 2 or tensor.shape[0] != tensor.shape[1] or tensor.dtype != np.float64:
        raise FormatError(f"{key} {tensor.shape} {tensor.dtype} is not a square float64 matrix", fix=_AGAIN)
    array = tensor.read()
    if not np.isfinite(array).all():
        raise FormatError(f"{key} holds NaN or Inf", fix=_AGAIN)
    size = float(np.abs(array).max(initial=0.0))
    if size > LARGEST:
        raise FormatError(f"{key} holds numbers up to {size:.0e}, which no inputs can cause", fix=_AGAIN)
    # eigvalsh returns the smallest eigenvalue first.
    lowest = float(np.linalg.eigvalsh(array)[0]) if size else 0.0
    if np.abs(array - array.T).max(initial=0.0) > ROUNDING * size or lowest < -ROUNDING * size:
        what = f"{key} is not a matrix of second moments: it is not symmetric, or has a negative eigenvalue"
        raise FormatError(what, fix=_AGAIN)
    return array
