"""Options that say how ranks are chosen: the rules, what a budget protects, what real inputs excite."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


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
    click.option("--size", metavar="BYTES", help="The same, as bytes of the file: 20MB, 512KiB."),
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
