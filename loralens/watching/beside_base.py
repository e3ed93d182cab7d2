"""The measures that compare an update with its weight in a base on disk, which only some of the looks take."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from typing import final

import numpy as np

from loralens.analysis.base.amplification import Amplification, measure_amplification
from loralens.choices import Side
from loralens.core.adapter import Adapter
from loralens.core.lazy import Array
from loralens.core.threads import processor_count
from loralens.core.weights import Weights, weights_of
from loralens.errors import place
from loralens.merging.tied_names import find_ties
from loralens.watching.measures import BaseLook, ModuleLook


@final
@dataclass(slots=True)
class BaseOnDisk:
    """A base model on disk, which is read at every ``every``-th look and at the last."""

    path: Path
    every: int
    _weights: Weights | None = None
    _count: int = field(default=0)

    def add(
        self, adapter: Adapter, looks: Mapping[str, ModuleLook], *, final: bool, first: bool
    ) -> dict[str, ModuleLook]:
        """The looks, with the measures that need the base if it is time for them.

        Raises
        ------
        FormatError, MismatchError
            The base cannot be read, or does not have the weights that the adapter changes.
        """
        if first or self._weights is None:
            self._weights = self._find(adapter)
        self._count += 1
        measured = {name: look for name, look in looks.items() if look.spectrum.s.size}
        if not (final or self._count % self.every == 0) or not measured:
            return dict(looks)
        chosen = adapter.without(adapter.modules.keys() - measured.keys())
        amplified = measure_amplification(chosen, self._weights.modules, threads=processor_count())
        return {
            name: replace(look, base=_base_look(amplified[name])) if name in amplified else look
            for name, look in looks.items()
        }

    def _find(self, adapter: Adapter) -> Weights:
        from loralens.formats.models.checkpoint import model_config, open_checkpoint, stores_conv1d

        with place(self.path):
            stored = open_checkpoint(self.path).tensors
            tied = find_ties(stored, model_config(self.path) or {}).with_copies(stored)
            return weights_of(adapter.modules, tied, conv1d=stores_conv1d(self.path))


def _base_look(measured: Amplification) -> BaseLook:
    all_directions = measured.at_rank(measured.s.size)
    shares: dict[Side, float] = {"in": nan, "out": nan}
    chance = dict(shares)
    if measured.top is not None and measured.s.size:
        directions = len(measured.top.s)
        maps: tuple[tuple[Side, Array, int], ...] = (
            ("out", measured.top.out, measured.shape[0]),
            ("in", measured.top.in_, measured.shape[1]),
        )
        for side, phi, n in maps:
            shares[side] = _energy_share(measured.s, phi)
            chance[side] = min(directions / n, 1.0)
    return BaseLook(all_directions.amplification, all_directions.excess, all_directions.z, shares, chance)


def _energy_share(s: Array, phi: Array) -> float:
    """The share of the energy of ΔW in the leading directions of W, from φ(i, j): Σσᵢ²‖Pᵀuᵢ‖²/Σσᵢ²."""
    k, t = phi.shape
    # φ(i, t)·min(i, t) is the sum of ‖Pᵀu‖² over the first i directions.
    sums = phi[:, -1] * np.minimum(np.arange(1, k + 1), t)
    inside = np.diff(sums, prepend=0.0)
    energy = np.square(s[:k] / s[0])
    return float(np.clip(energy @ inside / energy.sum(), 0.0, 1.0))
