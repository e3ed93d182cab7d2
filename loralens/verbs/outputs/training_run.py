"""One training run: from options and inputs to the finished folder, or to one from which it can be resumed."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralens.core.adapter import Adapter
from loralens.core.messages import warn
from loralens.errors import DivergenceError, LoraLensError, OptionError, place
from loralens.formats.files.location import NAMES, existing_path
from loralens.formats.models.base_digest import base_digest
from loralens.formats.records.training import LOG, Training
from loralens.formats.records.training_log import History, history
from loralens.tables.numbers import json_number
from loralens.verbs.inputs.bases import base_weights
from loralens.verbs.inputs.models import ModelSource
from loralens.verbs.inputs.training import TrainingInputs, TrainingOptions
from loralens.verbs.outputs.divergence import explain_divergence
from loralens.verbs.outputs.live_spectra import LiveSpectra, describe_spectra
from loralens.verbs.outputs.run_display import run_display

if TYPE_CHECKING:  # torch takes a second
    from torch import nn

    from loralens.core.training import State
    from loralens.training.course import Course
    from loralens.training.fitting import Fitted
    from loralens.training.injection import Injection
    from loralens.training.tasks import Order
    from loralens.training.watch import Measures, Step, Watch
    from loralens.training.world import World

# What must be the same for a run to go on: all that decides a number of the result.
DECIDING = (
    "task",
    "targets",
    "rank",
    "alpha",
    "method",
    "dropout",
    "base_dropout",
    "batch",
    "accumulate",
    "length",
    "lr",
    "schedule",
    "warmup",
    "optimiser",
    "weight_decay",
    "clip",
    "seed",
    "dtype",
    "shard",
    "evaluate_every",
    "patience",
)
EVALUATED = 64  # texts at a time


@dataclass(frozen=True, slots=True)
class TrainedParts:
    """What of a model is trained.

    Attributes
    ----------
    modules : tuple of str
        Those with a LoRA layer, in natural order.
    heads : tuple of str
        Those that are trained in full.
    trainable, frozen : int
        How many numbers are trained, and how many of the model are not.
    """

    modules: tuple[str, ...]
    heads: tuple[str, ...]
    rank: int
    trainable: int
    frozen: int

    @classmethod
    def of(cls, injection: "Injection") -> "TrainedParts":
        """Of layers that are in their model."""
        return cls(
            tuple(injection.layers), tuple(injection.heads), injection.rank, injection.trainable, injection.frozen
        )


class TrainingRun:
    """A run with its files and its display.

    Parameters
    ----------
    options : TrainingOptions
    inputs : TrainingInputs
    training : Training or None
        The files; None in a dry run that names no output.
    world : World
    """

    def __init__(
        self, options: TrainingOptions, inputs: TrainingInputs, training: Training | None, world: "World"
    ) -> None:
        self.options, self.inputs, self._training, self.world = options, inputs, training, world
        self.steps = options.steps or max(1, ceil((options.epochs or 1) * len(inputs.examples) / options.batch))
        self.display = run_display(self.steps)
        self.heads = options.heads or inputs.heads
        if options.heads:
            self._warn_of_random_weights()
        self.spectra = None
        if options.spectra:
            assert not isinstance(options.model, tuple)
            self.spectra = LiveSpectra(options.model)
            self._check_spectra(self.spectra)
        if world.main:
            inputs.warn_of_cut()
        self.course, self.watch, self.order = self._make_course(), self._make_watch(), self._make_order()
        self._begun, self._done = options.resume, 0
        if isinstance(options.model, tuple):
            _ = self._base  # of the model as it is now: with LoRA layers in it, it has other weights

    @property
    def training(self) -> Training:
        """The files of the run."""
        assert self._training
        return self._training

    def _warn_of_random_weights(self) -> None:
        """Say which weights neither the model's folder nor the adapter will have, by these heads."""
        from loralens.training.targets import choose_heads

        tops = choose_heads(self.inputs.loaded.model, self.heads)
        random = [key for key in self.inputs.loaded.missing if not any(key.startswith(f"{top}.") for top in tops)]
        if random and self.world.main:
            module = random[0].rpartition(".")[0]
            warn(
                f"{module} is new and random, and the adapter will not hold it",
                f"--heads {','.join((*self.heads, module))}",
            )

    def _check_spectra(self, spectra: LiveSpectra) -> None:
        """Refuse now what the first snapshot would: weights that cannot be read, or are not there."""
        from loralens.training.injection import inject
        from loralens.training.readout import read_injection

        injection = inject(self.inputs.loaded.model, **{**self._injection_options, "method": "lora"})
        try:
            modules = read_injection(injection).modules
        finally:
            injection.remove()
        with place("--spectra"):
            base_weights(spectra.model, modules)

    @property
    def part(self) -> int:
        """Texts that one process takes at a time."""
        parts = self.options.accumulate * self.world.size
        if self.options.batch % parts:
            raise OptionError(
                f"a batch of {self.options.batch} cannot be cut into {parts} equal parts",
                fix=f"give a --batch that is a multiple of --accumulate times the number of processes, {parts}",
            )
        return self.options.batch // parts

    @property
    def identity(self) -> dict[str, Any]:
        """What the run is; two runs with the same are one."""
        held_out = self.inputs.held_out
        deciding = {name: getattr(self.options, name) for name in DECIDING}
        return deciding | {
            "targets": list(self.options.targets),
            "model": model_name(self.options.model),
            "base": self._base,
            "steps": self.steps,
            "heads": list(self.heads),
            "data": self.inputs.learned.record,
            "evaluation": held_out.record if held_out else None,
            "processes": self.world.size,
        }

    @cached_property
    def _base(self) -> str:
        """A digest of the base's files, so that other weights under the same name are another run."""
        model = self.options.model
        return _digest_of_model(model[0]) if isinstance(model, tuple) else base_digest(existing_path(Path(model)))

    def rehearse(self) -> TrainedParts:
        """What would be trained; nothing is written, and the model is as it was."""
        from loralens.training.injection import inject

        injection = inject(self.inputs.loaded.model, **self._injection_options)
        try:
            return TrainedParts.of(injection)
        finally:
            injection.remove()

    def train(self) -> "tuple[Fitted, TrainedParts, History]":
        """Train, and leave the finished folder; what was made of what, and all that was logged of the run.

        A model that was given as an object is as it was, unless it lies in shards.
        """
        state = None
        if self.options.resume:
            state = self.world.from_main(lambda: self.training.resume(self.identity))
            self._done = state.step if state else 0
            self._say(f"going on after step {self._done}")
            if self.spectra and self.world.main and self.training.snapshots:
                self.spectra.remember(*self.training.snapshots[-1])
        fitted = self._fit(state)
        self.display.clear()
        parts = TrainedParts.of(fitted.injection)
        if isinstance(self.options.model, tuple) and not self.options.shard:
            fitted.injection.remove()
        if not self.world.main:
            return fitted, parts, History({}, fitted.evaluations)
        log = history(self.training.folder / LOG)
        self._finish_files(fitted.adapter)
        return fitted, parts, log

    def _finish_files(self, adapter: Adapter) -> None:
        try:
            self.training.finish(adapter)
        except LoraLensError:
            if (self.training.folder / NAMES[0]).exists():
                self._say(f"the run is done; {self.training.folder} holds the finished adapter")
            raise

    @property
    def _injection_options(self) -> dict[str, Any]:
        """The options of `loralens.training.inject`."""
        options = self.options
        return {
            "targets": "all-linear" if options.targets == ("all-linear",) else list(options.targets),
            "heads": list(self.heads),
            "rank": options.rank,
            "alpha": options.alpha,
            "method": options.method,
            "dropout": options.dropout,
            "seed": options.seed,
        }

    def _make_course(self) -> "Course":
        from loralens.training.course import Course

        options = self.options
        return Course(
            self.steps,
            lr=options.lr,
            optimiser=options.optimiser,
            weight_decay=options.weight_decay,
            schedule=options.schedule,
            warmup=options.warmup,
            accumulate=options.accumulate,
            clip=options.clip,
            base_dropout=options.base_dropout,
            checkpointing=options.checkpointing,
        )

    def _make_order(self) -> "Order":
        from loralens.training.feed import shuffle_order

        return shuffle_order(len(self.inputs.examples), size=self.part, seed=self.options.seed)

    def _fit(self, state: "State | None") -> "Fitted":
        from loralens.training.fitting import fit

        options, inputs = self.options, self.inputs
        try:
            return fit(
                inputs.loaded.model,
                inputs.task.batches(inputs.examples, self.order, seed=options.seed),
                course=self.course,
                loss=inputs.task.loss,
                watch=self.watch,
                state=state,
                shard=options.shard,
                base_model=model_name(options.model),
                task_type=inputs.task.task_type,
                record=self._record(),
                **self._injection_options,
            )
        except DivergenceError as error:
            if not self.world.main:  # all processes see the same; one says it
                raise SystemExit(2) from error
            # All batches of a step are named: the loss of a step is one number.
            many = options.accumulate * self.world.size
            texts = [text for number in range(many) for text in self.order(self._done * many + number)]
            training = self.training if self._begun else None
            raise explain_divergence(
                error, texts=texts, name=inputs.learned.name, training=training, done=self._done
            ) from error
        except (KeyboardInterrupt, LoraLensError) as error:  # stopped by the user, by a full disk …
            if self._begun or isinstance(error, KeyboardInterrupt):
                self._say(f"stopped after step {self._done}; {self._describe_files()}")
            raise
        finally:
            self.display.clear()

    def _make_watch(self) -> "Watch":
        from loralens.training.watch import Watch

        options, evaluated = self.options, self.inputs.evaluated
        evaluate = self.inputs.task.evaluation(evaluated, size=EVALUATED) if evaluated is not None else None
        for option in ("patience", "evaluate_every", "eval_limit"):
            if getattr(options, option) and evaluate is None:
                raise OptionError(f"--{option.replace('_', '-')} needs texts to evaluate on", fix="give --eval")
        if options.patience and not options.evaluate_every:
            raise OptionError("--patience counts evaluations on the way", fix="say how often: --evaluate-every N")
        return Watch(
            on_step=self._step,
            evaluate=evaluate,
            on_evaluation=self._log_evaluation,
            evaluate_every=options.evaluate_every or 0,
            patience=options.patience,
            snapshot=self._write_snapshot if options.snapshots else None,
            snapshot_every=options.snapshots or 0,
            save=self.training.save if self._training else None,
            save_every=options.save_every,
        )

    def _log(self, step: int, **entries: Any) -> None:
        """A line of the log; the first one makes the folder, so that a run that cannot begin leaves nothing."""
        if not self._begun:
            self.training.begin(self.identity, overwrite=self.options.overwrite)
            self._begun = True
        self.training.log({"step": step, **entries})

    def _step(self, step: "Step") -> None:
        self._done = step.number
        entry = step._asdict() | {"loss": json_number(step.loss)}  # of a step that asked nothing there is none
        self._log(step.number, **{name: value for name, value in entry.items() if name != "number"})
        self.display.step(step)

    def _log_evaluation(self, step: int, measures: "Measures") -> None:
        self._log(step, evaluation={name: json_number(value) for name, value in measures.items()})
        values = "  ".join(f"{name} {value:.4g}" for name, value in measures.items())
        self.display.say(f"step {step}: evaluation {values}")

    def _write_snapshot(self, step: int, adapter: Adapter) -> None:
        self.training.snapshot(step, adapter)
        if self.spectra:
            medians = self.spectra.measure(step, adapter)
            self._log(step, spectra={name: json_number(value) for name, value in medians.items()})
            self.display.say(describe_spectra(step, medians))

    def _record(self) -> dict[str, Any]:
        """What the adapter's metadata says of the data, beside what `fit` says of the course."""
        held_out = self.inputs.held_out
        return {
            "model": model_name(self.options.model),
            "task": self.inputs.task.name,
            "data": self.inputs.learned.record,
            "evaluation": held_out.record if held_out else None,
            "labels": list(self.inputs.learned.labels) or None,
            "length": self.options.length,
            "batch": self.options.batch,
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


def model_name(model: ModelSource) -> str:
    """What the adapter calls its base: a Hub id or a package as it is, a folder by its own name or its Hub id.

    Of a model that was given as an object it is the path or the id that it was loaded from, else its class.
    """
    if isinstance(model, tuple):
        loaded_from = model[0].config.name_or_path
        return model_name(loaded_from) if loaded_from else type(model[0]).__name__
    if not Path(model).exists():
        return str(model)
    folder = Path(model).resolve()
    cache = folder.parent.parent.name  # models--org--name/snapshots/…
    hub = folder.parent.name == "snapshots" and cache.startswith("models--")
    return cache.removeprefix("models--").replace("--", "/", 1) if hub else folder.name


def _digest_of_model(model: "nn.Module") -> str:
    """SHA-256 of the weights of a model, in hexadecimal, their names and dtypes included."""
    import torch

    digest = sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
