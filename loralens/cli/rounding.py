"""Rounding, for commands that are not functions of their own yet: see `loralens.verbs.outputs.rounding`."""

from loralens.cli.options import ALLOW_LOSS
from loralens.verbs.outputs.rounding import Rounding, quantised

__all__ = ["ALLOW_LOSS", "Rounding", "quantised"]
