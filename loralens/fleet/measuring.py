"""Measuring files, in this process or in any other: paths in, plain data out."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from json import dumps
from math import fsum, hypot, inf
from pathlib import Path
from typing import Any, Literal, final

import numpy as np

from loralens.analysis.inspection import count_non_finite
from loralens.core.adapter import Adapter
from loralens.core.fingerprint import BLOCK, fingerprint
from loralens.core.lazy import LazyArray, row_blocks
from loralens.core.lowrank import LARGEST, LowRank
from loralens.core.names import normal_form
from loralens.core.structured import Update
from loralens.errors import FormatError, LoraLensError, OptionError, place
from loralens.fleet.catalogue import NON_FINITE, ZERO_UPDATE
from loralens.fleet.sketches import Sketch, module_keys, to_codes
from loralens.fleet.tensor_sketch import COLUMNS, NUMBERS, StartSketch, TensorSketch, stack
from loralens.formats.files.container import read_together
from loralens.formats.records.collection import Status, examine_file
from loralens.linalg.factor import Floats, gram
from loralens.linalg.measures import effective_rank, frobenius

# The squares of singular values come from Gram matrices, which err by ε‖B‖²‖A‖² = 2e-16 ‖B‖²‖A‖². Where that is not
# small against ‖ΔW‖² or against a σ², the singular values are computed from the factors. Norms of both ways then agree
# to 1e-11. So do nearly all effective ranks; with a σ near the limit below they agree to 1e-8.
CANCELLING = 1e-5  # ‖ΔW‖² over ‖B‖²‖A‖² below which it is not
LEAST_SQUARED_NORM = 1e-280  # ‖B‖² or ‖A‖² below which its squares may have lost digits by underflow
SMALL = 1e-3  # σ of a module over the largest one below which it is not
CONVERTED = 1 << 18  # numbers of pairs that are read together, and held in float64: 2 MiB
IN_MEMORY = 16 << 20  # bytes up to which an adapter is read once and loaded, since it is measured and hashed
DIGITS = 5  # digits of a norm in the catalogue: its thousands of numbers are as short as that
LEVELS: tuple[Literal["error", "warning", "note"], ...] = ("error", "warning", "note")


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
        self.update, self.start = TensorSketch(), StartSketch()
        self.spectra: dict[str, Floats] = {}
        # Keys of modules, and the Gram matrices of their scale·B and A.
        self._grams: list[tuple[Sequence[str], Floats, Floats]] = []

    def read(self, keys: Sequence[str]) -> None:
        """Read and measure modules that `_together` yields."""
        key = keys[0]
        module = self.modules[key]
        if len(keys) > 1:
            pairs = [pair for key in keys if isinstance(pair := self.modules[key], LowRank)]
            left = stack([pair.B for pair in pairs], [pair.scale for pair in pairs])
            right = stack([pair.A for pair in pairs], None)
            self._grams.append((keys, left.grams, right.grams))
            self.start.add(keys, right.rows)
            self.update.add_pairs(keys, (left.rows, right.rows), (left.peaks, right.peaks))
        elif isinstance(module, LowRank):
            B, A = module.B, module.A
            self._grams.append(([key], (module.scale * module.scale * gram(B))[None], gram(A.T)[None]))
            self.start.add([key], A[None, : -(-NUMBERS // max(1, A.shape[1]))])
            self.update.add_pair(key, B, A, module.scale)
        else:
            self.spectra[key] = self._alone(key)
            with place(self._names[key]):
                self.update.add_dense(key, module.dense())

    def finish(self) -> None:
        """Compute the singular values from the Gram matrices where these say enough, and from the factors elsewhere."""
        # Key, and the two Gram matrices.
        by_rank: dict[int, list[tuple[str, Floats, Floats]]] = defaultdict(list)
        for keys, of_B, of_A in self._grams:
            by_rank[of_B.shape[1]] += zip(keys, of_B, of_A, strict=True)
        for parts in by_rank.values():
            of_B, of_A = np.stack([left for _, left, _ in parts]), np.stack([right for _, _, right in parts])
            squares_B, squares_A = (np.trace(grams, axis1=1, axis2=2) for grams in (of_B, of_A))
            energies = np.einsum("mij,mij->m", of_B, of_A)
            enough = (np.minimum(squares_B, squares_A) > LEAST_SQUARED_NORM) & (energies < inf)
            enough &= CANCELLING * squares_B * squares_A < energies
            values = np.zeros(of_B.shape[:2])
            values[enough] = _singular_values(of_B[enough], of_A[enough])
            enough &= values[:, -1] >= SMALL * values[:, 0] if of_B.shape[1] else True
            for (key, _, _), known, own in zip(parts, enough.tolist(), values, strict=True):
                self.spectra[key] = own if known else self._alone(key)

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


def norm_of_update(norms: Mapping[str, float]) -> float:
    """‖ΔW‖_F of the whole update."""
    return hypot(*norms.values())


def _singular_values(of_B: Floats, of_A: Floats) -> Floats:
    """The singular values of products B·A, largest first, from BᵀB and A·Aᵀ; shape (modules, rank)."""
    squares, vectors = np.linalg.eigh(of_A)
    roots = vectors * np.sqrt(np.maximum(squares, 0))[:, None, :]
    values: Floats = np.sqrt(np.maximum(np.linalg.eigvalsh(np.swapaxes(roots, 1, 2) @ of_B @ roots), 0))[:, ::-1]
    return values


# Files


@final
@dataclass(frozen=True, slots=True)
class MeasuredFile:
    """What was found out about one file.

    Attributes
    ----------
    path : str
        As it was given.
    status : str
        ``adapter``, ``unreadable`` or ``other``: a file that holds tensors and no LoRA pairs.
    reason, fix : str
        Why it is not an adapter, and what the user can do.
    modules : str
        The signature, as the catalogue stores it.
    columns : mapping of str to value
        The other columns of the catalogue, of an adapter.
    """

    path: str
    status: Status
    reason: str = ""
    fix: str = ""
    modules: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


def measure_files(
    root: str, paths: Sequence[str], once: bool
) -> list[MeasuredFile]:  # plain arguments, since they go to other processes and machines
    """Measure files by their paths relative to ``root``; a file that cannot be read has a reason."""
    if not Path(root).is_dir():
        raise OptionError(
            f"{root}: this folder is not there on the machine of a worker", fix="share it with all machines"
        )
    return [_measure_file(root, path, once=once) for path in paths]


def _measure_file(root: str, path: str, *, once: bool) -> MeasuredFile:
    try:
        entry = examine_file(Path(root) / path, once=once)
        if entry.adapter is None:
            return MeasuredFile(path, entry.status, entry.reason, entry.fix)
        return _measure(path, entry.adapter)
    except LoraLensError as error:
        # The numbers may be damaged although the header can be read.
        reason, fix = ": ".join((*error.where, error.what)), error.fix
    # Its header was read, so another program changes or removes it, or the disk fails.
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        fix = "index again when nothing else writes to it; if nothing does, check the disk"
    # A damaged file may make NumPy raise any of these, and one file must not end the index of thousands.
    except (MemoryError, ArithmeticError, ValueError, RecursionError) as error:
        reason, fix = f"cannot be measured: {str(error) or type(error).__name__}", "download or save the file again"
    return MeasuredFile(path, "unreadable", reason, fix)


def _measure(path: str, adapter: Adapter) -> MeasuredFile:
    if not len(adapter):
        raise FormatError("holds no modules", fix="save it again from the code that trained it")
    size = sum(module.nbytes for module in adapter.modules.values())
    if size > IN_MEMORY:
        measures, digest = measure_adapter(adapter), fingerprint(adapter)
    else:
        loaded = _loaded(adapter)
        measures, digest = measure_adapter(loaded), fingerprint(loaded)
    modules = dumps(_signature(adapter, measures), ensure_ascii=True)
    ranks = sorted({module.rank for module in adapter.modules.values()})
    effective = [rank for rank in measures.effective_ranks.values() if rank]
    columns = {
        "step": measures.sketch.step,
        "format": adapter.format,
        "base": adapter.base_model or None,
        "signature": blake2b(modules.encode(), digest_size=8).hexdigest(),
        "modules": len(adapter),
        "zero_modules": sum(norm == 0 for norm in measures.norms.values()),
        "extras": len(adapter.extra),
        "rank": ranks[-1],
        "ranks": dumps(ranks),
        "scales": dumps(sorted({module.scale for module in adapter.modules.values()})),
        "parameters": adapter.parameters,
        "frobenius": norm_of_update(measures.norms),
        "effective_rank": fsum(effective) / len(effective) if effective else 0.0,
        "norms": f"[{','.join(f'{norm:.{DIGITS}g}' for norm in measures.norms.values())}]",
        "fingerprint": digest,
        "findings": dumps(_findings(adapter, measures)),
        "sketch": measures.sketch.codes.tobytes() + measures.sketch.start.tobytes(),
    }
    return MeasuredFile(path, "adapter", modules=modules, columns=columns)


def _loaded(adapter: Adapter) -> Adapter:
    """The same adapter in memory; a file is read in as few calls as possible, since there are thousands of them."""
    pairs = [module for module in adapter.modules.values() if isinstance(module, LowRank)]
    factors = iter(read_together([factor for pair in pairs for factor in pair.factors]))
    return adapter.map(
        lambda module: module.holding(next(factors), next(factors)) if isinstance(module, LowRank) else module.load()
    )


def _signature(adapter: Adapter, measures: AdapterMeasures) -> list[tuple[str, str, int, int]]:
    return [(key, normal_form(name), *adapter.modules[name].shape) for key, name in measures.names.items()]


def _findings(adapter: Adapter, measures: AdapterMeasures) -> list[str]:
    """The codes of findings that need no more than one pass: those of the reader, modules that are 0, and NaN in heads.

    The doctor has more checks, which take several times as long as everything else here.
    """
    by_level = sorted(adapter.findings, key=lambda finding: LEVELS.index(finding.level))
    zero = any(norm == 0 and adapter.modules[measures.names[key]].scale for key, norm in measures.norms.items())
    # A module with NaN has no norm and no sketch, so its file cannot be measured. A head with NaN has no part in them.
    spoilt = any(_holds_non_finite(extra.tensor) for extra in adapter.extra.values())
    codes = [NON_FINITE] * spoilt + [finding.code for finding in by_level] + [ZERO_UPDATE] * zero
    return list(dict.fromkeys(codes))


def _holds_non_finite(tensor: LazyArray) -> bool:
    """Whether a tensor holds NaN or Inf; a head may be as large as the embedding, so blocks of rows are read."""
    blocks = (rows for _, rows in row_blocks(tensor, BLOCK)) if tensor.size > BLOCK else iter([tensor.read()])
    return any(map(count_non_finite, blocks))
