"""Into the base and back: merging with proof, exact unmerging, extraction."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.merging.extraction.extract import extract_adapter
    from loralens.merging.resident.switchboard import Switchboard

__all__ = [
    "Switchboard",
    "extract_adapter",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Switchboard": "resident.switchboard",
        "extract_adapter": "extraction.extract",
    },
)
