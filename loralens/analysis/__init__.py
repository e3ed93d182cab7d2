"""Measurements of adapters: spectra, comparisons, effects on a base, diagnosis. Nothing here changes an adapter."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.analysis.base.amplification import Amplification, measure_amplification
    from loralens.analysis.base.intruders import Intruders, find_intruders, remove_intruders
    from loralens.analysis.behaviour import Behaviour, measure_behaviour
    from loralens.analysis.checks.diagnosis import Diagnosis
    from loralens.analysis.compare.interference import Interference, interference
    from loralens.analysis.compare.pairwise import Pairwise, pairwise
    from loralens.analysis.compare.similarity import Comparison, Similarity, compare_subspaces
    from loralens.analysis.doctor import diagnose
    from loralens.analysis.inspection import Inspection, inspect_adapter
    from loralens.analysis.outliers import Outlier
    from loralens.analysis.spectrum import Spectrum, measure_spectrum
    from loralens.analysis.trajectory import Trajectory, measure_trajectory

__all__ = [
    "Amplification",
    "Behaviour",
    "Comparison",
    "Diagnosis",
    "Inspection",
    "Interference",
    "Intruders",
    "Outlier",
    "Pairwise",
    "Similarity",
    "Spectrum",
    "Trajectory",
    "compare_subspaces",
    "diagnose",
    "find_intruders",
    "inspect_adapter",
    "interference",
    "measure_amplification",
    "measure_behaviour",
    "measure_spectrum",
    "measure_trajectory",
    "pairwise",
    "remove_intruders",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Amplification": "base.amplification",
        "Behaviour": "behaviour",
        "Comparison": "compare.similarity",
        "Diagnosis": "checks.diagnosis",
        "Inspection": "inspection",
        "Interference": "compare.interference",
        "Intruders": "base.intruders",
        "Outlier": "outliers",
        "Pairwise": "compare.pairwise",
        "Similarity": "compare.similarity",
        "Spectrum": "spectrum",
        "Trajectory": "trajectory",
        "compare_subspaces": "compare.similarity",
        "diagnose": "doctor",
        "find_intruders": "base.intruders",
        "inspect_adapter": "inspection",
        "interference": "compare.interference",
        "measure_amplification": "base.amplification",
        "measure_behaviour": "behaviour",
        "measure_spectrum": "spectrum",
        "measure_trajectory": "trajectory",
        "pairwise": "compare.pairwise",
        "remove_intruders": "base.intruders",
    },
)
