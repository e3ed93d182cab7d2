"""One training run: from options to a finished folder, or an unfinished one that can go on."""

from collections.abc import Mapping
from functools import cached_property
from math import ceil, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralens.cli.models import device_of
from loralens.cli.record import known
from loralens.cli.target import refuse_inputs
from loralens.cli.terminal import say
from loralens.cli.train_divergence import explained
from loralens.cli.train_inputs import Inputs, inputs
from loralens.cli.train_report import plan, result
from loralens.cli.train_show import Line, Spectra, measured, spectra_said
from loralens.errors import DivergenceError, LoraLensError, OptionError, place
from loralens.formats.files.location import NAMES, existing
from loralens.formats.files.trial import check_place
from loralens.formats.models.base_digest import base_digest
from loralens.formats.records.training import LOG, Training
from loralens.formats.records.training_log import history

if TYPE_CHECKING:
    from loralens.core.adapter import Adapter
    from loralens.core.training import State
    from loralens.training.course import Course
    from loralens.training.fitting import Fitted
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
LARGEST = 3.4e38  # in float32


def train(**given: Any) -> None:
    """Run ``loralens train`` with the options that it was given."""
    training = Training(given["output"])
    if not given["resume"]:
        training.check(overwrite=given["overwrite"])
        check_place(given["output"])
    for folder in (training.target, training.folder):
        refuse_inputs(folder, _places(given))
    _check_alpha(given["alpha"])
    device = device_of(given["device"])
    from loralens.training.world import joined, local_device

    device = local_device(device)
    with joined(device) as world:
        run = Run(given, inputs(given, device=str(device)), training, world)
        try:
            run.rehearse() if given["dry_run"] else run.train()
        finally:
            training.release()


def _places(given: Mapping[str, Any]) -> dict[str, str | None]:
    """What is read, in words and where it is; a Hub id, a package and the name of a corpus are no places."""
    inputs = {"the model": given["model"], "the texts": given["data"], "the texts to evaluate on": given["evaluation"]}
    return {what: path for what, path in inputs.items() if path and Path(path).exists()}


class Run:
    """A run with its files and its line on the screen.

    Parameters
    ----------
    given : dict
        The options of the command.
    made : Inputs
    training : Training
    world : World
    """

    def __init__(self, given: dict[str, Any], made: Inputs, training: Training, world: "World") -> None:
        self.given, self.made, self.training, self.world = given, made, training, world
        self.steps = self._steps()
        self.line = Line(self.steps)
        self.heads = given["heads"] or made.heads
        if given["heads"]:
            self._warn_of_random_weights()
        self.spectra = Spectra(given["model"]) if given["spectra"] else None
        if given["spectra"] and not given["snapshots"]:
            raise OptionError("--spectra looks at snapshots", fix="say how often: --snapshots N")
        if self.spectra:
            self._check_spectra()
        if world.main:
            made.warn_of_cut()
        self.course, self.watch, self.order = self._course(), self._watch(), self._order()
        self._begun, self._done = bool(given["resume"]), 0

    def _steps(self) -> int:
        """How long the run is, in updates."""
        texts, batch = len(self.made.examples), self.given["batch"]
        epochs = self.given["epochs"]
        if epochs is not None and not 0 < epochs < 1e6:
            raise OptionError(f"--epochs {epochs} is no number of rounds", fix="give a positive number: 1, 0.5")
        return int(self.given["steps"] or max(1, ceil((epochs or 1) * texts / batch)))

    def _warn_of_random_weights(self) -> None:
        """Say which weights neither the model's folder nor the adapter will have, by these heads."""
        from loralens.training.targets import heads_named

        tops = heads_named(self.made.loaded.model, self.heads)
        random = [key for key in self.made.loaded.made if not any(key.startswith(f"{top}.") for top in tops)]
        if random and self.world.main:
            where = random[0].rpartition(".")[0]
            say(f"warning: {where} is new and random, and the adapter will not hold it", err=True)
            say(f"  fix: --heads {','.join((*self.heads, where))}", err=True)

    def _check_spectra(self) -> None:
        """Refuse now what the first snapshot would: weights that cannot be read, or are not there."""
        from loralens.cli.options import base_weights
        from loralens.training.injection import inject
        from loralens.training.readout import read

        injection = inject(self.made.loaded.model, **{**self._injected, "method": "lora"})
        try:
            modules = read(injection).modules
        finally:
            injection.remove()
        with place("--spectra"):
            base_weights(self.given["model"], modules)

    @property
    def part(self) -> int:
        """Texts that one process takes at a time."""
        parts = self.given["accumulate"] * self.world.size
        if self.given["batch"] % parts:
            raise OptionError(
                f"a batch of {self.given['batch']} cannot be cut into {parts} equal parts",
                fix=f"give a --batch that is a multiple of --accumulate times the number of processes, {parts}",
            )
        return int(self.given["batch"] // parts)

    @property
    def identity(self) -> dict[str, Any]:
        """What the run is; two runs with the same are one."""
        held_out = self.made.held_out
        said = {name: _plain(self.given[name]) for name in DECIDING}
        return said | {
            "model": _name(self.given["model"]),
            "base": self._base,
            "steps": self.steps,
            "heads": list(self.heads),
            "data": self.made.learned.record,
            "evaluation": held_out.record if held_out else None,
            "processes": self.world.size,
        }

    @cached_property
    def _base(self) -> str:
        """A digest of the base's files, so that other weights under the same name are another run."""
        return base_digest(existing(Path(self.given["model"])))

    def rehearse(self) -> None:
        """Say what would be trained, and write nothing."""
        from loralens.training.injection import inject

        injection = inject(self.made.loaded.model, **self._injected)
        if self.world.main:
            plan(injection, self.identity | self._cut, output=self.given["output"], as_json=self.given["as_json"])
        injection.remove()

    def train(self) -> None:
        """Train, and leave the finished folder."""
        state = None
        if self.given["resume"]:
            state = self.world.from_main(lambda: self.training.go_on(self.identity))
            self._done = state.step if state else 0
            self._say(f"going on after step {self._done}")
            if self.spectra and self.world.main and self.training.snapshots:
                self.spectra.remember(*self.training.snapshots[-1])
        fitted = self._fitted(state)
        self.line.clear()
        if self.world.main:
            seen = history(self.training.folder / LOG)
            self._finish(fitted.adapter)
            result(fitted, seen, self._cut, output=self.given["output"], as_json=self.given["as_json"])

    def _finish(self, adapter: "Adapter") -> None:
        try:
            self.training.finish(adapter)
        except LoraLensError:
            if (self.training.folder / NAMES[0]).exists():
                self._say(f"the run is done; {self.training.folder} holds the finished adapter")
            raise

    @property
    def _cut(self) -> dict[str, Any]:
        """What was left out of the texts, as JSON."""
        cut = self.made.evaluation_cut
        return {"cut": self.made.cut.record(), "evaluation_cut": cut.record() if cut else None}

    @property
    def _injected(self) -> dict[str, Any]:
        names = ("rank", "alpha", "method", "dropout", "seed")
        targets = self.given["targets"]
        return {
            "targets": "all-linear" if targets == ("all-linear",) else list(targets),
            "heads": list(self.heads),
            **{name: self.given[name] for name in names},
        }

    def _course(self) -> "Course":
        from loralens.training.course import Course

        names = ("lr", "optimiser", "weight_decay", "schedule", "warmup", "accumulate", "clip", "base_dropout")
        more = {name: self.given[name] for name in (*names, "checkpointing")}
        return Course(self.steps, **more)

    def _order(self) -> "Order":
        from loralens.training.feed import shuffled

        return shuffled(len(self.made.examples), size=self.part, seed=self.given["seed"])

    def _fitted(self, state: "State | None") -> "Fitted":
        from loralens.training.fitting import fit

        given, made = self.given, self.made
        try:
            return fit(
                made.loaded.model,
                made.task.batches(made.examples, self.order, seed=given["seed"]),
                course=self.course,
                loss=made.task.loss,
                watch=self.watch,
                state=state,
                shard=given["shard"],
                base_model=_name(given["model"]),
                task_type=made.task.task_type,
                record=self._record(),
                **self._injected,
            )
        except DivergenceError as error:
            if not self.world.main:  # all processes see the same; one says it
                raise SystemExit(1) from error
            many = given["accumulate"] * self.world.size
            texts = [text for number in range(many) for text in self.order(self._done * many + number)]
            training = self.training if self._begun else None
            raise explained(error, texts=texts, name=made.learned.name, training=training, done=self._done) from error
        except (KeyboardInterrupt, LoraLensError) as error:  # stopped by the user, by a full disk …
            if self._begun or isinstance(error, KeyboardInterrupt):
                self._say(f"stopped after step {self._done}; {self._left()}")
            raise
        finally:
            self.line.clear()

    def _watch(self) -> "Watch":
        from loralens.training.watch import Watch

        given, evaluated = self.given, self.made.evaluated
        evaluate = self.made.task.evaluation(evaluated, size=EVALUATED) if evaluated is not None else None
        for option in ("patience", "evaluate_every", "eval_limit"):
            if given[option] and evaluate is None:
                raise OptionError(f"--{option.replace('_', '-')} needs texts to evaluate on", fix="give --eval")
        if given["patience"] and not given["evaluate_every"]:
            raise OptionError("--patience counts evaluations on the way", fix="say how often: --evaluate-every N")
        return Watch(
            on_step=self._step,
            evaluate=evaluate,
            on_evaluation=self._evaluation,
            evaluate_every=given["evaluate_every"] or 0,
            patience=given["patience"],
            snapshot=self._snapshot if given["snapshots"] else None,
            snapshot_every=given["snapshots"] or 0,
            save=self.training.save,
            save_every=given["save_every"],
        )

    def _log(self, step: int, **seen: Any) -> None:
        """A line of the log; the first one makes the folder, so that a run that cannot begin leaves nothing."""
        if not self._begun:
            self.training.begin(self.identity, overwrite=self.given["overwrite"])
            self._begun = True
        self.training.log({"step": step, **seen})

    def _step(self, step: "Step") -> None:
        self._done = step.number
        said = step._asdict() | {"loss": known(step.loss)}  # of a step that asked nothing there is none
        self._log(step.number, **{name: value for name, value in said.items() if name != "number"})
        self.line.step(step)

    def _evaluation(self, step: int, measures: "Measures") -> None:
        self._log(step, evaluation={name: known(value) for name, value in measures.items()})
        self.line.say(measured(step, measures))

    def _snapshot(self, step: int, adapter: "Adapter") -> None:
        self.training.snapshot(step, adapter)
        if self.spectra:
            seen = self.spectra.look(step, adapter)
            self._log(step, spectra={name: known(value) for name, value in seen.items()})
            self.line.say(spectra_said(step, seen))

    def _record(self) -> dict[str, Any]:
        """What the adapter's metadata says of the data, beside what `fit` says of the course."""
        held_out = self.made.held_out
        return {
            "model": _name(self.given["model"]),
            "task": self.made.task.name,
            "data": self.made.learned.record,
            "evaluation": held_out.record if held_out else None,
            "labels": list(self.made.learned.labels) or None,
            "length": self.given["length"],
            "batch": self.given["batch"],
        }

    def _left(self) -> str:
        if not self._begun:
            return "nothing was written"
        if self.training.saved:
            return f"{self.training.folder} holds the last state, and --resume goes on from there"
        return f"{self.training.folder} holds the log; no state had been saved, so --resume begins anew"

    def _say(self, text: str) -> None:
        if self.world.main:
            self.line.say(text)


def _check_alpha(alpha: float) -> None:
    """Refuse an α that float32 cannot hold."""
    if isfinite(alpha) and abs(alpha) > LARGEST:
        raise OptionError(f"--alpha {alpha:g} is more than float32 holds", fix="give a number like the rank: 16, 32")


def _name(model: str) -> str:
    """What the adapter calls its base: a Hub id or a package as it is, a folder by its own name or its Hub id."""
    if not Path(model).exists():
        return model
    folder = Path(model).resolve()
    cache = folder.parent.parent.name  # models--org--name/snapshots/…
    hub = folder.parent.name == "snapshots" and cache.startswith("models--")
    return cache.removeprefix("models--").replace("--", "/", 1) if hub else folder.name


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
