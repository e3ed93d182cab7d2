"""Two adapters of which every smaller one is known: dense, in float64, by weights alone and on real inputs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

import loralens
from loralens.core.fingerprint import fingerprint
from loralens.core.lowrank import LowRank, Scaling
from loralens.core.stored import Moment, Moments
from loralens.formats.records.results import save_moments
from loralens.reporting.document import Report
from tests import reference

RANK, INPUTS = 5, 60
SHAPES = {"q_proj": (24, 20), "v_proj": (16, 20)}
NAMES = [f"model.layers.{block}.self_attn.{kind}" for block in range(3) for kind in SHAPES]


@dataclass(frozen=True)
class Chosen:
    """An adapter on disk, its ΔW, and the inputs x that its modules see, a row each; None where errors are those of ΔW.

    Its smaller ones are dense truncations: of ΔW, or of ΔW L with L Lᵀ = E[x xᵀ].
    """

    path: Path
    dense: Mapping[str, np.ndarray]
    inputs: Mapping[str, np.ndarray] | None
    sizes: dict[tuple[int, ...], int] = field(default_factory=dict)

    @cached_property
    def smaller(self) -> dict[tuple[str, int], np.ndarray]:
        """(module, rank) → ΔW'."""
        return {(name, rank): self._cut(name, rank) for name in NAMES for rank in range(RANK + 1)}

    def _cut(self, name: str, rank: int) -> np.ndarray:
        D = self.dense[name]
        if self.inputs is None:
            U, s, Vh = np.linalg.svd(D, full_matrices=False)
            return (U[:, :rank] * s[:rank]) @ Vh[:rank]
        X = self.inputs[name]
        return reference.whitened_truncation(D, X.T @ X / len(X), rank)[0]

    def error(self, ranks: Mapping[str, int], *, plain: bool = False) -> float:
        """‖ΔW − ΔW'‖/‖ΔW‖ over all modules; on the inputs where there are some, unless ``plain``."""
        lost, whole = 0.0, 0.0
        for name, D in self.dense.items():
            X = None if self.inputs is None or plain else self.inputs[name]
            E = D - self.smaller[name, ranks[name]]
            lost += float(np.sum((E if X is None else E @ X.T / math.sqrt(len(X))) ** 2))
            whole += float(np.sum((D if X is None else D @ X.T / math.sqrt(len(X))) ** 2))
        return math.sqrt(lost / whole)

    def energy(self, name: str, rank: int) -> float:
        """‖ΔW'‖², or E‖ΔW'x‖², of a smaller one."""
        D = self.smaller[name, rank]
        return float(np.sum((D if self.inputs is None else D @ self.inputs[name].T / math.sqrt(INPUTS)) ** 2))

    def bytes(self, ranks: Mapping[str, int], folder: Path) -> int:
        """Of the file of weights that has these ranks, written."""
        key = tuple(ranks[name] for name in NAMES)
        if key not in self.sizes:
            target = folder / f"{self.path.name}-{'-'.join(map(str, key))}"
            loralens.save(_adapter({name: self.smaller[name, max(ranks[name], 1)] for name in NAMES}, ranks), target)
            self.sizes[key] = (target / "adapter_model.safetensors").stat().st_size
        return self.sizes[key]


def everywhere(rank: int) -> dict[str, int]:
    """One rank for all modules."""
    return dict.fromkeys(NAMES, rank)


def _adapter(dense: Mapping[str, np.ndarray], ranks: Mapping[str, int]) -> loralens.Adapter:
    modules = {}
    for name, D in dense.items():
        rank = ranks[name]
        U, s, Vh = np.linalg.svd(D / 2, full_matrices=False)
        B, A = U[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, None] * Vh[:rank]
        scaling = Scaling("alpha/r", 2 * rank, rank)
        modules[name] = LowRank(B.astype(np.float32), A.astype(np.float32), 2.0, scaling=scaling)
    return loralens.Adapter(modules=modules, base_model="tiny/base")


def chosen(folder: Path) -> tuple[Report, list[Chosen]]:
    """The report of two adapters, the second of them with activations."""
    rng = np.random.default_rng(8)
    paths, all_dense = [], []
    for label, fall in (("weights", 0.3), ("inputs", 0.5)):
        drawn = {}
        for i, name in enumerate(NAMES):
            out, in_ = SHAPES[name.rsplit(".", 1)[1]]
            U, V = (np.linalg.qr(rng.standard_normal((n, RANK)))[0] for n in (out, in_))
            drawn[name] = (1 + i) * (U * fall ** np.arange(RANK)) @ V.T
        adapter = _adapter(drawn, everywhere(RANK))
        paths.append(folder / label)
        loralens.save(adapter, paths[-1])
        all_dense.append({n: 2.0 * m.B.astype(np.float64) @ m.A.astype(np.float64) for n, m in adapter.items()})
    inputs = {}
    for name in NAMES:
        width = SHAPES[name.rsplit(".", 1)[1]][1]
        inputs[name] = rng.standard_normal((INPUTS, width)) * 0.7 ** rng.permutation(width)
    read = loralens.load(paths[1])
    moments = {}
    for name, module in read.items():
        Z = inputs[name] @ module.A.astype(np.float64).T
        moments[name] = Moment(Z.T @ Z / INPUTS, INPUTS)
    save_moments(Moments(modules=moments, fingerprint=fingerprint(read)), folder / "x.safetensors")
    given = [str(folder / "x.safetensors")]
    report = loralens.report(*paths, activations=given).document
    return report, [Chosen(paths[0], all_dense[0], None), Chosen(paths[1], all_dense[1], inputs)]
