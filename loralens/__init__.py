"""Understand, shrink, combine, merge and trust LoRA adapters.

    >>> import loralens
    >>> adapter = loralens.load("my_adapter")
    >>> adapter["model.layers.0.self_attn.q_proj"].svd().s

Every command of the command line is a function of the same name, with the same options. The functions, the types and
the packages are imported when they are first used, so ``import loralens`` costs next to nothing.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from loralens.verbs import VERBS
from loralens.version import __version__

if TYPE_CHECKING:
    from loralens.analysis.base.amplification import Amplification
    from loralens.analysis.behaviour import Behaviour
    from loralens.analysis.checks.diagnosis import Diagnosis
    from loralens.analysis.compare.similarity import Comparison, Similarity
    from loralens.analysis.spectrum import Spectrum
    from loralens.arithmetic.combine import Combination
    from loralens.core.adapter import Adapter
    from loralens.core.fingerprint import fingerprint
    from loralens.core.lowrank import LowRank
    from loralens.core.moments import Moments
    from loralens.core.ranks import Rule
    from loralens.errors import FormatError, LoraLensError, MismatchError, OptionError, ShapeError
    from loralens.formats import load, save
    from loralens.formats.records.moments import load_moments, save_moments

_PACKAGES = (
    "analysis",
    "arithmetic",
    "charts",
    "compression",
    "core",
    "formats",
    "linalg",
    "merging",
    "reporting",
    "tables",
    "training",
    "verbs",
)

_HOMES = {
    "Adapter": "loralens.core.adapter",
    "Amplification": "loralens.analysis.base.amplification",
    "Behaviour": "loralens.analysis.behaviour",
    "Combination": "loralens.arithmetic.combine",
    "Comparison": "loralens.analysis.compare.similarity",
    "Diagnosis": "loralens.analysis.checks.diagnosis",
    "FormatError": "loralens.errors",
    "LoraLensError": "loralens.errors",
    "LowRank": "loralens.core.lowrank",
    "MismatchError": "loralens.errors",
    "Moments": "loralens.core.moments",
    "OptionError": "loralens.errors",
    "Rule": "loralens.core.ranks",
    "ShapeError": "loralens.errors",
    "Similarity": "loralens.analysis.compare.similarity",
    "Spectrum": "loralens.analysis.spectrum",
    "fingerprint": "loralens.core.fingerprint",
    "load": "loralens.formats",
    "load_moments": "loralens.formats.records.moments",
    "save": "loralens.formats",
    "save_moments": "loralens.formats.records.moments",
}

# Until every verb has its file: the functions of the rooms under the names that the verbs will have.
_UNTIL_VERBS = {
    "allocate": ("loralens.compression.bits", "allocate"),
    "amplification": ("loralens.analysis.base.amplification", "measure_amplification"),
    "behaviour": ("loralens.analysis.behaviour", "measure_behaviour"),
    "calibrate": ("loralens.compression.calibration", "measure_moments"),
    "diagnose": ("loralens.analysis.doctor", "diagnose"),
    "interference": ("loralens.analysis.compare.interference", "interference"),
    "intruders": ("loralens.analysis.base.intruders", "find_intruders"),
    "mitigated": ("loralens.analysis.base.intruders", "remove_intruders"),
    "pairwise": ("loralens.analysis.compare.pairwise", "pairwise"),
    "quantise": ("loralens.compression.quantise", "quantise"),
    "similarity": ("loralens.analysis.compare.similarity", "compare_subspaces"),
    "spectrum": ("loralens.analysis.spectrum", "measure_spectrum"),
    "trajectory": ("loralens.analysis.trajectory", "measure_trajectory"),
    "truncate": ("loralens.compression.truncate", "truncate"),
}

__all__ = [
    "Adapter",
    "Amplification",
    "Behaviour",
    "Combination",
    "Comparison",
    "Diagnosis",
    "FormatError",
    "LoraLensError",
    "LowRank",
    "MismatchError",
    "Moments",
    "OptionError",
    "Rule",
    "ShapeError",
    "Similarity",
    "Spectrum",
    "__version__",
    "fingerprint",
    "load",
    "load_moments",
    "save",
    "save_moments",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"loralens.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in VERBS and find_spec(f"loralens.verbs.{name}"):
        return getattr(import_module(f"loralens.verbs.{name}"), name)
    if name == "plot":
        return import_module("loralens.verbs.plot").plot
    if name in _UNTIL_VERBS:
        module, function = _UNTIL_VERBS[name]
        return getattr(import_module(module), function)
    raise AttributeError(f"module 'loralens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
