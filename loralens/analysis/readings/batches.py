"""Many modules read in one pass: those with small factors of equal shape together, in few calls of NumPy."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loralens.analysis.readings.module import Factor, ModuleReading, digest, read_module
from loralens.analysis.spectrum import Spectrum
from loralens.core.lazy import Array
from loralens.core.lowrank import LARGEST, LowRank
from loralens.core.structured import Update
from loralens.core.threads import Step
from loralens.errors import FormatError
from loralens.linalg.factor import Floats
from loralens.linalg.product import many_singular_values

# Numbers of both factors of a module, above which their arithmetic takes longer than the calls that a batch saves.
SMALL = 1 << 13
NUMBERS = 1 << 16  # numbers of a batch, so that its copies in float64 take 512 KiB each

Loaded = tuple[str, LowRank, Array, Array]  # name, module, B and A


def read_modules(modules: Mapping[str, Update], *, step: Step | None = None) -> dict[str, ModuleReading]:
    """Measure modules without keeping their factors; ``step`` is called with how many are done since its last call."""
    readings: dict[str, ModuleReading] = {}
    waiting: dict[tuple[Any, ...], list[Loaded]] = {}

    def finish(batch: Sequence[Loaded]) -> None:
        readings.update(_read_together(batch))
        if step and batch:
            step(len(batch))

    for name, module in modules.items():
        loaded = _load_small(name, module)
        if loaded is None:
            readings[name] = read_module(module)
            if step:
                step(1)
            continue
        B, A = loaded[2:]
        batch = waiting.setdefault((B.shape, A.shape, B.dtype, A.dtype), [])
        batch.append(loaded)
        if len(batch) * (B.size + A.size) >= NUMBERS:
            finish(batch)
            batch.clear()
    for batch in waiting.values():
        finish(batch)
    return {name: readings[name] for name in modules}


def _load_small(name: str, module: Update) -> Loaded | None:
    """The factors of a module, if they are so small that they are measured with others."""
    if not isinstance(module, LowRank) or not module.rank * min(module.shape) > 0:
        return None
    if module.rank * sum(module.shape) > SMALL:
        return None
    try:
        B, A = module.B, module.A
    except FormatError:
        return None
    # In another order of memory a product may have other last bits.
    return (name, module, B, A) if B.flags.c_contiguous and A.flags.c_contiguous else None


def _read_together(batch: Sequence[Loaded]) -> dict[str, ModuleReading]:
    """The readings of modules whose factors have equal shapes and dtypes, with the bits of `read_module`."""
    if not batch:
        return {}
    B, A = np.stack([B for _, _, B, _ in batch]), np.stack([A for _, _, _, A in batch])
    s, settled = many_singular_values(B, A)
    scales = np.array([abs(module.scale) for _, module, _, _ in batch])
    with np.errstate(over="ignore", invalid="ignore"):
        s = scales[:, None] * s
    # What is too large for float64 is an error that `read_module` raises and explains.
    settled &= s[:, 0] <= LARGEST
    factors_B, factors_A = _statistics(B.transpose(0, 2, 1), settled), _statistics(A, settled)
    readings = {}
    for i, (name, module, _, _) in enumerate(batch):
        if settled[i]:
            spectrum = Spectrum(s[i], module.shape, module.rank)
            readings[name] = ModuleReading(module, spectrum, factors_B[i], factors_A[i])
        else:
            readings[name] = read_module(module)
    return readings


def _statistics(X: Array, settled: Array) -> list[Factor]:
    """The statistics of the rows of every X (r, n), as `loralens.analysis.readings.module` measures them alone.

    Only those that are ``settled`` are right: these have no row of zeros, and only finite numbers.
    """
    digests = [digest(x) for x in X]
    X = X.astype(np.float64)
    X[~settled] = 1.0
    largest = np.abs(X).max(axis=(1, 2))
    zeros = 1 - np.count_nonzero(X, axis=(1, 2)) / X[0].size
    X = X / largest[:, None, None]
    squares = X * X
    lengths, across = np.sqrt(np.add.reduce(squares, axis=2)), np.sqrt(np.add.reduce(squares, axis=1))
    # In C order, as the rows of one factor are.
    unit = np.ascontiguousarray(X) / lengths[:, :, None]
    cosines = np.abs(unit @ unit.transpose(0, 2, 1))
    diagonal = np.arange(X.shape[1])
    cosines[:, diagonal, diagonal] = 0.0
    dead = X.shape[2] - np.count_nonzero(X.any(axis=1), axis=1)
    columns = zip(
        list(lengths * largest[:, None]),
        cosines.max(axis=(1, 2), initial=0.0).tolist(),
        zeros.tolist(),
        _unevenness(across).tolist(),
        dead.tolist(),
        largest.tolist(),
        digests,
        strict=True,
    )
    return [Factor(*values) for values in columns]


def _unevenness(values: Floats) -> Floats:
    """The standard deviation of every row, relative to its mean."""
    mean = np.add.reduce(values, axis=1) / values.shape[1]
    deviations = values - mean[:, None]
    return np.asarray(np.sqrt(np.add.reduce(deviations * deviations, axis=1) / values.shape[1]) / mean, np.float64)
