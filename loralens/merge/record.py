"""What was merged into one stored tensor, as it happened: fidelity of every module, hashes, the undo patch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from math import sqrt
from typing import Any, Literal, final

import numpy as np

from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.linalg.product import product_singular_values
from loralens.linalg.rounding import sampled_rounding, survivors
from loralens.merge.apply import Block, Gain, TensorMerge
from loralens.merge.patch import Blob, PatchWriter
from loralens.merge.plan import Slab, TensorPlan

SAMPLE = 1 << 15  # entries of a module that a prediction looks at

Against = Literal["subtracted", "merged", "nothing"]


@final
@dataclass(frozen=True, slots=True)
class Fidelity:
    """How much of an update arrived, measured on what was written; dimensionless.

    Attributes
    ----------
    module : str
    gain : float
        ⟨W' − W, D⟩/‖D‖²; 1 where D = 0. With DoRA D stands for g·(W + D) − W.
    error : float
        ‖W' − W − D‖_F/‖D‖_F.
    unmoved : float
        Share of the entries that kept their value.
    predicted_gain, predicted_error : float
        The same before anything is written, from 32,768 entries of W and D (`loralens.linalg.rounding`).
    directions, surviving : int
        Singular values of D, and how many of them stand above the edge of what rounding left as noise; 0 and 0 for
        what is no pair.
    norm : float
        ‖D‖_F.
    entries : int
        Of W.
    """

    module: str
    gain: float
    error: float
    unmoved: float
    predicted_gain: float
    predicted_error: float
    directions: int
    surviving: int
    norm: float
    entries: int


@final
@dataclass(frozen=True, slots=True)
class TensorRecord:
    """What happened to one stored tensor.

    Attributes
    ----------
    plan : TensorPlan
    dtype : dtype
        Of the merged tensor.
    fidelity : tuple of Fidelity
        One for each slab.
    base_hash, merged_hash : str
        SHA-256 of the bytes of the tensor before and after; empty where not asked for, or there was no tensor.
    patch : Blob or None
        What gives the base back, where asked for.
    patch_bytes : int
        Its size, also when the patch itself has been put away.
    against : str
        What the patch is relative to: W' − D rounded (``subtracted``), W' itself (``merged``), or ``nothing``.
    gains : dict of int to Gain
        DoRA's, by the first row of their slab.
    """

    plan: TensorPlan
    dtype: np.dtype[Any]
    fidelity: tuple[Fidelity, ...]
    base_hash: str
    merged_hash: str
    patch: Blob | None
    patch_bytes: int
    against: Against
    gains: dict[int, Gain]


@final
@dataclass(slots=True)
class Watch:
    """Looks at the blocks of one tensor as they are merged.

    Parameters
    ----------
    merge : TensorMerge
    hashes, fidelity, undo : bool
        What to keep; each costs time.
    """

    merge: TensorMerge
    hashes: bool = True
    fidelity: bool = True
    undo: bool = True
    _sums: "dict[int, _Sums]" = field(default_factory=dict)

    def blocks(self) -> Iterator[Array]:
        """The merged rows in order; when they are exhausted, `record` is complete."""
        plan = self.merge.plan
        self._before, self._after = sha256(), sha256()
        self._patch = PatchWriter(plan.base.dtype.itemsize) if self.undo and plan.base else None
        for block in self.merge.blocks():
            if self.hashes:
                _feed(self._after, block.merged)
            if self.fidelity and block.slab:
                self._sums.setdefault(block.slab.start, _Sums(block.slab, self.merge)).take(block)
            if plan.replacement is None:
                self._see(block.W, block)
            yield block.merged
        if plan.replacement is not None and plan.base is not None and (self.hashes or self.undo):
            self._see(plan.base.read().reshape(1, -1), None)

    def _see(self, W: Array, block: Block | None) -> None:
        """Hash and patch some rows of the base."""
        if self.hashes:
            _feed(self._before, W)
        if self._patch is None:
            return
        if block is None:
            self._patch.block(W, np.zeros_like(W))
        elif against(self.merge.plan) == "subtracted":
            self._patch.block(W, block.subtracted(W.dtype))
        else:
            self._patch.block(W, block.merged.astype(W.dtype))

    def record(self) -> TensorRecord:
        """What was seen."""
        plan = self.merge.plan
        patch = self._patch.finish() if self._patch else None
        return TensorRecord(
            plan,
            self.merge.dtype,
            tuple(sums.fidelity() for _, sums in sorted(self._sums.items())),
            self._before.hexdigest() if self.hashes and plan.base is not None else "",
            self._after.hexdigest() if self.hashes else "",
            patch,
            patch.nbytes if patch else 0,
            against(plan),
            self.merge.gains,
        )

    _before: Any = None
    _after: Any = None
    _patch: PatchWriter | None = None


def against(plan: TensorPlan) -> Against:
    """What the patch of a tensor is relative to: D is taken away where it can be made again from factors alone."""
    if plan.replacement is not None:
        return "nothing"
    terms = [one for slab in plan.slabs for _, one in slab.terms]
    return "subtracted" if terms and all(isinstance(one, LowRank) for one in terms) else "merged"


def _feed(digest: Any, rows: Array) -> None:
    digest.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)


class _Sums:
    """Inner products over the blocks of a slab: float32 within a block, float64 between them; good to about 1e-5."""

    def __init__(self, slab: Slab, merge: TensorMerge) -> None:
        self.slab, self.dtype = slab, merge.dtype
        self.size = (slab.stop - slab.start) * merge.plan.matrix[1]
        self.D_D = self.moved = self.lost = 0.0
        self.still = self.count = 0
        self.rng = np.random.default_rng(0)
        self.sample: list[tuple[Array, Array]] = []

    def take(self, block: Block) -> None:
        """The next rows."""
        assert block.D is not None
        W, merged = (x.astype(np.float32) for x in (block.W, block.merged))
        with np.errstate(invalid="ignore", over="ignore"):
            moved = np.subtract(merged, W, out=merged)
            D = block.D if block.gain is None else (W + block.D) * block.gain - W
            self.D_D += _dot(D, D)
            self.moved += _dot(moved, D)
            self.still += moved.size - int(np.count_nonzero(moved))
            self.count += moved.size
            moved -= D
            self.lost += _dot(moved, moved)
        here = self.rng.integers(D.size, size=-(-SAMPLE * D.size // self.size))
        self.sample.append((W.ravel()[here], np.ascontiguousarray(D).ravel()[here]))

    def fidelity(self) -> Fidelity:
        """What the rows say together."""
        norm = sqrt(self.D_D) if self.D_D > 0 else 0.0
        w, d = (np.concatenate(parts) for parts in zip(*self.sample, strict=True))
        told = sampled_rounding(w, d, size=self.count, norm=norm, dtype=self.dtype)
        s = self._singular_values()
        noise = sqrt(self.lost / max(self.count, 1))
        shape = self.slab.terms[0][1].shape
        return Fidelity(
            self.slab.module,
            self.moved / self.D_D if norm else 1.0,
            sqrt(self.lost / self.D_D) if norm else 0.0,
            self.still / max(self.count, 1),
            told.gain,
            told.error,
            int(np.count_nonzero(s)),
            survivors(s, noise, shape),
            norm,
            self.count,
        )

    def _singular_values(self) -> Array:
        """Of D: of the pairs beside each other."""
        terms = self.slab.terms
        if not all(isinstance(one, LowRank) for _, one in terms):
            return np.zeros(0)
        B = np.hstack([strength * one.scale * one.B.astype(np.float64) for strength, one in terms])
        A = np.vstack([one.A.astype(np.float64) for _, one in terms])
        return product_singular_values(B, A)


def _dot(x: Array, y: Array) -> float:
    return float(np.dot(np.ascontiguousarray(x).ravel(), np.ascontiguousarray(y).ravel()))
