"""What one pass over the numbers of an adapter measures: its sketches, and norm and effective rank of every module."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, inf
from typing import final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array
from loralens.core.lowrank import LARGEST, LowRank
from loralens.core.structured import Update
from loralens.errors import place
from loralens.fleet.sketching.module_keys import module_keys
from loralens.fleet.sketching.sketches import Sketch, to_codes
from loralens.fleet.sketching.stacking import StackedRows, stack
from loralens.fleet.sketching.start_sketch import NUMBERS, StartSketch
from loralens.fleet.sketching.tensor_sketch import COLUMNS, TensorSketch
from loralens.linalg.factor import Floats, gram
from loralens.linalg.measures import effective_rank, frobenius

# The squares of singular values come from Gram matrices, which err by ε‖B‖²‖A‖² = 2e-16 ‖B‖²‖A‖². Where that is not
# small against ‖ΔW‖² or against a σ², the singular values are computed from the factors. Norms of both ways then agree
# to 1e-11. So do nearly all effective ranks; with a σ near the limit below they agree to 1e-8.
CANCELLING = 1e-5  # ‖ΔW‖² over ‖B‖²‖A‖² below which it is not
LEAST_SQUARED_NORM = 1e-280  # ‖B‖² or ‖A‖² below which its squares may have lost digits by underflow
SMALL = 1e-3  # σ of a module over the largest one below which it is not
CONVERTED = 1 << 18  # numbers of pairs that are read together, and held in float64: 2 MiB


@final
@dataclass(frozen=True, slots=True)
class AdapterMeasures:
    """The sketches of an adapter, and its modules measured one by one.

    Attributes
    ----------
    names : mapping of str to str
        Key of a module → its name in the adapter, in order of keys.
    norms : mapping of str to float
        Key of a module → ‖ΔW‖_F, in order of keys.
    effective_ranks : mapping of str to float
        Key of a module → effective rank, 0 where ΔW = 0.
    """

    sketch: Sketch
    names: Mapping[str, str]
    norms: Mapping[str, float]
    effective_ranks: Mapping[str, float]


def measure_adapter(adapter: Adapter) -> AdapterMeasures:
    """Measure an adapter; every factor is read once and not kept.

    Raises
    ------
    FormatError
        A module holds NaN or Inf, or is too large for float64.
    """
    names = {key: name for name, key in module_keys(adapter).items()}
    names = {key: names[key] for key in sorted(names)}
    reader = _Reader({key: adapter.modules[name] for key, name in names.items()}, names)
    # NaN and numbers out of range are seen in the Gram matrices, and refused with a message.
    with np.errstate(over="ignore", invalid="ignore"):
        for keys in _together(reader.modules):
            reader.read(keys)
        reader.finish()
    codes, step = to_codes(reader.update.total())
    sketch = Sketch(codes, step, to_codes(reader.start.total())[0])
    spectra = {key: reader.checked(key) for key in names}
    return AdapterMeasures(
        sketch,
        names,
        {key: frobenius(s) for key, s in spectra.items()},
        {key: effective_rank(s) for key, s in spectra.items()},
    )


def _together(modules: Mapping[str, Update]) -> Iterator[list[str]]:
    """The keys of modules that are read at a time: small pairs of one shape and rank, or any other module alone."""
    waiting: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for key, module in modules.items():
        numbers = max(1, module.rank * sum(module.shape))
        most = min(COLUMNS // module.rank, CONVERTED // numbers) if isinstance(module, LowRank) and module.rank else 0
        if most < 2:
            yield [key]
            continue
        alike = waiting[module.rank, *module.shape]
        alike.append(key)
        if len(alike) == most:
            yield alike.copy()
            alike.clear()
    yield from filter(None, waiting.values())


@final
class _Reader:
    """Reads modules, and collects what is measured."""

    def __init__(self, modules: Mapping[str, Update], names: Mapping[str, str]) -> None:
        self.modules, self._names = modules, names
        self._pairs = {key: module for key, module in modules.items() if isinstance(module, LowRank)}
        self.update, self.start = TensorSketch(), StartSketch()
        self.spectra: dict[str, Floats] = {}
        # Keys of modules, and the Gram matrices of their scale·B and A.
        self._grams: list[tuple[Sequence[str], Floats, Floats]] = []

    def read(self, keys: Sequence[str]) -> None:
        """Read and measure modules that `_together` yields."""
        key = keys[0]
        if len(keys) > 1:
            self._read_small(keys)
        elif key in self._pairs:
            self._read_pair(key, self._pairs[key])
        else:
            self.spectra[key] = self._alone(key)
            with place(self._names[key]):
                self.update.add_dense(key, self.modules[key].dense())

    def _read_small(self, keys: Sequence[str]) -> None:
        B, A = self._stacked(keys)
        self._grams.append((keys, B.grams, A.grams))
        self.start.add(keys, A.rows)
        self.update.add_pairs(keys, (B.rows, A.rows), (B.peaks, A.peaks))

    def _read_pair(self, key: str, module: LowRank) -> None:
        B, A = module.B, module.A
        self._grams.append(([key], (module.scale * module.scale * gram(B))[None], gram(A.T)[None]))
        self.start.add([key], A[None, : -(-NUMBERS // max(1, A.shape[1]))])
        self.update.add_pair(key, B, A, module.scale)

    def finish(self) -> None:
        """Compute the singular values from the Gram matrices where these say enough, and from the factors elsewhere."""
        by_rank: dict[int, list[tuple[Sequence[str], Floats, Floats]]] = defaultdict(list)
        for keys, of_B, of_A in self._grams:
            by_rank[of_B.shape[1]].append((keys, of_B, of_A))
        for parts in by_rank.values():
            self._take_grams(
                [key for keys, _, _ in parts for key in keys],
                np.concatenate([of_B for _, of_B, _ in parts]),
                np.concatenate([of_A for _, _, of_A in parts]),
            )

    def _take_grams(self, keys: Sequence[str], of_B: Floats, of_A: Floats) -> None:
        """The singular values of modules of one rank."""
        squares_B, squares_A = (np.trace(grams, axis1=1, axis2=2) for grams in (of_B, of_A))
        energies = np.einsum("mij,mij->m", of_B, of_A)
        enough = (np.minimum(squares_B, squares_A) > LEAST_SQUARED_NORM) & (energies < inf)
        enough &= CANCELLING * squares_B * squares_A < energies
        for i in np.flatnonzero(~enough).tolist():
            self.spectra[keys[i]] = self._alone(keys[i])
        kept = np.flatnonzero(enough)
        if not kept.size:
            return
        values = _singular_values(of_B[kept], of_A[kept])
        self.spectra.update(zip([keys[i] for i in kept.tolist()], values, strict=True))
        # Where some of them are too small for the Gram matrices, they come from the factors.
        if values.shape[1]:
            small = [keys[i] for i in kept[values[:, -1] < SMALL * values[:, 0]].tolist()]
            for alike in _together({key: self.modules[key] for key in small}):
                self.spectra.update(zip(alike, self._from_factors(alike), strict=True))

    def _from_factors(self, keys: Sequence[str]) -> Iterable[Floats]:
        """The singular values of modules that `_together` yields."""
        if len(keys) == 1:
            return [self._alone(keys[0])]
        # One call for all of them, since each would take longer to call than to do.
        B, A = (np.linalg.qr(np.swapaxes(side.rows, 1, 2), mode="r") for side in self._stacked(keys))
        values: Floats = np.linalg.svd(B @ np.swapaxes(A, 1, 2), compute_uv=False)
        return values

    def checked(self, key: str) -> Floats:
        """The singular values of a module, after a check that its norm stays within float64."""
        values = self.spectra[key]
        # The module itself tells what is too large, its scale or its factors.
        if values.size and not values[0] <= LARGEST:
            return self._alone(key)
        return values

    def _alone(self, key: str) -> Floats:
        """The singular values of one module from its factors; NaN and numbers that are too large have a message."""
        with place(self._names[key]):
            return self.modules[key].singular_values()

    def _stacked(self, keys: Sequence[str]) -> tuple[StackedRows, StackedRows]:
        """The rows of both sides of small pairs of one shape and rank."""
        pairs = [self._pairs[key] for key in keys]
        B = stack([pair.B for pair in pairs], [pair.scale for pair in pairs])
        return B, stack([pair.A for pair in pairs], None)


def norm_of_update(norms: Mapping[str, float]) -> float:
    """‖ΔW‖_F of the whole update."""
    return hypot(*norms.values())


def _singular_values(of_B: Floats, of_A: Floats) -> Floats:
    """The singular values of products B·A, largest first, from BᵀB and A·Aᵀ; shape (modules, rank)."""
    squares, vectors = np.linalg.eigh(of_A)
    roots = vectors * np.sqrt(np.maximum(squares, 0))[:, None, :]
    values: Floats = np.sqrt(np.maximum(np.linalg.eigvalsh(_congruent(roots, of_B)), 0))[:, ::-1]
    return values


def _congruent(roots: Array, matrices: Array) -> Array:
    """RᵀMR of each pair."""
    return np.swapaxes(roots, 1, 2) @ matrices @ roots
