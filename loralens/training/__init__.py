"""LoRA training: adapted layers, their injection into a model, the training loop, and the resulting `Adapter`."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.training.course import METHODS as METHODS
    from loralens.training.course import Course as Course
    from loralens.training.fitted import Fitted as Fitted
    from loralens.training.fitted import fit as fit
    from loralens.training.injection import Injection as Injection
    from loralens.training.injection import inject as inject
    from loralens.training.loop import Step as Step
    from loralens.training.loop import Watch as Watch
    from loralens.training.readout import read_injection as read_injection
    from loralens.training.readout import record_of as record_of
    from loralens.training.tasks import Examples as Examples
    from loralens.training.tasks import task_named as task_named
else:
    # Imported on first use: `import loralens` gives `loralens.training`, and torch takes a second to import.
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
