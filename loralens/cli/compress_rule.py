"""What ranks and budgets look like on a command line."""

import re
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.compress.protection import Protection
    from loralens.core.moments import Moments
    from loralens.core.ranks import Rule

F = TypeVar("F", bound=Callable[..., Any])

NAMES = {  # option → rule
    "rank": "rank",
    "energy": "energy",
    "error": "error",
    "sv_ratio": "sv-ratio",
    "parameters": "parameters",
    "size": "bytes",
}

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?|\.\d+)\s*(?P<unit>[kmg]?i?b?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3}


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # not generic in click 8.1
    """Bytes: ``512KiB``, ``20MB`` (powers of 1000 without an i), or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Whole bytes."""
        if isinstance(value, int):
            return value
        found = _SIZE.fullmatch(str(value).strip())
        if not found:
            self.fail(f"{value!r} is no size: write 20MB, 512KiB or 100000", param, ctx)
        unit, number = found["unit"].lower().removesuffix("b"), float(found["number"])
        if not isfinite(number):
            self.fail(f"{value!r:.100} has too many digits for a size", param, ctx)
        count = int(number * (1024 if unit.endswith("i") else 1000) ** _POWERS[unit.removesuffix("i")])
        if count < 1:
            self.fail(f"{value!r} is less than a byte", param, ctx)
        return count


_RULES = (
    click.option("--rank", type=click.IntRange(min=1), metavar="R", help="So many directions of every module."),
    click.option(
        "--energy",
        type=click.FloatRange(min=0, max=1, min_open=True),
        metavar="X",
        help="As many as hold this part of Σσ² of the module: 0.99.",
    ),
    click.option(
        "--error",
        type=click.FloatRange(min=0, max=1, max_open=True),
        metavar="X",
        help="As many as keep ‖ΔW−ΔW'‖/‖ΔW‖ of the module down to this: 0.05.",
    ),
    click.option(
        "--sv-ratio", type=click.FloatRange(min=1), metavar="X", help="Those with σ above σ₁/X of the module."
    ),
    click.option(
        "--parameters",
        type=click.FloatRange(min=0, min_open=True),
        metavar="N",
        help="One budget for the whole adapter: a part (0.5), or a count.",
    ),
    click.option("--size", type=Size(), metavar="BYTES", help="The same, as bytes of the file: 20MB, 512KiB."),
)

PROTECT = click.option(
    "--weights",
    default="absolute",
    show_default=True,
    metavar="WHAT",
    help="What a budget protects: the absolute error, the relative one of each module, or a JSON file of glob: weight.",
)

ACTIVATIONS = click.option(
    "--activations", metavar="FILE", help="What real inputs excite, as `loralens calibrate` measured it."
)


def rules(function: F) -> F:
    """The options that say how ranks are chosen, of which a command needs one."""
    for option in reversed(_RULES):
        function = option(function)
    return function


def rules_given(given: Mapping[str, Any]) -> dict[str, float]:
    """Option of `rules` → its value, of those that were given.

    Raises
    ------
    click.UsageError
        A value that is not finite.
    """
    said = {name: given[name] for name in NAMES if given[name] is not None}
    for name, value in said.items():
        if not isfinite(value):
            raise click.UsageError(f"{spoken(name)} must be a finite number")
    return said


def spoken(*options: str) -> str:
    """Options as a user types them."""
    return ", ".join("--" + name.replace("_", "-") for name in options)


def rule_of(given: Mapping[str, Any]) -> "Rule":
    """The one rule that was given.

    Raises
    ------
    click.UsageError
        None, or several, or a value that is not finite.
    """
    said = rules_given(given)
    if len(said) != 1:
        what = "exclude each other" if said else "are the ways to choose ranks"
        raise click.UsageError(f"{spoken(*NAMES)} {what}: give one of them")
    from loralens.core.ranks import Rule

    ((name, value),) = said.items()
    return Rule(NAMES[name], value)  # type: ignore[arg-type]


def protection_of(said: str) -> "Protection":
    """``relative``, ``absolute``, or what a JSON file of glob → weight says."""
    if said in ("absolute", "relative"):
        return said  # type: ignore[return-value]
    from loralens.errors import OptionError
    from loralens.formats.container import read_json

    file = Path(said)
    if not file.is_file():
        raise OptionError(f"--weights {said}: no such file", fix="give absolute, relative, or a JSON file")
    return read_json(file, fix='write {"q_proj": 2.0}')


def moments_of(file: str | None) -> "Moments | None":
    """The moments in the file of --activations, where one is given."""
    if file is None:
        return None
    from loralens.formats.moments import load_moments

    return load_moments(file)


def rank_notes(asked: float | None, ranks: Mapping[str, int]) -> list[str]:
    """What to say where modules have fewer directions than were asked for."""
    narrow = [rank for rank in ranks.values() if asked and rank < asked]
    if not narrow:
        return []
    most = f"{max(narrow)}" if len(set(narrow)) == 1 else f"at most {max(narrow)}"
    return [f"{len(narrow)} of {len(ranks)} modules have {most} directions, not {asked:g}: all of them are kept"]
