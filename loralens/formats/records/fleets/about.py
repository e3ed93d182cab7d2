"""Everything about an adapter of a compressed fleet but its numbers, and the adapter that it describes.

The JSON object of an adapter whose modules are coded has

============  ==========================================================================================
description   the fields of loralens-q (`loralens.formats.dialects.quantised.reader`)
frame         module → its place among the modules of the numbers
parts         [out, in, directions] of each of these modules, if they are not those of a group
dtypes        module → dtype of its factors in the source; float32 where it is missing
ranks         module → its rank in the source, where that is larger than a side of the weight
extras        key → digest of the extra
============  ==========================================================================================

That of an adapter whose tensors are stored as they were has ``dialect``, ``config``, ``metadata`` and ``tensors``, a
mapping of keys to digests.
"""

from collections.abc import Callable, Mapping, Sequence
from math import log2
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.carried import NORMS
from loralens.core.few_bits.quantised import direction_bytes, from_bytes
from loralens.core.few_bits.shared_bases import Pair, SharedBases, lazy_pair, shared_factors
from loralens.core.fingerprint import fingerprint
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Layout, LowRank
from loralens.core.scaling import Scaling
from loralens.errors import FormatError, LoraLensError, place
from loralens.formats import encode_adapter
from loralens.formats.dialects import record
from loralens.formats.dialects.quantised.reader import VERSION, Outline, parse_description
from loralens.formats.dialects.quantised.writer import describe
from loralens.formats.dialects.table import FORMATS
from loralens.formats.files.container import DTYPE_NAMES, DTYPES, FLOATS, Stored
from loralens.formats.files.json_text import is_safe_text
from loralens.formats.records.fleets.contents import DAMAGED, content_digest
from loralens.linalg.factor import Floats
from loralens.linalg.few_bits.packing import Bytes

# A module may have more directions than are stored, which are zeros. So a small file could ask for huge arrays; a file
# that was written by compress is far from this.
MOST_NUMBERS = 4096  # numbers of expanded factors for each byte of the tensors that an adapter uses

Extras = Callable[[str], LazyArray]  # digest → tensor


class Coded(NamedTuple):
    """The factors of ΔW of the modules of some numbers, by their places.

    Attributes
    ----------
    shapes : sequence of (out, in)
    factors : callable
        Takes a place and a rank r, and gives B (out, k) and A (k, in) with k ≤ r.
    nbytes : int
        The bytes of the tensors that the numbers come from.
    """

    shapes: Sequence[tuple[int, int]]
    factors: Callable[[int, int], Pair]
    nbytes: int


def about_coded(
    adapter: Adapter, frame: Mapping[str, int], parts: Sequence[tuple[int, int, int]] | None = None
) -> tuple[dict[str, Any], dict[str, LazyArray]]:
    """The JSON object of a coded adapter, and its extras by digest."""
    extras = {key: content_digest(extra.tensor) for key, extra in adapter.extra.items()}
    dtypes = {name: DTYPE_NAMES[module.dtype] for name, module in adapter.items() if module.dtype.itemsize < 4}
    ranks = {name: module.rank for name, module in adapter.items() if module.rank > min(module.shape)}
    about: dict[str, Any] = {
        "description": describe(adapter, {name: min(module.rank, *module.shape) for name, module in adapter.items()}),
        "frame": dict(frame),
        **({"parts": [list(part) for part in parts]} if parts is not None else {}),
        **({"dtypes": dtypes} if dtypes else {}),
        **({"ranks": ranks} if ranks else {}),
        "extras": extras,
    }
    return about, {digest: adapter.extra[key].tensor for key, digest in extras.items()}


def about_stored(adapter: Adapter) -> tuple[dict[str, Any], dict[str, LazyArray]]:
    """The JSON object of an adapter whose tensors are stored as they are, and these tensors by digest.

    Raises
    ------
    LoraLensError
        Its dialect cannot be written, and its tensors alone do not give the adapter back.
    """
    problem: LoraLensError | None = None
    for collect in (_as_written, _as_read):
        try:
            stored = collect(adapter)
            digests = {key: content_digest(tensor) for key, tensor in stored.tensors.items()}
            about = {
                "dialect": adapter.format,
                "config": None if stored.config is None else dict(stored.config),
                "metadata": None if stored.metadata is None else dict(stored.metadata),
                "tensors": digests,
            }
            tensors = {digest: stored.tensors[key] for key, digest in digests.items()}
            if fingerprint(stored_adapter(about, tensors.__getitem__)) == fingerprint(adapter):
                return about, tensors
        except LoraLensError as error:
            problem = problem or error
    raise problem or FormatError("would not be the same adapter when it is read back", fix="report this as a bug")


def _as_written(adapter: Adapter) -> Stored:
    """The tensors that the writer of its dialect gives."""
    return encode_adapter(adapter)[0]


def _as_read(adapter: Adapter) -> Stored:
    """The tensors from which it was read; some dialects are only read."""
    tensors = {key: extra.tensor for key, extra in adapter.extra.items() if extra.role not in NORMS}
    for module in adapter.modules.values():
        if module.origin is None:
            raise FormatError("was not read from a file", fix="save it first")
        tensors |= module.origin.tensors
    return Stored(tensors, adapter.metadata, adapter.config)


def stored_adapter(about: Mapping[str, Any], extras: Extras) -> Adapter:
    """The adapter whose tensors are stored as they were.

    Raises
    ------
    FormatError
        The description is damaged.
    """
    dialect = next((form for form in FORMATS if form.name == about.get("dialect")), None)
    config, metadata, tensors = (about.get(key) for key in ("config", "metadata", "tensors"))
    sound = config is None or isinstance(config, dict)
    texts = metadata is None or (isinstance(metadata, dict) and all(isinstance(t, str) for t in metadata.values()))
    if dialect is None or not (sound and texts and isinstance(tensors, dict)):
        raise FormatError("its description is damaged", fix=DAMAGED)
    if not all(map(is_safe_text, tensors.values())):
        raise FormatError("its description is damaged", fix=DAMAGED)
    stored = Stored({key: extras(digest) for key, digest in tensors.items()}, metadata, config)
    return record.apply_stored(dialect.read(stored), stored)


def coded_adapter(about: Mapping[str, Any], coded: Coded, extras: Extras, *, rank: int | None = None) -> Adapter:
    """The adapter of some numbers. Its factors are computed when they are read.

    Parameters
    ----------
    rank : int, optional
        The largest rank of a module; by default every module has the rank of the source.

    Raises
    ------
    FormatError
        The description is damaged.
    """
    # Only adapters with narrow floats have the field `dtypes`, and only those with wide factors the field `ranks`.
    parts = [about.get(key) for key in ("description", "frame", "extras")]
    parts += [about.get(key, {}) for key in ("dtypes", "ranks")]
    mappings: list[dict[str, Any]] = [part for part in parts if isinstance(part, dict)]
    if len(mappings) < len(parts):
        raise FormatError("its description is damaged", fix=DAMAGED)
    fields, frame, digests, dtypes, ranks = mappings
    if fields.get("version") != VERSION:
        raise FormatError(f"its description is of version {fields.get('version')!a:.20}", fix="update loralens")
    outline = parse_description(fields)
    if digests.keys() != outline.extra.keys() or frame.keys() != outline.modules.keys() or not frame:
        raise FormatError("its description does not fit its modules or extras", fix=DAMAGED)
    modules, numbers = {}, 0
    for name in outline.modules:
        with place(name):
            modules[name] = _module(outline, name, coded, frame[name], dtypes.get(name, "F32"), ranks.get(name), rank)
            numbers += modules[name].rank * sum(modules[name].shape)
            if numbers > MOST_NUMBERS * coded.nbytes:
                raise FormatError("its modules are larger than their bytes can be", fix=DAMAGED)
    return Adapter(
        modules=modules,
        extra={key: outline.extra_tensor(key, extras(digest)) for key, digest in digests.items()},
        config=fields["config"],
        metadata=fields["metadata"],
        format=fields["source"],
        base_model=outline.base_model,
        findings=outline.findings,
        narrowed=fields["narrowed"],
        peft_fields=outline.peft_fields,
    )


def _module(outline: Outline, name: str, coded: Coded, place_: Any, dtype: Any, wide: Any, rank: int | None) -> LowRank:
    """A module; ``wide`` is its rank in the source if that is larger than a side of the weight."""
    shape, source_rank, scale, scaling, layout = outline.module(name)
    fits = type(place_) is int and 0 <= place_ < len(coded.shapes) and coded.shapes[place_] == shape
    if not fits or source_rank < 1 or not isinstance(dtype, str) or DTYPES.get(dtype) not in FLOATS:
        raise FormatError("its description is damaged", fix=DAMAGED)
    if wide is not None:
        if type(wide) is not int or not source_rank == min(shape) < wide:
            raise FormatError("its description is damaged", fix=DAMAGED)
        # The factors are filled with zeros, so that the configuration of the source is true of them.
        source_rank = wide
    new_rank = source_rank if rank is None else min(rank, source_rank)

    def factors() -> Pair:
        B, A = coded.factors(place_, min(new_rank, *shape))
        # The numbers are those of ΔW. An update whose scale is 0 is 0 whatever its factors are.
        return _within_range((B / scale if scale else 0 * B), A, DTYPES[dtype])

    B, A = lazy_pair(factors, shape, new_rank, DTYPES[dtype])
    return LowRank(B, A, scale, scaling=scaling, layout=layout)


def _within_range(B: Floats, A: Floats, dtype: Any) -> Pair:
    """The factors as they are, or multiplied by opposite powers of two where one of them is too large for the dtype.

    One factor may hold the whole norm of ΔW, of which each factor of the source holds about the root.
    """
    sizes = [float(np.abs(factor).max(initial=0)) for factor in (B, A)]
    if max(sizes) <= float(ml_dtypes.finfo(dtype).max) or not all(sizes):
        return B, A
    shift = round((log2(sizes[0]) - log2(sizes[1])) / 2)
    return np.ldexp(B, -shift), np.ldexp(A, shift)


def joint_numbers(bases: SharedBases, data: Bytes, nbytes: int) -> Coded:
    """The modules of an adapter in the bases of its group."""
    cores = bases.cores(data)

    def factors(which: int, rank: int) -> Pair:
        return shared_factors(bases.out[which].read(), cores[which], bases.in_[which].read(), rank)

    return Coded([(U.shape[0], V.shape[0]) for U, V in zip(bases.out, bases.in_, strict=True)], factors, nbytes)


def alone_numbers(parts: Any, data: LazyArray) -> Coded:
    """The modules of an adapter in few bits, one after the other.

    Raises
    ------
    FormatError
        The bytes do not fit the parts.
    """
    if not (isinstance(parts, list) and all(isinstance(p, list) and len(p) == 3 for p in parts)):
        raise FormatError("its description is damaged", fix=DAMAGED)
    modules, start = [], 0
    for out, in_, k in parts:
        if not all(type(n) is int and n > 0 for n in (out, in_, k)) or k > min(out, in_) or start + k > data.size:
            raise FormatError("its description is damaged", fix=DAMAGED)
        bits = data.rows(start, start + k).read()
        stop = start + sum(direction_bytes((out, in_), int(b)) for b in bits)
        if stop > data.size:
            raise FormatError("its bytes end before its last module", fix=DAMAGED)
        modules.append(
            from_bytes(
                data.rows(start, stop), (out, in_), rank=k, scale=1.0, scaling=Scaling(),
                layout=Layout(), key="a module",
            )
        )  # fmt: skip
        start = stop
    if start != data.size:
        raise FormatError(f"{data.size - start:,} bytes follow its last module", fix=DAMAGED)

    def factors(which: int, rank: int) -> Pair:
        module = modules[which]
        if rank >= module.rank:
            return module.B, module.A
        U, s, Vh = module.svd()
        root = np.sqrt(s[:rank])
        return U[:, :rank] * root, root[:, None] * Vh[:rank]

    return Coded([module.shape for module in modules], factors, data.nbytes)
