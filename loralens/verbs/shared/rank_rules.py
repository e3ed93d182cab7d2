"""Options that choose ranks: the rule, the error that a budget minimises, and the moments of real inputs."""

from collections.abc import Mapping, Sequence
from math import inf, isfinite, nan
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, cast

from loralens.core.adapter import Adapter
from loralens.core.messages import progress
from loralens.core.ranks import Rule, RuleName
from loralens.core.threads import processor_count
from loralens.errors import OptionError
from loralens.formats.files.container import read_json
from loralens.tables.numbers import parse_size
from loralens.verbs.shared.adapters import Reading

# Verbs that combine adapters need none of this for a rule.
if TYPE_CHECKING:
    from loralens.compression.directions import DType, Protection
    from loralens.compression.plan import TruncationPlan
    from loralens.core.stored import Moments


class RankRules(TypedDict, total=False):
    """The rules that choose ranks, of which a verb takes one; `loralens.compress` describes them."""

    rank: int | None
    energy: float | None
    error: float | None
    sv_ratio: float | None
    parameters: float | None
    size: int | str | None


class RulesAndReading(RankRules, Reading):
    """The options of a verb that reads an adapter and chooses ranks."""


# Option → rule. ``bytes`` is the rule's name in recipes too, where it may not depend on how an option is spelt.
RULES: Mapping[str, RuleName] = {
    "rank": "rank",
    "energy": "energy",
    "error": "error",
    "sv_ratio": "sv-ratio",
    "parameters": "parameters",
    "size": "bytes",
}


def split_rules(options: Mapping[str, Any]) -> tuple[RankRules, Any]:
    """The options that choose ranks, and all other options."""
    rules = {name: value for name, value in options.items() if name in RULES}
    return cast("RankRules", rules), {name: value for name, value in options.items() if name not in RULES}


def optional_rule(**options: Unpack[RankRules]) -> Rule | None:
    """The rule that was given, or None.

    Raises
    ------
    OptionError
        Several rules were given, or the value is not possible for the rule.
    """
    stated = {name: value for name in RULES if (value := options.get(name)) is not None}
    if not stated:
        return None
    if len(stated) > 1:
        raise OptionError(f"{option_names(*stated)} exclude each other", fix="give one of them")
    ((name, value),) = stated.items()
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
    return Rule(RULES[name], int(amount) if name == "size" or (name == "rank" and amount.is_integer()) else amount)


def rank_rule(**options: Unpack[RankRules]) -> Rule:
    """The rule that was given, for a verb that needs one.

    Raises
    ------
    OptionError
        No rule or several rules were given, or the value is not possible for the rule.
    """
    rule = optional_rule(**options)
    if rule is None:
        raise OptionError(
            "no option says how to choose the ranks",
            fix=f"give one of {option_names(*RULES)}, such as --energy 0.99; loralens convert --dtype keeps all ranks",
        )
    return rule


def option_names(*options: str) -> str:
    """Parameters as options of the command line: ``--sv-ratio, --size``."""
    return ", ".join("--" + name.replace("_", "-") for name in options)


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
    from loralens.compression.plan import TruncationPlan

    with progress("reading", len(adapter)) as step:
        return TruncationPlan.of(
            adapter, modules=modules, dtype=dtype, moments=moments, bases=True, threads=processor_count(), step=step
        )


def rank_notes(rank: float | None, ranks: Mapping[str, int]) -> list[str]:
    """A note if modules have fewer directions than ``rank``, the number that was asked for; otherwise no note."""
    # Truncation never pads: a rank above the true one would only add zeros to the file.
    narrow = [each for each in ranks.values() if rank and each < rank]
    if not narrow:
        return []
    most = f"{max(narrow)}" if len(set(narrow)) == 1 else f"at most {max(narrow)}"
    return [f"{len(narrow)} of {len(ranks)} modules have {most} directions, not {rank:g}: all of them are kept"]
