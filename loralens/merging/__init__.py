"""Into the base and back: merging with proof, exact unmerging, extraction."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loralens.merging.resident.switchboard import Switchboard

__all__ = ["Switchboard"]


def __getattr__(name: str) -> Any:
    """Import the switchboard when it is asked for, not with every module of this package."""
    if name != "Switchboard":
        raise AttributeError(f"module 'loralens.merging' has no attribute {name!r}")
    from loralens.merging.resident.switchboard import Switchboard

    return Switchboard
