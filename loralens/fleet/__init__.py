"""Fleets: an index of thousands of adapters, with a sketch of each update, for search, copies, runs and families."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.fleet.catalogue.members import Member as Member
    from loralens.fleet.catalogue.members import Signature as Signature
    from loralens.fleet.catalogue.members import Unreadable as Unreadable
    from loralens.fleet.fleet import Fleet as Fleet
    from loralens.fleet.sketching.sketches import Sketch as Sketch
    from loralens.fleet.sketching.sketches import Sketches as Sketches
else:
    # Imported on first use, since NumPy is not needed for help texts.
    __all__, __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "catalogue.members": ["Member", "Signature", "Unreadable"],
            "fleet": ["Fleet"],
            "sketching.sketches": ["Sketch", "Sketches"],
        },
    )
