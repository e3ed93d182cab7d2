"""Understand, shrink, combine, merge and trust LoRA adapters.

    >>> import loralens
    >>> adapter = loralens.load("my_adapter")
    >>> loralens.spectrum(adapter).to_frame()
    >>> loralens.compress(adapter, rank=8, output="smaller")

Every command of the command line is a function of the same name, with the same options; `plot` draws what they return,
`load` and `save` read and write adapters:

    inspect      Show what is in an adapter file, and how it was understood.
    convert      Write an adapter in another dialect, with its names and scales.
    equal        Test whether two adapters are the same update.
    spectrum     Show the singular values of ΔW, and the ranks and norms that follow from them.
    similarity   Compare the directions of adapters: φ(i, j), cosines and angles, with their chance levels.
    trajectory   Follow one run through its checkpoints.
    survey       List the adapters under a folder, and name duplicates.
    amplify      Show how strongly ΔW amplifies W, compared with random and top directions.
    intruders    Find singular vectors of W + ΔW that W does not have.
    doctor       Examine adapters for faults, and say how to mend them.
    compress     Make an adapter smaller, and measure the error of that.
    curve        Show the file size and the error at every rank, before anything is written.
    calibrate    Measure the second moments of real inputs, for compress --activations.
    combine      Combine several adapters into one: exact sums, and the methods of the literature.
    negate       Change the sign of an adapter, everywhere or in some modules.
    scale        Change the strength of an adapter, everywhere or in some modules.
    subtract     Subtract one adapter from another, exactly.
    interpolate  Write a point on the line between two adapters, exactly.
    drop         Leave out modules of an adapter.
    merge        Merge adapters into a base model, with a certificate and an undo patch.
    unmerge      Restore the base from a merged model, bit for bit.
    verify       Test whether a merged model holds an adapter, and how faithfully.
    extract      Make an adapter from two models: of a full fine-tune, or of a merge.
    report       Write one page about adapters, to read and to send.
    train        Train LoRA layers on texts: adapters to study, and to use.
    evaluate     Measure a model on held-out texts, with each of several adapters.
    behave       Show what adapters do to a model's outputs on real inputs.

Functions, types and packages are imported when they are first used, so ``import loralens`` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loralens.exports import lazy_exports, with_options_written_out
from loralens.verbs import MODULES, VERBS
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
    "tables",
    "training",
    "verbs",
    "watching",
]

# For type checkers and editors: what they would not find in the table below. At run time none of it is imported.
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
    from loralens.errors import OptionError as OptionError
    from loralens.errors import ShapeError as ShapeError
    from loralens.formats import load as load
    from loralens.formats import save as save
    from loralens.formats.records.results import load_moments as load_moments
    from loralens.formats.records.results import save_moments as save_moments
    from loralens.verbs.combinations.combine import combine as combine
    from loralens.verbs.combinations.drop import drop as drop
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
    from loralens.verbs.pages.survey import survey as survey
    from loralens.verbs.runs.behave import behave as behave
    from loralens.verbs.runs.evaluate import evaluate as evaluate
    from loralens.verbs.runs.train import train as train
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
    _names, _get_type, _ = lazy_exports(
        __name__,
        {
            "analysis.amplification": ["Amplification"],
            "analysis.behaviour": ["Behaviour"],
            "analysis.diagnosis": ["Diagnosis"],
            "analysis.two_adapters": ["Comparison", "Similarity"],
            "analysis.spectrum": ["Spectrum"],
            "arithmetic.combine": ["Combination"],
            "core.adapter": ["Adapter"],
            "core.fingerprint": ["fingerprint"],
            "core.lowrank": ["LowRank"],
            "core.ranks": ["Rule"],
            "core.stored": ["Moments"],
            "errors": ["DivergenceError", "FormatError", "LoraLensError", "MismatchError", "OptionError", "ShapeError"],
            "verbs.fleets.fleet_verbs": ["Fleet"],
            "formats": ["load", "save"],
            "formats.records.results": ["load_moments", "save_moments"],
            "watching.view": ["live"],
        },
    )
    __all__ = sorted([*_names, *VERBS, "plot", "__version__"])

    # Called for names that the module does not have yet.
    def __getattr__(name: str) -> Any:
        if name in _PACKAGES:
            return import_module(f"loralens.{name}")
        if name not in MODULES:
            return _get_type(name)
        function = with_options_written_out(getattr(import_module(f"loralens.verbs.{MODULES[name]}"), name))
        # Stored, so that the signature is built once and later uses of the name do not come here.
        globals()[name] = function
        return function

    def __dir__() -> list[str]:
        return sorted([*__all__, *_PACKAGES])
