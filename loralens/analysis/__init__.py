"""Measurements of adapters: spectra, comparisons, effects on a base, diagnosis. Nothing here changes an adapter."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.analysis.amplification import measure_amplification as measure_amplification
    from loralens.analysis.behaviour import measure_behaviour as measure_behaviour
    from loralens.analysis.doctor import examine_all as examine_all
    from loralens.analysis.doctor import run_checks as run_checks
    from loralens.analysis.every_pair import Pairwise as Pairwise
    from loralens.analysis.every_pair import pairwise as pairwise
    from loralens.analysis.inspection import Inspection as Inspection
    from loralens.analysis.inspection import inspect_adapter as inspect_adapter
    from loralens.analysis.interacting_pairs import Interference as Interference
    from loralens.analysis.interacting_pairs import interference as interference
    from loralens.analysis.intruders import Intruders as Intruders
    from loralens.analysis.intruders import find_intruders as find_intruders
    from loralens.analysis.intruders import remove_intruders as remove_intruders
    from loralens.analysis.spectrum import Outlier as Outlier
    from loralens.analysis.spectrum import find_outliers as find_outliers
    from loralens.analysis.spectrum import measure_spectrum as measure_spectrum
    from loralens.analysis.trajectory import Trajectory as Trajectory
    from loralens.analysis.trajectory import measure_trajectory as measure_trajectory
    from loralens.analysis.two_adapters import compare_subspaces as compare_subspaces
# The results that verbs return, such as `Spectrum` and `Comparison`, are names of `loralens` itself and not repeated.
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
