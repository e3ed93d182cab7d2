"""Measures how the spectra of a training run change from snapshot to snapshot."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from loralens.analysis.base.amplification import measure_amplification
from loralens.analysis.compare.similarity import compare_subspaces
from loralens.analysis.spectrum import measure_spectrum
from loralens.core.adapter import Adapter
from loralens.formats import load
from loralens.verbs.inputs.bases import ModelPath, base_weights


class LiveSpectra:
    """Compares the adapter of every snapshot with that of the snapshot before, and with the weights of the base.

    Parameters
    ----------
    model : path
        The path of the base.
    """

    def __init__(self, model: ModelPath) -> None:
        self.model = model
        self._last: tuple[int, Adapter] | None = None

    def remember(self, step: int, path: Path) -> None:
        """Set the snapshot with which the next one is compared; used when a run is resumed."""
        self._last = step, load(path)

    def measure(self, step: int, adapter: Adapter) -> dict[str, Any]:
        """The medians over modules of ‖ΔW‖, its effective rank, φ with the last snapshot, and the amplification."""
        # Medians, since a few modules with far larger updates would dominate a mean.
        spectra = measure_spectrum(adapter).values()
        medians: dict[str, Any] = {
            "norm": median(spectrum.frobenius for spectrum in spectra),
            "effective_rank": median(spectrum.effective_rank for spectrum in spectra),
        }
        if self._last:
            before, last = self._last
            pairs = dict(compare_subspaces(last, adapter).items()).values()
            for side in ("in", "out"):
                medians[f"phi_{side}"] = median(pair.spans[side] for pair in pairs)
            medians["phi_to"] = before
        weights = base_weights(self.model, adapter.modules)
        # Without the comparison with the leading directions of W, which would take an SVD of every W.
        amplified = measure_amplification(adapter, weights.modules, top=False).values()
        # The last row is that of the full rank; a module whose update is zero has no rows.
        amplifications = [module.rows[-1].amplification for module in amplified if module.rows]
        medians["amplification"] = median(amplifications) if amplifications else None
        self._last = step, adapter
        return medians


def describe_spectra(step: int, medians: Mapping[str, Any]) -> str:
    """The medians of a snapshot as one line of text."""
    norm, rank = medians["norm"], medians["effective_rank"]
    text = f"step {step}: medians over modules: ‖ΔW‖ {norm:.3g}, effective rank {rank:.2f}"
    if "phi_to" in medians:
        text += f", φ to step {medians['phi_to']} {medians['phi_in']:.2f} in, {medians['phi_out']:.2f} out"
    return text if medians["amplification"] is None else f"{text}, amplification {medians['amplification']:.3g}"
