"""Base: the model that an adapter is held against, and what its weights make of each update."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from loralens.analysis.inspection import broken
from loralens.analysis.spectrum import Spectrum
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.matching import Shape, match
from loralens.core.storage import Storage
from loralens.core.structured import Update, Updates
from loralens.core.weights import Weight, weights_of
from loralens.errors import MismatchError
from loralens.linalg.rounding import Rounding, product_entries, rounded, sample_entries, sampled_rounding

Reason = tuple[str, str]  # what, and a fix

TRIES = 200  # times that modules are halved to find the strangers: enough for a dozen of them among thousands
NARROW = 2  # bytes of the dtypes that a merge can hurt; float32 weights are asked what bfloat16 would do to them


@final
@dataclass(frozen=True, slots=True)
class Base:
    """A base model: what it is called, its tensors, whether linear weights are stored (in, out)."""

    name: str
    tensors: Mapping[str, LazyArray]
    conv1d: bool = False


@final
@dataclass(frozen=True, slots=True)
class Landing:
    """What the weight W makes of ΔW.

    Attributes
    ----------
    ratio : float
        ‖ΔW‖_F/‖W‖_F, the latter from at most 2¹⁸ entries (0.3 % off).
    dtype : str
        The dtype of a merge: as asked for, else that of W, else (W in float32) bfloat16.
    supposed : bool
        Whether that dtype is neither asked for nor W's own.
    rounding : Rounding
        What a merge into it would make of ΔW, from the same entries.
    """

    ratio: float
    dtype: str
    supposed: bool
    rounding: Rounding


def find(modules: Updates, base: Base) -> tuple[dict[str, Weight], dict[str, Reason]]:
    """The weight of every module that has one in the base, and of the others why they have none.

    Strangers are found by halves, so that a head that the base has not hides none of the others.

    Returns
    -------
    dict of str to Weight
    dict of str to Reason
        Under "" where it is so of all modules together: then no weight is returned.
    """
    shapes = {key: tensor.shape for key, tensor in base.tensors.items()}
    storage = Storage(shapes)
    tries = iter(range(TRIES))
    whole: list[MismatchError] = []

    def strangers(names: Sequence[str]) -> Iterator[tuple[str, Reason]]:
        try:
            match({name: modules[name].shape for name in names}, shapes, storage=storage)
        except MismatchError as error:
            whole.append(error)
            if len(names) == 1 or next(tries, None) is None:
                yield from ((name, _stranger(name, modules[name].shape, shapes, error)) for name in names)
                return
            middle = len(names) // 2
            yield from strangers(names[:middle])
            yield from strangers(names[middle:])

    strays = dict(strangers(list(modules)))
    known = {name: module for name, module in modules.items() if name not in strays}
    if not known:
        return {}, strays | {"": (whole[0].what, whole[0].fix)} if whole else {}
    try:
        return dict(weights_of(known, base.tensors, conv1d=base.conv1d).modules), strays
    except MismatchError as error:  # halves that match, each by names of its own
        return {}, strays | {"": (error.what, error.fix)}


def _stranger(name: str, shape: Shape, shapes: Mapping[str, Shape], error: MismatchError) -> Reason:
    stored = next((shapes[key] for key in (f"{name}.weight", name) if key in shapes), None)
    if stored is not None:
        return f"{shape} here and {stored} in the base", "give the base it was trained on"
    return f"the base has no weight of this name and shape {shape}", error.fix


def landings(
    modules: Updates, spectra: Mapping[str, Spectrum], weights: Mapping[str, Weight], dtype: str | None
) -> tuple[dict[str, Landing], dict[str, int]]:
    """What every weight makes of its update, from entries drawn with a fixed seed; and which weights are spoilt.

    Returns
    -------
    dict of str to Landing
    dict of str to int
        Of weights that hold NaN or Inf, and land nothing, how many.
    """
    found, spoilt = {}, {}
    for name, one in spectra.items():
        if name in weights and one.spectral > 0:
            W = weights[name].read()
            if count := broken(W):
                spoilt[name] = count
            else:
                found[name] = _landing(modules[name], one.frobenius, W, dtype)
    return found, spoilt


def _landing(module: Update, norm: float, W: Array, dtype: str | None) -> Landing:
    out, in_ = module.shape
    rows, columns = sample_entries((out, in_))
    w, size = W[rows, columns], out * in_
    mean_square = float(np.mean(w.astype(np.float64) ** 2))
    supposed = dtype is None and w.dtype.itemsize > NARROW
    name = dtype or ("bfloat16" if supposed else w.dtype.name)
    target = _dtype(name)
    d = update_entries(module, rows, columns)
    rounding = sampled_rounding(rounded(w, target), d, size=size, norm=norm, dtype=target)
    whole = (mean_square * size) ** 0.5
    return Landing(norm / whole if whole else np.inf, name, supposed, rounding)


def update_entries(module: Update, rows: Array, columns: Array) -> Array:
    """ΔW at some entries, float64."""
    if isinstance(module, LowRank):
        return module.scale * product_entries(module.B, module.A, rows, columns)
    return np.asarray(module.dense()[rows, columns])


def _dtype(name: str) -> np.dtype[Any]:
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, name))
