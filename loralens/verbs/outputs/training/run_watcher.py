"""The watcher of a training run: looks at its adapter, and writes the log in its folder."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, final

from loralens.watching.watcher import Watcher

if TYPE_CHECKING:  # torch takes a second
    from loralens.training.injection import Injection


@final
class RunWatcher:
    """A `Watcher` whose log is in the folder of a run, which is there only when the run begins.

    Parameters
    ----------
    every : int
        Steps between two looks.
    log : Path
    prepare : callable
        Makes the folder. It is called before the first look is written.
    """

    def __init__(self, every: int, log: Path, prepare: Callable[[], None]) -> None:
        # A run that is resumed without looks before has no log yet, and a new run has an empty folder.
        self._watcher = Watcher(every=every, log=log, resume=True)
        self._prepare = prepare

    def watch(self, model: "Injection") -> None:
        """Take the layers as they are before training."""
        self._watcher.watch(model)

    def begin(self, step: int) -> None:
        """Make the folder, and look for the first time."""
        self._prepare()
        self._watcher.begin(step)

    def step(self, *, final: bool = False) -> None:
        """Count a step, and look if it is time."""
        self._watcher.step(final=final)
