"""LoRA training: adapted layers, their injection into a model, the training loop, and the resulting `Adapter`."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.training.course import Course
    from loralens.training.fitting import Fitted, fit
    from loralens.training.injection import Injection, inject
    from loralens.training.method import METHODS
    from loralens.training.readout import read_injection, record_of
    from loralens.training.watch import Step, Watch

# Type checkers read the names from a literal list, and not from the mapping below.
__all__ = [
    "METHODS",
    "Course",
    "Fitted",
    "Injection",
    "Step",
    "Watch",
    "fit",
    "inject",
    "read_injection",
    "record_of",
]

# Imported on first use: `import loralens` gives `loralens.training`, and torch takes a second to import.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Course": "course",
        "Fitted": "fitting",
        "Injection": "injection",
        "METHODS": "method",
        "Step": "watch",
        "Watch": "watch",
        "fit": "fitting",
        "inject": "injection",
        "read_injection": "readout",
        "record_of": "readout",
    },
)
