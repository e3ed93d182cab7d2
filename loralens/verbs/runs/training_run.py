"""A training run: from options and inputs to the finished folder, or to one from which the run can be resumed."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from math import ceil
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from loralens.core.fingerprint import fingerprint
from loralens.core.messages import warn
from loralens.errors import DivergenceError, FormatError, LoraLensError
from loralens.formats.records.training import GRID, LOG, STATE, TRAINER, WATCHED, History, Training, history
from loralens.tables.numbers import json_number, number
from loralens.training.course import ADAM
from loralens.verbs.models.models import model_name
from loralens.verbs.runs.run_display import run_display
from loralens.verbs.runs.run_file import run_file_text
from loralens.verbs.runs.training_inputs import TrainingInputs, digest_of_base
from loralens.verbs.runs.training_options import METHOD_AXES, TrainingOptions
from loralens.verbs.runs.training_result import TrainedParts
from loralens.verbs.shared.adapters import read_adapter
from loralens.verbs.shared.options import Reading
from loralens.watching.watcher import Snapshot, Watcher

if TYPE_CHECKING:
    from torch import device as Device  # noqa: N812

    from loralens.core.stored import State
    from loralens.training.fitted import Fitted
    from loralens.training.loop import Measures, Step, Watch
    from loralens.training.world import World
    from loralens.verbs.runs.trl_run import PeftLayers


NAMED = 8  # texts that the message of a divergence names; a step may have hundreds


class RunWatcher(Watcher):
    """A `Watcher` whose log is in the folder of a run, which ``prepare`` makes when the run begins."""

    def __init__(self, every: int, log: Path, prepare: Callable[[], None]) -> None:
        # A run that is resumed without snapshots before has no log yet, and a new run has an empty folder.
        super().__init__(every=every, log=log, resume=True)
        self._prepare = prepare

    def begin(self, step: int) -> Snapshot:
        """Make the folder, and take the first snapshot."""
        self._prepare()
        return super().begin(step)


@contextmanager
def asking_to_stop(ask: Callable[[], None]) -> Iterator[None]:
    """Within the context, the first SIGTERM only calls ``ask``; a second one does what it would have done.

    In threads other than the main one, and where SIGTERM is ignored, nothing is changed.
    """
    before = signal.getsignal(signal.SIGTERM)
    # Python allows handlers to be set in the main thread alone.
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        del number, frame
        signal.signal(signal.SIGTERM, before)
        ask()

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# The options that must be the same when a run is resumed: those that decide about the numbers of the result. The
# property `identity` adds steps, heads, model and texts as they turned out; device and threads may change.
DECIDING = (
    "task",
    "targets",
    "rank",
    "alpha",
    "dropout",
    "base_dropout",
    "batch",
    "accumulate",
    "length",
    "lr",
    "schedule",
    "warmup",
    "weight_decay",
    "clip",
    "seed",
    "dtype",
    "shard",
    "evaluate_every",
    "patience",
)


class TrainingRun:
    """A training run with its files and its display.

    Parameters
    ----------
    options : TrainingOptions
    inputs : TrainingInputs
    training : Training or None
        The files of the run; None in a dry run without an output.
    world : World
    device : torch.device
        The device on which the model is trained.
    keep_model : bool
        Whether the layers of the model are restored after the run; those of a model that was given as an object are.
    grid : mapping, optional
        What a grid records of the run in its folder.

    Raises
    ------
    OptionError
        Options contradict the inputs or each other. Everything is checked before the first step.
    """

    def __init__(
        self,
        options: TrainingOptions,
        inputs: TrainingInputs,
        training: Training | None,
        world: "World",
        device: "Device",
        *,
        keep_model: bool = False,
        grid: Mapping[str, Any] | None = None,
    ) -> None:
        from loralens.training.feed import shuffle_order

        self.options, self.inputs, self._training, self.world = options, inputs, training, world
        self._device, self._grid = device, grid
        self.part = options.part(world.size)  # texts in a batch of one process
        self._keep_model = (keep_model or isinstance(options.model, tuple)) and not options.shard
        self.start, self.first_a = (
            None if source is None else read_adapter(source, Reading(), applies_all=True)
            for source in (options.start_from, options.first_a)
        )
        self.method = options.training_method()
        # The number is rounded up, so that every text of the last pass is used.
        self.steps = options.steps or max(1, ceil((options.epochs or 1) * inputs.count / options.batch))
        if options.more_steps:
            # An unfinished run has its additional steps already.
            self.steps = self.training.steps() + (0 if options.resume else options.more_steps)
        self.display = run_display(self.steps)
        self.heads = options.heads or inputs.heads
        # By default modules with missing weights are heads; only the user's own choice can leave one out.
        if options.heads:
            self._warn_of_random_weights()
        if world.main:
            inputs.warn_of_cut()
        self.course = options.course(steps=self.steps)
        self.watch = self._make_watch()
        lengths = inputs.lengths if options.group_by_length else None
        self.order = shuffle_order(inputs.count, size=self.part, seed=options.seed, lengths=lengths)
        self._begun, self._done = options.resume, 0
        # The digest of an object is computed now: with LoRA layers in it, the model has other weights.
        if isinstance(options.model, tuple):
            _ = self._base

    @property
    def training(self) -> Training:
        """The files of the run."""
        assert self._training
        return self._training

    def _warn_of_random_weights(self) -> None:
        """Warn of weights that are random and that, with these heads, the adapter will not contain."""
        from loralens.training.targets import choose_heads

        tops = choose_heads(self.inputs.loaded.model, self.heads)
        random = [key for key in self.inputs.loaded.missing if not any(key.startswith(f"{top}.") for top in tops)]
        if random and self.world.main:
            module = random[0].rpartition(".")[0]
            warn(
                f"{module} has new random weights, and the adapter will not contain it",
                f"--heads {','.join((*self.heads, module))}",
            )

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the run: only a run with the same one can be resumed."""
        held_out = self.inputs.held_out
        deciding = {name: getattr(self.options, name) for name in DECIDING}
        course = self.course.record
        options = self.options
        # Options that are not given are left out, so that a run of a release without them is the same run.
        optional = {
            "start": self.method.start if self.method.start == "gaussian" else None,
            "optimiser": course["optimiser"],
            **{name: course.get(name) for name in ADAM},
            "exclude": list(options.exclude) or None,
            "pack": options.pack or None,
            "group_by_length": options.group_by_length or None,
            "backend": "trl" if self.trl else None,
            "trl": dict(options.trl) if self.trl else None,
            "mask_prompt": None if options.mask_prompt else False,
            "beta": options.dpo_beta,
            "start_from": None if self.start is None else fingerprint(self.start),
            "first_a": None if self.first_a is None else fingerprint(self.first_a),
            "autocast": options.autocast,
            "rank_pattern": dict(options.rank_pattern) or None,
        }
        return {
            **deciding,
            "targets": list(options.targets),
            # The method is named by its axes, since different options may mean the same axes.
            "method": self.method.name,
            **{name: value for name, value in optional.items() if value is not None},
            "model": model_name(options.model),
            "base": self._base,
            "steps": self.steps,
            "heads": list(self.heads),
            "data": self.inputs.learned.record,
            "evaluation": held_out.record if held_out else None,
            "processes": self.world.size,
        }

    @cached_property
    def _base(self) -> str:
        return digest_of_base(self.options.model)

    def rehearse(self) -> TrainedParts:
        """The parts that would be trained; nothing is written, and the model is restored."""
        from loralens.training.injection import inject

        options = self._injection_options
        if self.method.start == "lora-ga" or self.start is not None:
            # On a gradient, or on the numbers of an adapter, the parts do not depend.
            options["start"] = "kaiming"
        injection: Any = self._attach_peft() if self.trl else inject(self.inputs.loaded.model, **options)
        try:
            return TrainedParts.of(injection)
        finally:
            injection.remove()

    @property
    def trl(self) -> bool:
        """Whether TRL trains."""
        return self.inputs.backend == "trl"

    def _attach_peft(self) -> "PeftLayers":
        from loralens.training.targets import LoraOptions
        from loralens.verbs.runs.trl_run import attach_peft

        options = LoraOptions(**self._injection_options)
        return attach_peft(self.inputs.loaded.model, options, first_a=self.first_a)

    def train(self) -> "tuple[Fitted, TrainedParts, History]":
        """Train and finish the folder; returns the result, the trained parts, and the log of the whole run.

        A model that was given as an object is restored, unless it is sharded.
        """
        state = None
        if self.options.resume or self.options.more_steps:
            take_up = self.training.resume if self.options.resume else self.training.finished
            state = self.world.from_main(lambda: take_up(self.identity))
            self._done = state.step if state else 0
            self._say(f"going on after step {self._done}")
        stop = threading.Event()
        with asking_to_stop(stop.set):
            fitted = self._fit(state, stop=stop.is_set)
        self.display.clear()
        parts = TrainedParts.of(fitted.injection)
        if self._keep_model:
            fitted.injection.remove()
        if fitted.stopped:
            self._say(f"stopped after step {fitted.steps}; {self._describe_files()}")
            # By KeyboardInterrupt on the command line, else at once.
            signal.raise_signal(signal.SIGTERM)
        if not self.world.main:
            return fitted, parts, History({}, fitted.evaluations)
        # The log is read before the folder takes its final name.
        log = history(self.training.folder / LOG)
        self.training.finish(fitted.adapter)
        return fitted, parts, log

    @property
    def _injection_options(self) -> dict[str, Any]:
        """The keywords for `loralens.training.inject`."""
        options = self.options
        if self.start is not None:
            from loralens.training.readout import start_options

            own = start_options(self.start, method=self.method)
            new_options = {name: getattr(options, name) for name in ("method", *METHOD_AXES, "dropout", "seed")}
            return {**own, **new_options, "heads": list(self.heads), "start": self.start}
        equal = ("targets", "exclude", "rank", "rank_pattern", "alpha", "method", *METHOD_AXES, "dropout", "seed")
        return {"heads": list(self.heads), **{name: getattr(options, name) for name in equal}}

    def _fit(self, state: "State | None", *, stop: "Callable[[], bool]") -> "Fitted":
        from loralens.training.fitted import fit

        options, inputs = self.options, self.inputs
        same: dict[str, Any] = {
            "course": self.course,
            "watch": replace(self.watch, stop=stop),
            "state": state,
            "device": self._device,
            "base_model": model_name(options.model),
            "record": self._record(),
        }
        try:
            if self.trl:
                return self._fit_with_trl(**same)
            return fit(
                inputs.loaded.model,
                inputs.task.batches(inputs.examples, self.order),
                loss=inputs.task.loss,
                first_a=self.first_a,
                shard=options.shard,
                task_type=inputs.task.task_type,
                **same,
                **self._injection_options,
            )
        except DivergenceError as error:
            # All processes have the same error, and the first reports it.
            if not self.world.main:
                raise SystemExit(2) from error
            raise self._explain(error) from error
        # The user, or an error such as a full disk, has stopped the run.
        except (KeyboardInterrupt, LoraLensError) as error:
            # Other damaged files are named already. --resume would not go on from this state.
            if isinstance(error, FormatError) and not error.where and state is not None and self._done == state.step:
                folder = self.training.folder if self._begun else self.training.target
                raise error.at(str(folder / STATE)) from error
            # An error before the first line of the log has its own message, and there are no files to speak of.
            if self._begun or isinstance(error, KeyboardInterrupt):
                self._say(f"stopped after step {self._done}; {self._describe_files()}")
            raise
        finally:
            self.display.clear()

    def _explain(self, error: DivergenceError) -> DivergenceError:
        """The error, with the numbers of the texts of the step and the last good snapshot."""
        # The texts of all batches of the step are named, since the loss of a step is one number.
        many = self.options.accumulate * self.world.size
        # People count lines from 1.
        rows = [str(row + 1) for number in range(many) for row in self.order(self._done * many + number)]
        numbers = ", ".join(rows[:NAMED]) + (f" … ({len(rows)})" if len(rows) > NAMED else "")
        packed = "the packed " if self.options.pack else ""
        what = f"{error.what}, texts {numbers} of {packed}{self.inputs.learned.name}"
        fix = error.fix
        if self._begun:
            # The weights after the last step gave the loss that is not finite, so the last good snapshot is older.
            good = [path for step, path in self.training.snapshots if step < self._done]
            none = f"{self.training.folder} keeps the log, and there was no good snapshot yet"
            what += f"; the last good snapshot is {good[-1]}" if good else f"; {none}"
            fix += "; then begin anew: --overwrite"
        if self._grid is not None:
            self._make_folder()
            self.training.mark_as_diverged(what)
        return DivergenceError(what, fix=fix)

    def _fit_with_trl(self, **same: Any) -> "Fitted":
        from loralens.verbs.runs.trl_run import fit_with_trl

        layers = self._attach_peft()
        settings = {name: value for name, value in self.options.trl.items() if name not in self.options.loading}
        inputs, beta = self.inputs, self.options.dpo_beta
        assert inputs.rows
        try:
            return fit_with_trl(
                layers, inputs.loaded.tokenizer, inputs.rows, self.order, part=self.part, settings=settings, beta=beta,
                evaluated=inputs.evaluated_rows, make_folder=self._make_trainer_folder, **same,
            )  # fmt: skip
        except BaseException:
            layers.remove()
            raise

    def _make_trainer_folder(self) -> Path:
        self._make_folder()
        return self.training.folder / TRAINER

    def _make_watch(self) -> "Watch":
        from loralens.training.loop import Watch

        options, evaluated = self.options, self.inputs.evaluated
        evaluate = None
        if evaluated is not None:
            # As many texts at a time as in training, since they need the same memory.
            evaluate = self.inputs.task.evaluation(evaluated, size=self.part, world=self.world)
        options.check_evaluation(has_texts=evaluate is not None)
        watcher = None
        if options.watch and self._training:
            watcher = RunWatcher(options.watch, self.training.folder / WATCHED, self._make_folder)
        return Watch(
            on_step=self._step,
            evaluate=evaluate,
            on_evaluation=self._log_evaluation,
            evaluate_every=options.evaluate_every or 0,
            patience=options.patience,
            snapshot=self._training.snapshot if options.snapshots and self._training else None,
            snapshot_every=options.snapshots or 0,
            # A dry run without an output makes a watch too, for the checks in it.
            save=self._training.save if self._training else None,
            save_every=options.save_every,
            watcher=watcher,
        )

    def _make_folder(self) -> None:
        """Make the folder, in the first process, if it is not there: a run that cannot start leaves no files."""
        if not self._begun and self.world.main:
            run = {**self.identity, **({} if self._grid is None else {GRID: self._grid})}
            if self.options.more_steps:
                self.training.extend(run)
            else:
                self.training.begin(run, overwrite=self.options.overwrite, settings=run_file_text(self.options))
        self._begun = True

    def _log(self, step: int, **entries: Any) -> None:
        """Write a line of the log."""
        self._make_folder()
        self.training.log({"step": step, **entries})

    def _step(self, step: "Step") -> None:
        self._done = step.number
        # JSON has no NaN, which is the loss of a step without a hidden token, and no infinity, which is the norm of a
        # step that float16 could not hold.
        entry = step._asdict() | {"loss": json_number(step.loss), "norm": json_number(step.norm)}
        self._log(step.number, **{name: value for name, value in entry.items() if name != "number"})
        self.display.step(step)

    def _log_evaluation(self, step: int, measures: "Measures") -> None:
        self._log(step, evaluation={name: json_number(value) for name, value in measures.items()})
        values = "  ".join(f"{name} {number(value)}" for name, value in measures.items())
        self.display.show_evaluation(f"step {step}: evaluation {values}")

    def _record(self) -> dict[str, Any]:
        """The part of the record in the metadata of the adapter that `fit` does not know: the model and the data."""
        held_out = self.inputs.held_out
        return {
            "model": model_name(self.options.model),
            "task": self.inputs.task.name,
            "data": self.inputs.learned.record,
            "evaluation": held_out.record if held_out else None,
            "labels": list(self.inputs.learned.labels) or None,
            "length": self.options.length,
            "batch": self.options.batch,
            # A digest of the pairs: a path means nothing on another machine.
            **({} if self.start is None else {"started_from": fingerprint(self.start)}),
            **({} if self.first_a is None else {"first_a": fingerprint(self.first_a)}),
        }

    def _describe_files(self) -> str:
        if not self._begun:
            return "nothing was written"
        if self.training.has_state:
            return f"{self.training.folder} holds the last state, and --resume goes on from there"
        return f"{self.training.folder} holds the log; no state had been saved, so --resume begins anew"

    def _say(self, text: str) -> None:
        if self.world.main:
            self.display.say(text)
