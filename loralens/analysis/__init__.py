"""Measurements of adapters: spectra, comparisons, effects on a base, diagnosis. Nothing here changes an adapter."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.analysis.base.amplification import Amplification as Amplification
    from loralens.analysis.base.amplification import measure_amplification as measure_amplification
    from loralens.analysis.base.intruders import Intruders as Intruders
    from loralens.analysis.base.intruders import find_intruders as find_intruders
    from loralens.analysis.base.intruders import remove_intruders as remove_intruders
    from loralens.analysis.behaviour import Behaviour as Behaviour
    from loralens.analysis.behaviour import measure_behaviour as measure_behaviour
    from loralens.analysis.checks.diagnosis import Diagnosis as Diagnosis
    from loralens.analysis.compare.interference import Interference as Interference
    from loralens.analysis.compare.interference import interference as interference
    from loralens.analysis.compare.pairwise import Pairwise as Pairwise
    from loralens.analysis.compare.pairwise import pairwise as pairwise
    from loralens.analysis.compare.similarity import Comparison as Comparison
    from loralens.analysis.compare.similarity import Similarity as Similarity
    from loralens.analysis.compare.similarity import compare_subspaces as compare_subspaces
    from loralens.analysis.doctor import diagnose as diagnose
    from loralens.analysis.inspection import Inspection as Inspection
    from loralens.analysis.inspection import inspect_adapter as inspect_adapter
    from loralens.analysis.outliers import Outlier as Outlier
    from loralens.analysis.spectrum import Spectrum as Spectrum
    from loralens.analysis.spectrum import measure_spectrum as measure_spectrum
    from loralens.analysis.trajectory import Trajectory as Trajectory
    from loralens.analysis.trajectory import measure_trajectory as measure_trajectory
else:
    __all__, __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "base.amplification": ["Amplification", "measure_amplification"],
            "base.intruders": ["Intruders", "find_intruders", "remove_intruders"],
            "behaviour": ["Behaviour", "measure_behaviour"],
            "checks.diagnosis": ["Diagnosis"],
            "compare.interference": ["Interference", "interference"],
            "compare.pairwise": ["Pairwise", "pairwise"],
            "compare.similarity": ["Comparison", "Similarity", "compare_subspaces"],
            "doctor": ["diagnose"],
            "inspection": ["Inspection", "inspect_adapter"],
            "outliers": ["Outlier"],
            "spectrum": ["Spectrum", "measure_spectrum"],
            "trajectory": ["Trajectory", "measure_trajectory"],
        },
    )
