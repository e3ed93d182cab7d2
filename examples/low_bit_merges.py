"""The ways of `low_bit_study.py` to merge an update into the codes of a weight.

Nearest codes, stochastic rounding and the sweep are the tool's own. Three more are in this file alone. Fresh scales and
the error feedback of GPTQ lose the update; coordinate descent leaves a larger error than the sweep.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import sqrt
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from low_bit_bases import Base

from loralens.core.adapter import Adapter
from loralens.core.few_bits.coded_weight import CodedWeight, Codes, GridRows
from loralens.core.lazy import Array
from loralens.formats.records.input_moments import InputMoments, load_input_moments
from loralens.linalg.draws import Draws
from loralens.linalg.exact import Singles
from loralens.linalg.factor import Floats
from loralens.merging.low_bit.apply import CodeRounding, added_numbers, prepare_codes
from loralens.merging.low_bit.measure import clipped_share
from loralens.merging.low_bit.record import codes_as_bytes
from loralens.merging.low_bit.stochastic import asked_moves, draw_codes
from loralens.merging.low_bit.sweep import DAMPING, SweepMoments, sweep_moments
from loralens.merging.plan import Slab, TensorPlan
from loralens.merging.undo.patch import PatchWriter

COLUMNS = 128  # of GPTQ, after which the later columns pay for the errors


@dataclass(frozen=True)
class Way:
    """One way to merge.

    Attributes
    ----------
    method : str
        ``nearest``, ``fresh``, ``gptq``, ``stochastic``, ``descent``, ``sweep``, or ``bf16`` for floats.
    seed : int
    give_back : bool
        Whether stochastic rounding gives clipped moves back to their row.
    moments : str
        The name of the file of moments.
    damping : float
        Of the moments of a sweep, as a share of their mean diagonal.
    """

    method: str
    seed: int = 0
    give_back: bool = False
    moments: str = "both"
    damping: float = DAMPING

    @property
    def name(self) -> str:
        """Of its file."""
        plain = asdict(Way(self.method))
        changed = [f"{key}={value}" for key, value in asdict(self).items() if value != plain[key] and key != "seed"]
        return ",".join([self.method, *changed, f"seed={self.seed}"])

    @property
    def needs_moments(self) -> bool:
        """Whether it reads second moments."""
        return self.method in ("gptq", "descent", "sweep")

    @property
    def exact(self) -> bool:
        """Whether it keeps the scales, so that codes can be counted and undone."""
        return self.method not in ("fresh", "bf16")


@dataclass
class Sums:
    """What became of an update, over all weights."""

    energy: float = 0.0
    along: float = 0.0
    lost: float = 0.0
    entries: int = 0
    changed: int = 0
    clipped: int = 0
    moves: float = 0.0
    undo: int = 0
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """As JSON: shares and relative sizes."""
        size = max(self.entries, 1)
        return {
            "gain": self.along / self.energy,
            "error": sqrt(self.lost / self.energy),
            "entries": self.entries,
            "mean_move": self.moves / size,
            "changed": self.changed / size,
            "clipped": self.clipped / size,
            "undo_bits": 8 * self.undo / size,
            "seconds": self.seconds,
        }


def merge(base: Base, adapter: Adapter, way: Way, moments: Path | None) -> Iterator[tuple[str, Singles | Sums]]:
    """Yield every module with the numbers of its merged weight, and at the end the `Sums` under an empty name."""
    sums = Sums()
    for name, update in adapter.items():
        weight = base.weights[f"{name}.weight"]
        W, D = weight.decode(0, weight.shape[0]), np.asarray(update.dense(), np.float32)
        grid = weight.grid(0, weight.shape[0])
        spent = process_time()
        codes = None
        if way.method == "bf16":
            new = _as_bf16(W + D)
        elif way.method == "fresh":
            again = base.again[f"{name}.weight"](W + D)
            codes, new = again.codes, again.values(again.codes)
        elif way.method == "gptq":
            codes = feedback_codes(grid, D, _raw(moments, name))
            new = W + added_numbers(grid, codes)
        elif way.give_back:
            asked = return_clipped(grid, asked_moves(grid, D), D)
            codes = draw_codes(grid, asked, Draws.named(way.seed, f"{name}.weight"), 0).codes
            new = W + added_numbers(grid, codes)
        elif way.method == "descent":
            drawn = _by_tool(replace(way, method="stochastic"), name, weight, update, moments, sums)
            codes = descended_codes(grid, drawn, D, _raw(moments, name))
            new = W + added_numbers(grid, codes)
        else:
            codes = _by_tool(way, name, weight, update, moments, sums)
            new = W + added_numbers(grid, codes)
        sums.seconds += process_time() - spent
        _measure(sums, way, grid, codes, D, new - W)
        yield name, new
    yield "", sums


def _by_tool(way: Way, name: str, weight: CodedWeight, update: Any, path: Path | None, sums: Sums) -> Codes:
    """The codes that the tool writes."""
    key, H = f"{name}.weight", None
    plan = TensorPlan(key, weight.floats(), weight.shape, (Slab(name, 0, weight.shape[0], ((1.0, update),)),))
    if way.method == "sweep":
        H = _prepared(path, name, way.damping)
    rounding = CodeRounding(way.method, way.seed, key, H)  # type: ignore[arg-type]
    blocks = list(prepare_codes(plan, weight, rounding).blocks())
    sums.clipped += sum(int(np.count_nonzero(block.drawn.clipped)) for block in blocks)
    return np.concatenate([block.drawn.codes for block in blocks])


def _measure(sums: Sums, way: Way, grid: GridRows, codes: Codes | None, D: Singles, moved: Singles) -> None:
    wide, lost = D.astype(np.float64), moved.astype(np.float64) - D
    sums.energy += float(np.vdot(wide, wide))
    sums.along += float(np.vdot(moved.astype(np.float64), wide))
    sums.lost += float(np.vdot(lost, lost))
    sums.entries += D.size
    # Limited, since a code cannot move further than its grid, and a tiny step would decide the mean.
    sums.moves += float(np.minimum(np.abs(asked_moves(grid, D)), 1).sum())
    if codes is not None:
        sums.changed += int(np.count_nonzero(codes != grid.codes))
    if codes is not None and way.exact:
        patch = PatchWriter(1)
        patch.block(codes_as_bytes(grid.codes, grid.lowest), codes_as_bytes(codes, grid.lowest))
        sums.undo += patch.finish().nbytes


def return_clipped(grid: GridRows, moves: Floats, D: Singles) -> Floats:
    """The moves with what is clipped given back to the other entries of the same row.

    Their moves grow by one factor, 1 + s, with s = Σ_clipped l·δ / Σ_others δ², where l is the part of δ that is
    clipped. The expected gain of every row is then 1 again.
    """
    clipped, squares = clipped_share(grid, moves), D.astype(np.float64) ** 2
    lost = (squares * clipped).sum(axis=1)
    room = np.where(clipped == 0, squares, 0.0).sum(axis=1)
    # Beyond this the few entries that are left would be changed more by the correction than by the update.
    s = np.minimum(np.divide(lost, room, out=np.zeros_like(lost), where=room > 0), 0.5)
    return np.where(clipped == 0, moves * (1 + s)[:, None], moves)


def feedback_codes(grid: GridRows, D: Singles, H: Array) -> Codes:
    """The codes of GPTQ on the kept grid: each column is rounded, and later columns pay for its error.

    The error that a column leaves is paid in proportion to the upper Cholesky factor of H⁻¹ (Frantar et al. 2023,
    arXiv 2210.17323).
    """
    factor = _inverse_factor(H)
    step = grid.step[:, grid.group_of_column].astype(np.float64)
    levels = np.arange(grid.lowest, grid.highest + 1.0) if grid.levels is None else grid.levels.astype(np.float64)
    between = (levels[1:] + levels[:-1]) / 2
    # Offsets cancel, so targets are counted from them.
    target = levels[grid.codes - grid.lowest] * step + D
    inverse = np.divide(1.0, step, out=np.zeros_like(step), where=step != 0)
    codes = grid.codes.copy()
    for first in range(0, len(H), COLUMNS):
        last = min(first + COLUMNS, len(H))
        errors = np.empty((len(D), last - first))
        for j in range(first, last):
            index = np.searchsorted(between, target[:, j] * inverse[:, j])
            codes[:, j] = np.where(step[:, j] == 0, codes[:, j], index + grid.lowest)
            left = (target[:, j] - levels[codes[:, j] - grid.lowest] * step[:, j]) / factor[j, j]
            target[:, j:last] -= np.outer(left, factor[j, j:last])
            errors[:, j - first] = left
        target[:, last:] -= errors @ factor[first:last, last:]
    return codes


def descended_codes(grid: GridRows, codes: Codes, D: Singles, H: Array) -> Codes:
    """One sweep of coordinate descent, with the gain held, from drawn codes of a grid of integers.

    Every code in turn moves to the level at which e (H + k u uᵀ) eᵀ of its row is smallest, all others being fixed.
    """
    mean = float(np.mean(np.diag(H)))
    damped, hold = H.astype(np.float64) + DAMPING * mean * np.eye(len(H)), 100 * mean
    step, codes = grid.step[:, grid.group_of_column].astype(np.float64), codes.copy()
    inverse = np.divide(1.0, step, out=np.zeros_like(step), where=step != 0)
    norm = np.linalg.norm(D, axis=1, keepdims=True)
    u = np.divide(D, norm, out=np.zeros(D.shape), where=norm > 0)
    error = (codes - grid.codes) * step - D
    slope, along = error @ damped, (error * u).sum(axis=1)
    for first in range(0, len(H), COLUMNS):
        last = min(first + COLUMNS, len(H))
        changes = np.zeros((len(D), last - first))
        for j in range(first, last):
            wanted = -(slope[:, j] + hold * along * u[:, j]) / (damped[j, j] + hold * u[:, j] ** 2)
            new = np.clip(np.rint(codes[:, j] + wanted * inverse[:, j]), grid.lowest, grid.highest)
            change = changes[:, j - first] = (new - codes[:, j]) * step[:, j]
            codes[:, j] = new
            slope[:, j:last] += np.outer(change, damped[j, j:last])
            along += change * u[:, j]
        slope[:, last:] += changes @ damped[first:last, last:]
    return codes


def _inverse_factor(H: Array) -> Array:
    """The upper triangular U with H⁻¹ = UᵀU, of the damped H."""
    damped = H.astype(np.float64) + DAMPING * np.mean(np.diag(H)) * np.eye(len(H))
    return np.linalg.cholesky(np.linalg.inv(damped)).T


@cache
def _opened(path: Path) -> InputMoments:
    return load_input_moments(path)


_LAST: dict[tuple[Path, str, float], SweepMoments] = {}


def _prepared(path: Path | None, name: str, damping: float) -> SweepMoments:
    """The moments of a module's input; those of the module before it are kept, as q, k and v share them."""
    assert path is not None
    key = path, _opened(path).inputs[name], damping
    if key not in _LAST:
        _LAST.clear()
        _LAST[key] = sweep_moments(_raw(path, name), damping=damping)
    return _LAST[key]


def _raw(path: Path | None, name: str) -> Array:
    assert path is not None
    return _opened(path).read(_opened(path).inputs[name])


def _as_bf16(numbers: Singles) -> Singles:
    import ml_dtypes

    return numbers.astype(ml_dtypes.bfloat16).astype(np.float32)
