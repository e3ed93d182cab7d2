"""What ranks and budgets look like on a command line."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from loralens.core.ranks import Rule
from loralens.tables.numbers import parse_size
from loralens.verbs.outputs.rules import RULES as NAMES
from loralens.verbs.outputs.rules import optional_rule, rank_notes, rank_rule, spoken

__all__ = ["ACTIVATIONS", "NAMES", "PROTECT", "Size", "rank_notes", "rule_of", "rules", "rules_given", "spoken"]

F = TypeVar("F", bound=Callable[..., Any])


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # not generic in click 8.1
    """Bytes: ``512KiB``, ``20MB`` (powers of 1000 without an i), or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Whole bytes."""
        del param, ctx
        return value if isinstance(value, int) else parse_size(str(value))


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
    """Option of `rules` → its value, of those that were given; until combine and extract are functions."""
    options = {name: given[name] for name in NAMES if given[name] is not None}
    for name, value in options.items():
        optional_rule(**{name: value})  # which checks it
    return options


def rule_of(given: Mapping[str, Any]) -> Rule:
    """The one rule that was given; until extract is a function."""
    return rank_rule(**{name: given[name] for name in NAMES})
