"""Merging adapters into base models with a record of the losses, exact unmerging, and extraction of adapters."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.merging.extraction import extract_adapter as extract_adapter
    from loralens.merging.switchboard import Switchboard as Switchboard
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
