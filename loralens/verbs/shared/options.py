"""Options that belong together and that several verbs have: each class is a parameter of a verb.

Users give the fields as keywords (`loralens.exports.takes_options`). The first line of a class begins with the heading
of its options in ``--help``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf, isfinite, nan
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from loralens.choices import FLOAT_TYPES
from loralens.core.adapter import Adapter
from loralens.core.messages import progress
from loralens.core.ranks import Rule, RuleName
from loralens.core.selection import within_blocks
from loralens.core.threads import processor_count
from loralens.errors import OptionError
from loralens.exports import Options
from loralens.formats.dialects.image import model_of
from loralens.formats.files.container import read_json
from loralens.tables.numbers import parse_size

if TYPE_CHECKING:
    from loralens.compression.directions import DType, Protection
    from loralens.compression.truncation_plan import TruncationPlan
    from loralens.core.stored import Moments


Blocks = int | str | Sequence[int | str]  # 3, "4-8", "IN04", or several of them


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Refuse a value of the option ``name`` that is none of ``allowed``; None means that it was not given.

    The command line refuses such values itself. In Python a literal type is only a promise.
    """
    words = list(allowed)
    if value is not None and value not in words:
        raise OptionError(f"{name} {value!r} is not possible", fix=f"choose one of {', '.join(words)}")


def check_finite(name: str, value: object) -> None:
    """Refuse a value of the option ``name`` that is not a finite number."""
    if not isinstance(value, Real) or not isfinite(value):
        raise OptionError(f"{name} {value!r} is not possible", fix="give a finite number")


def numpy_dtype(name: str | None) -> np.dtype[Any] | None:
    """The dtype that an option ``dtype`` names; None if it was not given, or is none of `FLOAT_TYPES`."""
    if name not in FLOAT_TYPES:
        return None
    # NumPy itself has no bfloat16.
    return np.dtype(ml_dtypes.bfloat16 if name == "bf16" else FLOAT_TYPES[name])


def check_at_least(name: str, value: float | None, least: int) -> None:
    """Refuse a value of the option ``name`` below ``least``; None means that it was not given."""
    # "not ≥" and no "<", so that NaN is refused too.
    if value is not None and not value >= least:
        raise OptionError(f"{name} {value!r} is not possible", fix=f"give {least} or more")


def check_counts(**counts: int | None) -> None:
    """Refuse options, by their names, that are counts below 1; None means that one was not given."""
    for name, count in counts.items():
        check_at_least(name, count, 1)


def weights_by_module(adapter: Adapter, preset: str | None, blocks: Any) -> dict[str, float] | None:
    """The weight of each module; None if neither option is given.

    Raises
    ------
    OptionError
        The adapter is of no known image model, or the model has no such preset or block.
    """
    if preset is None and blocks is None:
        return None
    model = model_of(adapter)
    if model is None:
        raise OptionError(
            "weights of blocks are for adapters of SD 1.5, SD 2, SDXL and FLUX.1, and this one has other modules",
            fix="choose modules by their names: --modules GLOB",
        )
    # Imported here, since most adapters are scaled and cut without it.
    from loralens.core.selection import weights_of_modules

    layers = {name: model.find(name, module.shape)[0] for name, module in adapter.items()}
    return weights_of_modules(model, layers, preset=preset, blocks=blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleChoice(Options):
    """Modules: which of them a verb works on.

    Parameters
    ----------
    modules : str or sequence of str
        Only modules whose name or kind matches this glob pattern, or has it as whole parts.
    block : int, str or sequence of them
        Only modules in these blocks: ``3``, ``4-8``, or ``IN04`` of an image model; with ``modules``, what both choose.
    """

    modules: str | Sequence[str] = ()
    block: Blocks = ()

    @property
    def globs(self) -> tuple[str, ...]:
        """Both as globs of `loralens.core.selection`.

        Raises
        ------
        OptionError
            A text is not a block.
        """
        globs = (self.modules,) if isinstance(self.modules, str) else tuple(self.modules)
        return within_blocks(globs, [self.block] if isinstance(self.block, int | str) else self.block)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWeights(Options):
    """Weights of blocks: those of SD, SDXL and FLUX.1, as block weight tools write them.

    Parameters
    ----------
    preset : str, optional
        Preset weights for the blocks of SD, SDXL or FLUX: ``OUTALL``, ``MIDD`` …

        docs/commands/scale.md lists them.
    block_weights : str, mapping or sequence of float, optional
        Weights of blocks: ``IN04=0,MID=1``, or all in their order, as block weight tools write them.

        Also ``{"IN04": 0, "MID": 1}``. They come after the preset, and blocks that neither names keep the weight 1.
    """

    preset: str | None = None
    block_weights: str | Mapping[str, float] | Sequence[float] | None = None

    def __bool__(self) -> bool:
        """Whether one of them is given."""
        return self.preset is not None or self.block_weights is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading(Options):
    """Reading adapters: what a file does not say itself.

    Parameters
    ----------
    format : str, optional
        The dialect of the file, if its content fits several dialects.
    alpha : float, optional
        The α to use if the file states none. The scale is then α/r.
    scale : float, optional
        The scale of a file that does not state it.
    once : bool
        Add the update of the out_proj of an nn.MultiheadAttention once; PEFT adds it twice.
    """

    format: str | None = None
    alpha: float | None = None
    scale: float | None = None
    once: bool = False

    @property
    def stated(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None and value is not False}


# Option → rule. ``bytes`` is the rule's name in recipes too, where it may not depend on how an option is spelt.
RULES: Mapping[str, RuleName] = {
    "rank": "rank",
    "energy": "energy",
    "error": "error",
    "sv_ratio": "sv-ratio",
    "sv_cumulative": "sv-cumulative",
    "parameters": "parameters",
    "size": "bytes",
}


def option_names(*options: str) -> str:
    """Parameters as options of the command line: ``--sv-ratio, --size``."""
    return ", ".join("--" + name.replace("_", "-") for name in options)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRules(Options):
    """Ranks: the rules that choose them, of which one is given. ``rank`` beside another one is its ceiling.

    Parameters
    ----------
    rank : int, optional
        Keep the R leading directions of every module; with another rule, at most R of those that it keeps.
    energy : float, optional
        Keep the fewest directions of a module that hold this share of its energy Σσ², such as 0.99.
    error : float, optional
        Keep the fewest directions of a module whose relative error ‖ΔW−ΔW'‖/‖ΔW‖ is at most this, such as 0.05.
    sv_ratio : float, optional
        Keep the directions of a module whose singular value is above σ₁/X.
    sv_cumulative : float, optional
        Keep the fewest directions of a module that hold this share of the sum of its singular values Σσ.
    parameters : float, optional
        Keep as many directions as one budget for the whole adapter allows: a share of its parameters (0.5), or their
        number.
    size : int or str, optional
        The same budget in bytes of the file, such as 20MB or 512KiB.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    sv_ratio: float | None = None
    sv_cumulative: float | None = None
    parameters: float | None = None
    size: int | str | None = None

    @property
    def stated(self) -> dict[str, Any]:
        """The rules that were given, with their values."""
        return {name: value for name in RULES if (value := getattr(self, name)) is not None}

    def optional(self) -> Rule | None:
        """The rule that was given, or None.

        Raises
        ------
        OptionError
            Several rules were given, or the value is not possible for the rule.
        """
        stated = self.stated
        if not stated:
            return None
        if len(others := [name for name in stated if name != "rank"]) > 1:
            fix = "give one of them; only --rank may stand beside another rule, as its ceiling"
            raise OptionError(f"{option_names(*others)} exclude each other", fix=fix)
        return Rule.of({RULES[name]: self._number(name, value) for name, value in stated.items()})

    @staticmethod
    def _number(name: str, value: Any) -> float:
        """The value of a rule; a size may be a text with a unit."""
        # Only sizes have units.
        if name == "size" and isinstance(value, str):
            value = parse_size(value)
        try:
            # True is an int for Python, but rank=True is a mistake.
            amount = float(value) if isinstance(value, Real) and not isinstance(value, bool) else nan
        except OverflowError:  # of an integer beyond all floats
            amount = inf
        if not isfinite(amount):
            raise OptionError(f"{option_names(name)} {value!r:.100} is not a finite number", fix="give a finite number")
        # rank=8.0 is taken as 8. Rule refuses a rank with a fraction, so that has to stay a float here.
        return int(amount) if name == "size" or (name == "rank" and amount.is_integer()) else amount

    def required(self) -> Rule:
        """The rule that was given, for a verb that needs one.

        Raises
        ------
        OptionError
            No rule or several rules were given, or the value is not possible for the rule.
        """
        rule = self.optional()
        if rule is None:
            raise OptionError(
                "no option says how to choose the ranks",
                fix=f"give one of {option_names(*RULES)}, such as --energy 0.99; loralens convert --dtype keeps all "
                "ranks",
            )
        return rule


@dataclass(frozen=True, slots=True, kw_only=True)
class SvdCaching(Options):
    """Computing: where decompositions of the weights of a base are kept between runs.

    Parameters
    ----------
    cache : path, optional
        The folder in which decompositions of W are kept between runs. [default: in the user's cache folder]
    cache_limit : str
        If the folder is larger than this, its oldest entries are deleted.
    no_cache : bool
        Neither use nor keep decompositions of earlier runs.
    """

    cache: str | PathLike[str] | None = None
    # U and V of a whole SVD take 8 bytes for every number of a square weight: 20 GB hold 2.5 billion numbers.
    cache_limit: str = "20GB"
    no_cache: bool = False


def read_protection(weights: str | PathLike[str] | Mapping[str, float]) -> "Protection":
    """The error that a budget minimises: ``relative``, ``absolute``, or weights by glob, which a JSON file may hold."""
    # The two words win over files of that name; such a file is reached as ./absolute.
    if isinstance(weights, Mapping) or weights in ("absolute", "relative"):
        return weights  # type: ignore[return-value]
    file = Path(weights)
    if not file.exists():
        raise OptionError(f"weights {weights}: no such file", fix="give absolute, relative, or a JSON file")
    return read_json(file, fix='write {"q_proj": 2.0}')


def read_moments(activations: "str | PathLike[str] | Moments | None") -> "Moments | None":
    """The moments of the option ``activations``, which is a file or the moments themselves; None if not given."""
    if activations is None:
        return None
    from loralens.core.stored import Moments
    from loralens.formats.records.results import load_moments

    return activations if isinstance(activations, Moments) else load_moments(activations)


def read_directions(
    adapter: Adapter, *, modules: Sequence[str], dtype: "DType | None", moments: "Moments | None" = None
) -> "TruncationPlan":
    """The directions of the chosen modules, from which any ranks can be made, in one pass over the factors."""
    from loralens.compression.truncation_plan import TruncationPlan

    with progress("reading", len(adapter)) as step:
        return TruncationPlan.of(
            adapter, modules=modules, dtype=dtype, moments=moments, bases=True, threads=processor_count(), step=step
        )


def rank_notes(rule: Mapping[str, float], ranks: Mapping[str, int]) -> list[str]:
    """A note if modules have fewer directions than the rule ``rank`` asks for; otherwise no note."""
    # Beside another rule it is a ceiling, which need not be reached.
    rank = rule.get("rank") if len(rule) == 1 else None
    # Truncation never pads: a rank above the true one would only add zeros to the file.
    narrow = [each for each in ranks.values() if rank and each < rank]
    if not narrow:
        return []
    most = f"{max(narrow)}" if len(set(narrow)) == 1 else f"at most {max(narrow)}"
    return [f"{len(narrow)} of {len(ranks)} modules have {most} directions, not {rank:g}: all of them are kept"]
