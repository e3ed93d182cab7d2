"""`lightning_callback`: a `Watcher` as a callback of Lightning's `Trainer`."""

import sys
from importlib import import_module
from os import PathLike
from typing import Any, Unpack

from loralens.requirements import missing_packages
from loralens.watching.trainer_callback import WatcherOptions, log_path
from loralens.watching.watcher import Watcher

# The two packages of Lightning. A callback has to come from the package whose trainer runs.
PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def lightning_callback(
    every: int = 50, *, log: str | PathLike[str] | None = None, **options: Unpack[WatcherOptions]
) -> Any:
    """A callback for Lightning's ``Trainer(callbacks=[…])`` that looks at the adapter in its LightningModule.

    The numbers ``lora/frobenius``, ``lora/effective_rank`` … go to the loggers of the trainer.

    Parameters
    ----------
    every : int
        Steps of the optimiser between two looks. The first look is before the first step, and the last at the end.
    log : path, optional
        The file of the log; by default ``watch.jsonl`` in the folder of the trainer's logger.
    **options : WatcherOptions
        As for `Watcher`.

    Raises
    ------
    OptionError
        Lightning is not installed.
    """
    # The name under which the program has imported it comes first.
    names = sorted(PACKAGES, key=lambda name: name not in sys.modules)
    try:
        base: Any = import_module(names[0]).Callback
    except ImportError:
        try:
            base = import_module(names[1]).Callback
        except ImportError as error:
            raise missing_packages("lightning_callback", ("lightning",), error) from error
    # The class is made here, since its base class is in a package that need not be installed.
    callback: Any = type("SpectralCallback", (_Looks, base), {})
    return callback(every, log, options)


class _Looks:
    """The methods that Lightning calls."""

    def __init__(self, every: int, log: str | PathLike[str] | None, options: WatcherOptions) -> None:
        super().__init__()
        # Lightning sets the attribute `log` of every callback.
        self.every, self.log_file, self.options = every, log, options
        self.watcher: Watcher | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the watcher, which looks for the first time."""
        done = trainer.global_step
        log = log_path(self.log_file, trainer.log_dir or trainer.default_root_dir, resumed=done > 0)
        resume = done > 0 and log.exists()
        self.watcher = Watcher(pl_module, every=self.every, log=log, start=done, resume=resume, **self.options)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look, while the gradients are still there: Lightning sets them to 0 before the next batch."""
        watcher, step = self.watcher, trainer.global_step
        # With accumulated gradients several batches belong to one step.
        if watcher is None or step % self.every or (watcher.last is not None and watcher.last.step == step):
            return
        pl_module.log_dict(watcher.look(step).scalars)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Look for the last time."""
        watcher, step = self.watcher, trainer.global_step
        if watcher is not None and (watcher.last is None or watcher.last.step != step):
            watcher.look(step, final=True)
