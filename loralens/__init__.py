"""Understand, shrink, combine, merge and trust LoRA adapters.

    >>> import loralens
    >>> adapter = loralens.load("my_adapter")
    >>> loralens.spectrum(adapter).to_frame()
    >>> loralens.compress(adapter, rank=8, output="smaller")

Every command of the command line is a function of the same name, with the same options; `loralens.verbs.VERBS` lists
them. `plot` draws what they return, `load` and `save` read and write adapters.

Functions, types and packages are imported when they are first used, so ``import loralens`` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loralens.exports import lazy_exports
from loralens.version import __version__ as __version__

# Without ``cli``: the library prints nothing, so the package that does is not part of its public names.
_PACKAGES = [
    "analysis",
    "arithmetic",
    "charts",
    "compression",
    "core",
    "fleet",
    "formats",
    "linalg",
    "merging",
    "reporting",
    "serving",
    "tables",
    "training",
    "verbs",
    "watching",
]

# For type checkers and editors, and the table of where public names are defined. At run time none of it is imported.
if TYPE_CHECKING:
    from loralens.analysis.amplification import Amplification as Amplification
    from loralens.analysis.behaviour import Behaviour as Behaviour
    from loralens.analysis.diagnosis import Diagnosis as Diagnosis
    from loralens.analysis.spectrum import Spectrum as Spectrum
    from loralens.analysis.two_adapters import Comparison as Comparison
    from loralens.analysis.two_adapters import Similarity as Similarity
    from loralens.arithmetic.combine import Combination as Combination
    from loralens.core.adapter import Adapter as Adapter
    from loralens.core.fingerprint import fingerprint as fingerprint
    from loralens.core.lowrank import LowRank as LowRank
    from loralens.core.ranks import Rule as Rule
    from loralens.core.stored import Moments as Moments
    from loralens.errors import DivergenceError as DivergenceError
    from loralens.errors import FormatError as FormatError
    from loralens.errors import LoraLensError as LoraLensError
    from loralens.errors import MismatchError as MismatchError
    from loralens.errors import MissingFileError as MissingFileError
    from loralens.errors import OptionError as OptionError
    from loralens.errors import ShapeError as ShapeError
    from loralens.formats import load as load
    from loralens.formats import save as save
    from loralens.formats.records.results import load_moments as load_moments
    from loralens.formats.records.results import save_moments as save_moments
    from loralens.verbs.combinations.combine import combine as combine
    from loralens.verbs.combinations.linear import drop as drop
    from loralens.verbs.combinations.linear import interpolate as interpolate
    from loralens.verbs.combinations.linear import negate as negate
    from loralens.verbs.combinations.linear import scale as scale
    from loralens.verbs.combinations.linear import subtract as subtract
    from loralens.verbs.comparisons.equal import equal as equal
    from loralens.verbs.comparisons.similarity import similarity as similarity
    from loralens.verbs.comparisons.trajectory import trajectory as trajectory
    from loralens.verbs.files.convert import convert as convert
    from loralens.verbs.fleets.fleet_verbs import Fleet as Fleet
    from loralens.verbs.merges.extract import extract as extract
    from loralens.verbs.merges.merge import merge as merge
    from loralens.verbs.merges.unmerge import unmerge as unmerge
    from loralens.verbs.merges.verify import verify as verify
    from loralens.verbs.pages.plot import plot as plot
    from loralens.verbs.pages.report import report as report
    from loralens.verbs.pages.schema import schema as schema
    from loralens.verbs.pages.survey import survey as survey
    from loralens.verbs.runs.behave import behave as behave
    from loralens.verbs.runs.evaluate import evaluate as evaluate
    from loralens.verbs.runs.train import train as train
    from loralens.verbs.served.explain import explain as explain
    from loralens.verbs.served.prove import prove as prove
    from loralens.verbs.served.served import served as served
    from loralens.verbs.served.sync import SyncCheck as SyncCheck
    from loralens.verbs.sizes.calibrate import calibrate as calibrate
    from loralens.verbs.sizes.compress import compress as compress
    from loralens.verbs.sizes.curve import curve as curve
    from loralens.verbs.spectra.amplify import amplify as amplify
    from loralens.verbs.spectra.doctor import doctor as doctor
    from loralens.verbs.spectra.inspect import inspect as inspect
    from loralens.verbs.spectra.intruders import intruders as intruders
    from loralens.verbs.spectra.spectrum import spectrum as spectrum
    from loralens.watching.view import live as live
else:
    _names, _get_public, _ = lazy_exports(__name__)
    __all__ = sorted([*_names, "__version__"])

    # Called for names that the module does not have yet.
    def __getattr__(name: str) -> Any:
        return import_module(f"loralens.{name}") if name in _PACKAGES else _get_public(name)

    def __dir__() -> list[str]:
        return sorted([*__all__, *_PACKAGES])
