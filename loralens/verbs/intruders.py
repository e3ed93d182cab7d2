"""The verb ``intruders``: finds singular vectors of W + ΔW that W does not have, and can shrink them."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from math import isfinite
from os import PathLike
from typing import Unpack, get_args

from loralens.analysis.base.intruders import (
    THRESHOLD,
    TOP,
    Intruders,
    check_definition,
    check_plain,
    find_intruders,
    remove_intruders,
    replace_modules,
)
from loralens.choices import FloatType
from loralens.core.adapter import Adapter
from loralens.core.naming.selection import select
from loralens.core.structured import Update
from loralens.errors import OptionError, place
from loralens.formats import save
from loralens.formats.dialects.table import FORMATS
from loralens.linalg.device import Device
from loralens.verbs.inputs.adapters import AdapterSource, Reading, labels, read_adapter
from loralens.verbs.inputs.bases import base_weights
from loralens.verbs.inputs.choices import Blocks, as_globs, check_choice, numpy_dtype
from loralens.verbs.inputs.decompositions import decompositions, svd_cache
from loralens.verbs.outputs.intruders import IntrudersResult, Removal
from loralens.verbs.outputs.rounding import RoundingCost, round_factors
from loralens.verbs.outputs.target import Target


def intruders(
    adapter: AdapterSource,
    *,
    base: str | PathLike[str],
    modules: Sequence[str] = (),
    block: Blocks = (),
    top: int = TOP,
    threshold: float = THRESHOLD,
    remove: float | None = None,
    output: str | PathLike[str] | None = None,
    uniform: bool = False,
    dtype: FloatType = "f32",
    allow_loss: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    cache: str | PathLike[str] | None = None,
    cache_limit: str = "20GB",
    no_cache: bool = False,
    device: str = "cpu",
    **reading: Unpack[Reading],
) -> IntrudersResult:
    """Find the leading singular directions of W + ΔW that no singular direction of W resembles (arXiv 2410.21228).

    The score of a direction is the largest |cosine| of its left singular vector with those of W; below ``threshold``
    the direction is an intruder. Nearly every random direction is one, as the column "chance" shows: a low score means
    that the direction is spread over many directions of W, not that W does not have it. W is decomposed once, and its
    SVD is kept; W + ΔW is not decomposed at all.

    Parameters
    ----------
    adapter : path or Adapter
    base : path
        The base model: a folder, a safetensors or GGUF file, or a Hub id in the local cache.
    modules : sequence of str
        Only modules whose name or kind matches one of these glob patterns.
    block : int, str or sequence of them
        Only modules in these blocks: ``3``, ``"4-8"``, or ``"IN04"`` of an image model.
    top : int
        The number of leading singular directions of W + ΔW to look at.
    threshold : float
        A direction is an intruder if no |cosine| with a direction of W is as large as this; above 0, at most 1.
    remove : float, optional
        Make an adapter in which every intruder is multiplied by this: 0 removes them, 1 keeps them. It is the
        ``adapter`` of the result.
    output : path, optional
        Where that adapter is written: a folder or a file. Without it nothing is written.
    uniform : bool
        Give all modules of that adapter the same rank, padded with zeros.
    dtype : str
        The dtype of the factors that change: ``f32``, ``bf16`` or ``f16``.
    allow_loss : bool
        Accept the result even if rounding changes the update of a module by more than 1 %.
    overwrite : bool
        Replace what is already at ``output``.
    dry_run : bool
        Say what would be written, and write nothing.
    cache : path, optional
        The folder in which SVDs of W are kept between runs; by default in the user's cache folder.
    cache_limit : str
        The size of that folder above which the oldest SVDs are deleted.
    no_cache : bool
        Neither use nor keep SVDs of earlier runs.
    device : str
        The device for computations on W: ``cpu``, ``cuda`` or ``cuda:N``.
    **reading : Reading
        How the file is read: ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        An output and nothing to write; options that exclude each other, or make no sense; rounding that costs too much.
    FormatError
        A file that is not an adapter, or not a model; numbers that are NaN or Inf.
    MismatchError
        A module that has no weight in the base, or whose tuned weight is not W + ΔW (DoRA).
    """
    check_definition(top=top, threshold=threshold)
    check_choice("dtype", str(dtype), get_args(FloatType))
    # Any finite factor is allowed: above 1 it makes the intruders stronger, below 0 it turns them around.
    if remove is not None and not isfinite(remove):
        raise OptionError(f"remove {remove!r} is not possible", fix="give a finite number: 0 removes, 1 keeps")
    if output is not None and remove is None:  # a forgotten `remove` would be noticed only after the search
        raise OptionError(f"nothing would be written to {output}", fix="give remove, the factor for the intruders")
    store = svd_cache(cache, cache_limit, no_cache=no_cache)
    linalg_device = Device.of(device)
    (label,) = labels([adapter])
    loaded = read_adapter(adapter, reading, base=base, label=label)
    with place(label):
        names = select(loaded, as_globs(modules, block))
        # With a strength of 1 nothing is edited, so modules that are not pairs may stay.
        check_plain(loaded, names, pairs=remove not in (None, 1))
    target = Target.of(output, overwrite=overwrite, dry_run=dry_run)
    target.check_source(adapter, base=base)  # what is read is never replaced
    # The SVDs of a base of 7B take an hour or so. What the writer would refuse is found before them, by a rehearsal.
    if output is not None:
        save(replace_modules(loaded, {}), output, format=_dialect(loaded), overwrite=overwrite, dry_run=True)
    weights = base_weights(base, {name: loaded[name] for name in names}).modules
    measured: dict[str, Intruders] = {}
    edited: dict[str, Update] = {}
    # Factors for a narrow dtype stay in float64 until all of them are there, so that they are rounded only once.
    edit_dtype = "float32" if dtype == "f32" else "float64"
    with closing(decompositions(weights, store, base, linalg_device)) as svds:
        for name, W in svds:
            with place(label), place(name):
                module = find_intruders(loaded[name], W, top=top, threshold=threshold)
                if remove is not None:
                    edited[name] = remove_intruders(loaded[name], module, strength=remove, dtype=edit_dtype)
                # Only the edit needs the vectors: 0.7 MB a module for ten directions of a 4096 × 4096 weight.
                measured[name] = module.without_vectors()
    result = IntrudersResult(label, str(base), threshold, top, measured, {name: loaded[name].rank for name in measured})
    if remove is None:
        return result
    edit = _finish_removal(loaded, label, edited, remove, target, dtype=dtype, uniform=uniform, allow_loss=allow_loss)
    return replace(result, removal=edit)


def _finish_removal(
    adapter: Adapter,
    label: str,
    edited: Mapping[str, Update],
    strength: float,
    target: Target,
    *,
    dtype: FloatType,
    uniform: bool,
    allow_loss: bool,
) -> Removal:
    """Round the edited modules to ``dtype``, and write the adapter that has them.

    Modules without intruders did not change, and are written back bit for bit.
    """
    exact = replace(adapter, modules={name: module for name, module in edited.items() if module is not adapter[name]})
    with place(label):
        rounded = round_factors(exact, numpy_dtype(dtype)).modules
        # The cost is that of all modules together, and names the worst one.
        cost = RoundingCost.between(exact, rounded, allow_loss=allow_loss, dtype=dtype)
    new = replace_modules(adapter, dict(rounded), uniform=uniform)
    dialect = _dialect(adapter)
    if target.output is not None:
        save(new, target.output, format=dialect, overwrite=target.overwrite, dry_run=target.dry_run)
    return Removal(new, strength, len(rounded), cost, dialect, target.output, target.dry_run)


def _dialect(adapter: Adapter) -> str:
    """The adapter's own dialect, or PEFT's if that cannot be written."""
    writable = any(form.name == adapter.format and form.writer for form in FORMATS)
    return str(adapter.format) if writable else "peft"
