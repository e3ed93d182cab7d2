"""Callbacks of transformers' `Trainer`, and so of TRL and axolotl: a `Watcher`, and merging without drift."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from os import PathLike
from typing import Any

from loralens.errors import OptionError
from loralens.exports import takes_options
from loralens.requirements import missing_packages
from loralens.watching.live_switchboard import BUDGET, LiveSwitchboard
from loralens.watching.watcher import Snapshot, Watcher, WatcherOptions, watcher_of

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise missing_packages("SpectralCallback", ("transformers",), error) from error


class SpectralCallback(TrainerCallback):
    """Measures the adapter of a trainer every so many steps: a `Watcher`, with the same options.

    Parameters
    ----------
    every : int
        Steps of the optimiser between two snapshots. The first is before the first step, and the last at the end.
    log : path, optional
        The file of the log; by default ``watch.jsonl`` in the output folder, or ``watch-2.jsonl`` … if that is there.
    options : WatcherOptions
        As for `Watcher`: ``gradients``, ``base``, ``keep`` … are given as keywords.

    Attributes
    ----------
    watcher : Watcher or None
        The watcher, once the training has begun.

    Notes
    -----
    ``callback.attach(trainer)`` adds it to a trainer and sends ``lora/frobenius``, ``lora/effective_rank`` … to the
    trainer's own logging, so that TensorBoard, W&B and trackio show them, and takes the loss and the gradient norm of
    every step. A callback that is given to the trainer in ``callbacks=[…]`` does not know its trainer: it watches,
    warns and writes the log too, but its numbers go to ``trainer.state.log_history`` and not to these programs, and it
    knows the loss only where the trainer logs it.
    """

    @takes_options
    def __init__(self, every: int = 50, *, log: str | PathLike[str] | None = None, options: WatcherOptions) -> None:
        self.every, self.log, self.options = every, log, options
        self.watcher: Watcher | None = None
        self._trainer: Any = None
        self._losses: list[Any] = []  # of the parts of the batch
        self._restore = ExitStack()
        self._waiting: Snapshot | None = None  # a snapshot whose numbers have not been logged

    def attach(self, trainer: Any) -> "SpectralCallback":
        """Add the callback to a trainer, and log through it."""
        if not isinstance(trainer, Trainer):
            raise OptionError(f"{type(trainer).__name__} is not a Trainer of transformers", fix="give a Trainer")
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the watcher, which takes the first snapshot."""
        own = {"every": self.every, "log": self.log, "folder": args.output_dir, "done": state.global_step}
        self.watcher = watcher_of(kwargs["model"], self.options, **own)
        self._restore.close()  # a training before may have ended with an error
        self._losses.clear()
        if self._trainer is not None:
            self._listen(self._trainer, "training_step", lambda loss: self._losses.append(loss))
            self._listen(self._trainer.accelerator, "clip_grad_norm_", lambda norm: self._hear(gradient_norm=norm))
        self._waiting = self.watcher.last
        self._log(state, control)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take a snapshot, while the gradients are still there."""
        step = state.global_step + 1  # the trainer counts the step after this event
        if self._losses:
            # The trainer divides the loss of each part of a batch, so that their sum is the loss of the step.
            self._hear(loss=sum(loss.detach().float() for loss in self._losses))
            self._losses.clear()
        if self.watcher is not None and step % self.every == 0:
            self._waiting = self.watcher.look(step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the numbers of a snapshot, once the step is counted."""
        self._log(state, control)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the loss and the gradient norm that are logged, if the trainer is not known."""
        logs = kwargs.get("logs") or {}
        if self._trainer is None and "loss" in logs:
            self._hear(loss=logs["loss"], gradient_norm=logs.get("grad_norm"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the last snapshot."""
        watcher = self.watcher
        if watcher is not None and (watcher.last is None or watcher.last.step != state.global_step):
            self._waiting = watcher.look(state.global_step)
        self._restore.close()
        self._log(state, control)

    def _hear(self, **numbers: Any) -> None:
        if self.watcher is not None:
            self.watcher.hear(**numbers)

    def _listen(self, owner: Any, name: str, hear: Callable[[Any], None]) -> None:
        """Pass what a method returns to ``hear`` too, until the training ends."""
        method = getattr(owner, name)

        @wraps(method)
        def call(*arguments: Any, **keywords: Any) -> Any:
            result = method(*arguments, **keywords)
            if result is not None:
                hear(result)
            return result

        # A method that another program has replaced is an attribute of the object, and is put back.
        restore = (setattr, owner, name, method) if name in vars(owner) else (delattr, owner, name)
        setattr(owner, name, call)
        self._restore.callback(*restore)

    def _log(self, state: Any, control: Any) -> None:
        snapshot, self._waiting = self._waiting, None
        if snapshot is None:
            return
        if self._trainer is not None:
            # The trainer takes a log for its own, and would leave out the loss that is due at this step.
            due = control.should_log
            # The method of transformers, since those of TRL also report and clear the averages of the trainer.
            Trainer.log(self._trainer, dict(snapshot.scalars))
            control.should_log = due
        else:
            state.log_history.append({**snapshot.scalars, "step": state.global_step})


class ExactMergeCallback(TrainerCallback):
    """Lets a trainer merge and unmerge its adapter without drift, for TRL's GRPO and others that send merged weights.

    During the training ``model.merge_adapter()`` and ``model.unmerge_adapter()`` of the trainer's code are those of a
    `LiveSwitchboard`. At the end the base is compared with that of the beginning by SHA-256.

    Parameters
    ----------
    adapter : str, optional
        The name of the adapter; by default the active one.
    budget, threads
        As for `LiveSwitchboard`.

    Attributes
    ----------
    switchboard : LiveSwitchboard or None
        The switchboard, once the training has begun.
    """

    def __init__(self, adapter: str | None = None, *, budget: float = BUDGET, threads: int | None = None) -> None:
        self.switchboard: LiveSwitchboard | None = None
        self._adapter, self._budget, self._threads = adapter, budget, threads
        self._stack = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the place of PEFT's merging."""
        self.switchboard = LiveSwitchboard(kwargs["model"], self._adapter, budget=self._budget, threads=self._threads)
        self._stack.enter_context(self.switchboard.in_place_of_peft())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give PEFT's methods back, and check the base."""
        self._stack.close()
        if self.switchboard is not None:
            self.switchboard.verify()
