"""Options that choose ranks: the rules, the error that a budget minimises, and the moments of real inputs."""

from collections.abc import Mapping
from math import inf, isfinite, nan
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TypedDict, Unpack

from loralens.compression.protection import Protection
from loralens.core.moments import Moments
from loralens.core.ranks import Rule, RuleName
from loralens.errors import OptionError
from loralens.formats.files.container import read_json
from loralens.formats.records.moments import load_moments
from loralens.tables.numbers import parse_size
from loralens.verbs.inputs.adapters import Reading


class RankRules(TypedDict, total=False):
    """The rules by which ranks are chosen: options of every verb that truncates, of which one is given.

    Attributes
    ----------
    rank : int, optional
        Keep this many leading directions of every module.
    energy : float, optional
        Keep the fewest directions of a module that hold this share of its energy Σσ², in (0, 1].
    error : float, optional
        Keep the fewest directions of a module whose relative error ‖ΔW−ΔW'‖/‖ΔW‖ is at most this, in [0, 1).
    sv_ratio : float, optional
        Keep the directions of a module whose singular value is above σ₁/sv_ratio.
    parameters : float, optional
        One budget for the whole adapter: a share of its parameters, up to 1, or their number.
    size : int or str, optional
        The same budget in bytes of the file: ``20_000_000``, ``"20MB"``, ``"512KiB"``.
    """

    rank: int | None
    energy: float | None
    error: float | None
    sv_ratio: float | None
    parameters: float | None
    size: int | str | None


class RulesAndReading(RankRules, Reading):
    """The options of a verb that reads an adapter and chooses ranks."""


RULES: Mapping[str, RuleName] = {  # option → rule
    "rank": "rank",
    "energy": "energy",
    "error": "error",
    "sv_ratio": "sv-ratio",
    "parameters": "parameters",
    "size": "bytes",
}


def optional_rule(**options: Unpack[RankRules]) -> Rule | None:
    """The one rule that was given, or None.

    Raises
    ------
    OptionError
        Several; or a value that makes no sense.
    """
    stated = {name: value for name in RULES if (value := options.get(name)) is not None}
    if not stated:
        return None
    if len(stated) > 1:
        raise OptionError(f"{option_names(*stated)} exclude each other", fix="give one of them")
    ((name, value),) = stated.items()
    if name == "size" and isinstance(value, str):
        value = parse_size(value)
    try:
        amount = float(value) if isinstance(value, Real) and not isinstance(value, bool) else nan
    except OverflowError:  # of an integer beyond all floats
        amount = inf
    if not isfinite(amount):
        raise OptionError(f"{option_names(name)} {value!r:.100} is no finite number", fix="give a finite number")
    # rank=8.0 is 8; a rank that is no whole number is refused by Rule.
    return Rule(RULES[name], int(amount) if name == "size" or (name == "rank" and amount.is_integer()) else amount)


def rank_rule(**options: Unpack[RankRules]) -> Rule:
    """The one rule that was given.

    Raises
    ------
    OptionError
        None, or several; or a value that makes no sense.
    """
    rule = optional_rule(**options)
    if rule is None:
        raise OptionError(f"{option_names(*RULES)} are the ways to choose ranks", fix="give one of them")
    return rule


def option_names(*options: str) -> str:
    """Options as a user types them."""
    return ", ".join("--" + name.replace("_", "-") for name in options)


def read_protection(weights: str | PathLike[str] | Mapping[str, float]) -> Protection:
    """What a budget protects: ``relative``, ``absolute``, weights by glob, or what a JSON file of them says."""
    if isinstance(weights, Mapping) or weights in ("absolute", "relative"):
        return weights  # type: ignore[return-value]
    file = Path(weights)
    if not file.is_file():
        raise OptionError(f"weights {weights}: no such file", fix="give absolute, relative, or a JSON file")
    return read_json(file, fix='write {"q_proj": 2.0}')


def read_moments(activations: str | PathLike[str] | Moments | None) -> Moments | None:
    """The moments that the option ``activations`` names, or is; None where it was not given."""
    return activations if activations is None or isinstance(activations, Moments) else load_moments(activations)


def rank_notes(rank: float | None, ranks: Mapping[str, int]) -> list[str]:
    """What there is to say where modules have fewer directions than ``rank``, which was asked for."""
    narrow = [each for each in ranks.values() if rank and each < rank]
    if not narrow:
        return []
    most = f"{max(narrow)}" if len(set(narrow)) == 1 else f"at most {max(narrow)}"
    return [f"{len(narrow)} of {len(ranks)} modules have {most} directions, not {rank:g}: all of them are kept"]
