"""What one pass over the numbers of an adapter measures: its sketches, and norm and effective rank of every module."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, inf
from typing import final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank, check_float64
from loralens.core.structured import Update
from loralens.errors import place
from loralens.fleet.sketching.module_keys import module_keys
from loralens.fleet.sketching.sketches import Sketch, to_codes
from loralens.fleet.sketching.start_sketch import NUMBERS, StartSketch
from loralens.fleet.sketching.tensor_sketch import COLUMNS, TensorSketch
from loralens.linalg.factor import Floats, gram
from loralens.linalg.measures import effective_rank, frobenius

# The squares of singular values come from Gram matrices, which err by ε‖B‖²‖A‖² = 2e-16 ‖B‖²‖A‖². Where that is not
# small against ‖ΔW‖² or against a σ², the singular values are computed from the factors. Both ways then agree to 1e-10.
CANCELLING = 1e-5  # ‖ΔW‖² over ‖B‖²‖A‖² below which it is not
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
    spectra = {key: check_float64(1.0, reader.spectra[key]) for key in names}
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
        self.update, self.start = TensorSketch(), StartSketch()
        self.spectra: dict[str, Floats] = {}
        # Keys of modules, and the Gram matrices of their scale·B and A.
        self._grams: list[tuple[Sequence[str], Floats, Floats]] = []

    def read(self, keys: Sequence[str]) -> None:
        """Read and measure modules that `_together` yields."""
        first = self.modules[keys[0]]
        if not isinstance(first, LowRank):
            with place(self._names[keys[0]]):
                self.spectra[keys[0]] = first.singular_values()
                self.update.add_dense(keys[0], first.dense())
        elif len(keys) > 1:
            self._read_small(keys, first)
        else:
            self._read_pair(keys[0], first)

    def _read_small(self, keys: Sequence[str], first: LowRank) -> None:
        (out, in_), rank = first.shape, first.rank
        B, A = np.empty((len(keys), rank, out)), np.empty((len(keys), rank, in_))
        for i, key in enumerate(keys):
            module = self.modules[key]
            B[i], A[i] = module.B.T, module.A
            B[i] *= module.scale
        of_B, of_A = (np.matmul(rows, np.swapaxes(rows, 1, 2)) for rows in (B, A))
        self._grams.append((keys, of_B, of_A))
        self.start.add(keys, A)
        self.update.add_pairs(keys, B, A)

    def _read_pair(self, key: str, module: LowRank) -> None:
        B, A = module.B, module.A
        self._grams.append(([key], (module.scale**2 * gram(B))[None], gram(A.T)[None]))
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
        lengths = np.trace(of_B, axis1=1, axis2=2) * np.trace(of_A, axis1=1, axis2=2)
        energies = np.einsum("mij,mij->m", of_B, of_A)
        # Exactly 0 only if a factor or the scale is.
        enough = (lengths == 0) | ((CANCELLING * lengths < energies) & (energies < inf))
        for i in np.flatnonzero(~enough).tolist():
            with place(self._names[keys[i]]):
                # Refuses NaN and Inf with a message.
                self.spectra[keys[i]] = self.modules[keys[i]].singular_values()
        kept = np.flatnonzero(enough)
        if kept.size:
            for i, values in zip(kept.tolist(), _singular_values(of_B[kept], of_A[kept]), strict=True):
                # Where some of them are too small for the Gram matrices, they come from the factors.
                exact = not values.size or values[-1] >= SMALL * values[0]
                self.spectra[keys[i]] = values if exact else self.modules[keys[i]].singular_values()


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
