"""Fleets: an index of thousands of adapters, with a sketch of each update, for search, copies, runs and families."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.fleet.catalogue import Member as Member
    from loralens.fleet.catalogue import Signature as Signature
    from loralens.fleet.catalogue import Unreadable as Unreadable
    from loralens.fleet.sketches import Sketch as Sketch
    from loralens.fleet.sketches import Sketches as Sketches
else:
    # Imported on first use, since NumPy is not needed for help texts.
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
