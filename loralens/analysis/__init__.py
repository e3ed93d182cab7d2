"""Measurements of adapters: spectra, comparisons, effects on a base, diagnosis. Nothing here changes an adapter."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.analysis.base.amplification import measure_amplification
    from loralens.analysis.base.intruders import Intruders, find_intruders, remove_intruders
    from loralens.analysis.behaviour import measure_behaviour
    from loralens.analysis.compare.interference import Interference, interference
    from loralens.analysis.compare.pairwise import Pairwise, pairwise
    from loralens.analysis.compare.similarity import compare_subspaces
    from loralens.analysis.doctor import examine_all, run_checks
    from loralens.analysis.inspection import Inspection, inspect_adapter
    from loralens.analysis.outliers import Outlier, find_outliers
    from loralens.analysis.spectrum import measure_spectrum
    from loralens.analysis.trajectory import Trajectory, measure_trajectory

# The results that verbs return, such as `Spectrum` and `Comparison`, are names of `loralens` itself and not repeated.
__all__ = [
    "Inspection",
    "Interference",
    "Intruders",
    "Outlier",
    "Pairwise",
    "Trajectory",
    "compare_subspaces",
    "examine_all",
    "find_intruders",
    "find_outliers",
    "inspect_adapter",
    "interference",
    "measure_amplification",
    "measure_behaviour",
    "measure_spectrum",
    "measure_trajectory",
    "pairwise",
    "remove_intruders",
    "run_checks",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Inspection": "inspection",
        "Interference": "compare.interference",
        "Intruders": "base.intruders",
        "Outlier": "outliers",
        "Pairwise": "compare.pairwise",
        "Trajectory": "trajectory",
        "compare_subspaces": "compare.similarity",
        "examine_all": "doctor",
        "find_intruders": "base.intruders",
        "find_outliers": "outliers",
        "inspect_adapter": "inspection",
        "interference": "compare.interference",
        "measure_amplification": "base.amplification",
        "measure_behaviour": "behaviour",
        "measure_spectrum": "spectrum",
        "measure_trajectory": "trajectory",
        "pairwise": "compare.pairwise",
        "remove_intruders": "base.intruders",
        "run_checks": "doctor",
    },
)
