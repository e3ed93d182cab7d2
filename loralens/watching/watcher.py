"""`Watcher`: measures an adapter every so many steps and logs the numbers; and its callback for Lightning."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from math import hypot, isfinite, nan
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, final

from loralens.analysis.spectrum import Spectrum, mean_effective_rank, total_norm
from loralens.choices import Side
from loralens.core.adapter import Adapter
from loralens.core.lowrank import LowRank
from loralens.core.messages import warn
from loralens.core.names import kind
from loralens.core.selection import select
from loralens.core.threads import in_threads, processor_count, single_blas_thread
from loralens.errors import FormatError, OptionError
from loralens.exports import Options, takes_options
from loralens.formats import save
from loralens.formats.files.json_text import finite_number
from loralens.formats.records.training import WATCHED, LoggedModule, LoggedSnapshot, WatchLog, read_watch_log
from loralens.requirements import missing_packages
from loralens.watching.snapshots import (
    Health,
    HealthWarning,
    Memory,
    ModuleSnapshot,
    defined_mean,
    measure_module,
    remember_start,
    short_number,
)

if TYPE_CHECKING:
    from torch import nn

    from loralens.training.injection import Injection


SIDES: tuple[Side, ...] = ("in", "out")


@final
@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot: what a watcher has measured after a step.

    Attributes
    ----------
    step : int
        The number of steps done.
    modules : mapping of str to ModuleSnapshot
        The measures of every module whose factors are finite.
    warnings : tuple of HealthWarning
        The warnings that this snapshot gives for the first time.
    seconds : float
        The time that the measuring took.
    loss, gradient_norm : float
        The means over the steps since the last snapshot; NaN if the watcher is not given these numbers.
    """

    step: int
    modules: Mapping[str, ModuleSnapshot]
    warnings: tuple[HealthWarning, ...]
    seconds: float
    loss: float = nan
    gradient_norm: float = nan

    @property
    def total(self) -> dict[str, float]:
        """Measures of the whole adapter, NaN where they are not defined.

        ``frobenius`` is ‖ΔW‖_F and ``spectral`` the largest σ₁; ``effective_rank``, ``drift`` and the φ and chance
        levels of both sides are means over the modules. ``step_length`` is ‖ΔW − ΔW of the last snapshot‖_F, and
        ``previous_cosine`` and ``first_cosine`` are the cosines of the whole updates.
        """
        snapshots = list(self.modules.values())
        totals = {
            "frobenius": total_norm(snapshot.spectrum for snapshot in snapshots),
            "spectral": max((snapshot.spectrum.spectral for snapshot in snapshots), default=0.0),
            "effective_rank": mean_effective_rank(snapshot.spectrum for snapshot in snapshots),
            "drift": defined_mean(snapshot.drift for snapshot in snapshots),
        }
        for name in ("previous", "first"):
            turns = [(snapshot, turn) for snapshot in snapshots if (turn := getattr(snapshot, name)) is not None]
            before, now = hypot(*(turn.norm for _, turn in turns)), totals["frobenius"]
            inner = sum(turn.cosine * turn.norm * snapshot.spectrum.frobenius for snapshot, turn in turns)
            totals[f"{name}_cosine"] = inner / (before * now) if before and now else nan
            if name == "previous":
                totals["step_length"] = hypot(*(turn.length for _, turn in turns)) if turns else nan
            for side in SIDES:
                totals[f"{name}_phi_{side}"] = defined_mean(turn.phi[side] for _, turn in turns)
                totals[f"{name}_chance_{side}"] = defined_mean(turn.chance[side] for _, turn in turns)
        for name in ("B", "A"):
            gradients = [snapshot.gradients[name] for snapshot in snapshots if name in snapshot.gradients]
            if gradients:
                totals[f"gradient_{name}_norm"] = hypot(*(gradient.norm for gradient in gradients))
                totals[f"gradient_{name}_overlap"] = defined_mean(gradient.overlap for gradient in gradients)
        return totals

    @property
    def scalars(self) -> dict[str, float]:
        """The measures of the whole adapter as a trainer logs them: ``lora/frobenius`` …"""
        numbers = {f"lora/{name}": value for name, value in self.total.items() if isfinite(value)}
        return {**numbers, "lora/warnings": float(len(self.warnings))}

    def record(self) -> dict[str, Any]:
        """The snapshot as a line of the log."""
        return {
            "step": self.step,
            "seconds": round(self.seconds, 3),
            **{
                name: short_number(value)
                for name in ("loss", "gradient_norm")
                if isfinite(value := getattr(self, name))
            },
            "total": {name: short_number(value) for name, value in self.total.items()},
            "warnings": [warning.record() for warning in self.warnings],
            "modules": {name: snapshot.record() for name, snapshot in self.modules.items()},
        }


@final
@dataclass(frozen=True)
class WatcherOptions(Options):
    """What a `Watcher` measures, and who is told. Watchers and callbacks take the fields as keywords.

    Parameters
    ----------
    adapter : str, optional
        The name of one of PEFT's adapters; by default the active one.
    modules : sequence of str
        Only modules whose name or kind matches one of these glob patterns.
    every_module : int
        Measure only every k-th module of each kind, spread over the blocks. A snapshot then takes a k-th of the time.
    gradients : bool
        Also measure the gradients of B and A, which must be there when `step` is called: before ``zero_grad``. This
        needs a model.
    keep : path, optional
        A folder in which the adapter of every snapshot is saved as ``checkpoint-N``. From these ``loralens trajectory``
        compares every snapshot with the last one.
    on_warning : callable, optional
        Called with every `HealthWarning`; by default they are logged by the logger ``loralens``.
    on_sync : callable, optional
        Called by `Watcher.synced` with the step and the adapter; what it returns is written to the log.
        `loralens.SyncCheck` asks a server whether it has the adapter.
    threads : int, optional
        Modules measured at a time, by default one for each processor.
    """

    adapter: str | None = None
    modules: Sequence[str] = ()
    every_module: int = 1
    gradients: bool = False
    keep: str | PathLike[str] | None = None
    on_warning: Callable[[HealthWarning], None] | None = None
    on_sync: Callable[[int, Adapter], Mapping[str, Any]] | None = None
    threads: int | None = None


class Watcher:
    """Measures the adapter of a model every so many steps.

    It measures every module (`loralens.watching.snapshots.ModuleSnapshot`), writes a line to a log, and warns if the
    run goes wrong (`loralens.watching.snapshots.WARNINGS`).

    Parameters
    ----------
    model : nn.Module or Injection, optional
        A model that `loralens.live` takes. `loralens.training.fit` gives its own to a watcher in ``Watch(watcher=…)``.
        Without any, adapters are given to `look`.
    every : int
        `step` takes a snapshot after so many steps.
    log : path, optional
        The file for JSON lines, which ``loralens trajectory`` reads.
    options : WatcherOptions
        What is measured, and who is told. Its fields are given as keywords.
    start : int
        The number of steps that were done before. A watcher of a model takes a snapshot when it is made, to know the
        first A.
    resume : bool
        Add to a log that exists. Signs that it reports are not reported again. Directions are compared with those of
        the first snapshot of this process.

    Raises
    ------
    OptionError
        The model has no adapter, or several that are active and no name; ``every`` is not a whole number of 1 or more;
        the log exists.

    Notes
    -----
    A watcher keeps float32 copies of the first A, and of the directions of the first and last snapshot: about 2.5
    times the numbers of the adapter. If there are several processes, the first one measures and writes. If the model is
    sharded, all processes must call `step`, since gathering a factor takes all of them.
    """

    @takes_options
    def __init__(
        self,
        model: "nn.Module | Injection | None" = None,
        *,
        every: int = 1,
        log: str | PathLike[str] | None = None,
        options: WatcherOptions,
        start: int = 0,
        resume: bool = False,
    ) -> None:
        for name, value in {"every": every, "every_module": options.every_module}.items():
            if type(value) is not int or value < 1:
                raise OptionError(f"{name} {value!r} is not a whole number of 1 or more", fix="give 1, 50 …")
        self.every = every
        self.last: Snapshot | None = None
        self._options, self._threads = options, options.threads
        self._log_path, self._resume = None if log is None else Path(log), resume
        self._memory: dict[str, Memory] = {}
        self._health = Health()
        self._log: WatchLog | None = None
        self._steps, self._writes = start, True
        self._view: Adapter | None = None
        self._gradients: Adapter | None = None
        if model is not None:
            self.watch(model)
            self.begin(start)

    def watch(self, model: "nn.Module | Injection") -> None:
        """Watch a model from now on: measure the size of the adapted weights, and remember A as the first one.

        The constructor does this for the model that it is given, and so does `loralens.training.fit`.
        """
        from loralens.training.injection import Injection
        from loralens.training.world import World
        from loralens.watching.view import (
            is_sharded,
            live,
            live_gradients,
            one_active,
            peft_model,
            trains_A,
            weigh,
        )

        adapter = self._options.adapter
        wrapped = None if adapter is not None or isinstance(model, Injection) else peft_model(model)
        # The sum of several adapters would be computed once, and would not follow the training.
        adapter = adapter if wrapped is None else one_active(wrapped)
        self._view = live(model, adapter)
        self._gradients = live_gradients(model, adapter) if self._options.gradients else None
        self._health = Health(weigh(model, self._view), frozen=not trains_A(model))
        self._writes = World.current().main
        # With several threads, each process would gather the factors in another order.
        if is_sharded(model):
            self._threads = 1
        for name in self._chosen(self._view):
            remember_start(self._view[name], self._memory.setdefault(name, Memory()))

    def begin(self, step: int) -> Snapshot:
        """Take the first snapshot, after ``step`` steps of earlier processes. The log never gets a snapshot twice."""
        logged: list[LoggedSnapshot] = []
        # Only the process that writes the log reads it, and only if the run goes on.
        if self._resume and self._writes and self._log_path is not None and self._log_path.exists():
            logged = read_watch_log(self._log_path)
        for past in logged:
            if past.step < step:
                self._health.losses.add(nan if past.loss is None else past.loss)
                self._health.gradients.add(nan if past.gradient_norm is None else past.gradient_norm)
                self._health.check(past.step, {name: _logged_measures(module) for name, module in past.modules.items()})
            if past.step <= step:
                self._health.mark_as_reported(str(warning["code"]) for warning in past.warnings)
        return self._take(step, self._view, write=all(past.step != step for past in logged))

    def step(self, *, final: bool = False, loss: Any = None, gradient_norm: Any = None) -> Snapshot | None:
        """Count one step of the optimiser, and take a snapshot if it is time or if the step is the last.

        Call it after ``optimizer.step()``, and before ``zero_grad()`` if gradients are watched. ``loss`` and
        ``gradient_norm`` are as for `hear`.
        """
        self.hear(loss, gradient_norm)
        self._steps += 1
        return self.look(self._steps) if final or self._steps % self.every == 0 else None

    def hear(self, loss: Any = None, gradient_norm: Any = None) -> None:
        """Note the loss of a step and the norm of its gradient before clipping, by which divergence is recognised.

        Parameters
        ----------
        loss, gradient_norm : float or tensor of one number, optional
            A tensor is read at the next snapshot.
        """
        for curve, value in ((self._health.losses, loss), (self._health.gradients, gradient_norm)):
            if value is not None:
                # The norm of sharded gradients is sharded too.
                value = getattr(value, "full_tensor", lambda value=value: value)()
                curve.add(getattr(value, "detach", lambda value=value: value)())

    def look(self, step: int, adapter: Adapter | None = None) -> Snapshot:
        """Take a snapshot now.

        Parameters
        ----------
        step : int
            The number of steps done.
        adapter : Adapter, optional
            The adapter at this step, if the watcher has no model.
        """
        return self._take(step, adapter if adapter is not None else self._view)

    def synced(self, adapter: Adapter | None = None) -> Mapping[str, Any] | None:
        """Say that the adapter has been pushed to a server: ``on_sync`` checks it, and its answer goes to the log.

        Only the process that writes the log does so, which must be able to read the adapter alone.
        """
        view = self._view if adapter is None else adapter
        if view is None or self._options.on_sync is None:
            raise OptionError("there is nothing to check", fix="give on_sync to Watcher(…), and a model or an adapter")
        if not self._writes:
            return None
        found = self._options.on_sync(self._steps, view)
        self._add_line(view, {"step": self._steps, "served": dict(found)})
        return found

    def _add_line(self, view: Adapter, record: Mapping[str, Any]) -> None:
        if self._log_path is not None:
            if self._log is None:
                self._log = WatchLog(self._log_path, self._header(view), resume=self._resume)
            self._log.write(record)

    def _take(self, step: int, view: Adapter | None, *, write: bool = True) -> Snapshot:
        """Take a snapshot, and with ``write`` write it to the log."""
        begun = perf_counter()
        if view is None:
            raise OptionError(
                "there is no adapter to measure", fix="give a model to Watcher(…), or an adapter to look(…)"
            )
        if self._options.gradients and self._gradients is None:
            raise OptionError("gradients need a model", fix="give the model, or leave gradients out")
        self._steps = step
        names = self._chosen(view)
        broken: list[str] = []

        def measure(name: str) -> ModuleSnapshot | None:
            gradient = self._gradients.modules.get(name) if self._gradients else None
            memory = self._memory.setdefault(name, Memory())
            try:
                return measure_module(view[name], memory, gradient if isinstance(gradient, LowRank) else None)
            except FormatError:
                broken.append(name)
                return None

        with single_blas_thread():
            threads = processor_count() if self._threads is None else self._threads
            measured = in_threads(measure, names, threads)
        snapshots = {name: snapshot for name, snapshot in measured.items() if snapshot is not None}
        warnings = self._health.check(step, snapshots)
        if broken and (warning := self._health.warn_not_finite(step, min(broken))):
            warnings.append(warning)
        health = self._health
        self.last = Snapshot(
            step, snapshots, tuple(warnings), perf_counter() - begun, loss=health.loss, gradient_norm=health.gradient
        )
        self._write(view, self.last, log=write)
        return self.last

    def _write(self, view: Adapter, snapshot: Snapshot, *, log: bool) -> None:
        """Write the snapshot to the log if ``log`` is true, save its adapter, and report its warnings."""
        if not self._writes:
            return
        if log:
            self._add_line(view, snapshot.record())
        if self._options.keep is not None:
            save(view, Path(self._options.keep) / f"checkpoint-{snapshot.step}", overwrite=True)
        for warning in snapshot.warnings:
            if self._options.on_warning is None:
                warn(f"step {warning.step}: {warning.text}", warning.fix)
            else:
                self._options.on_warning(warning)

    def _chosen(self, view: Adapter) -> list[str]:
        """The modules to measure. Of each kind every k-th is chosen; the kinds begin at different blocks."""
        names = select(view, self._options.modules)
        kinds = list(dict.fromkeys(kind(name) for name in names))
        turns = {each: count(-place) for place, each in enumerate(kinds)}
        return [name for name in names if next(turns[kind(name)]) % self._options.every_module == 0]

    def _header(self, view: Adapter) -> dict[str, Any]:
        modules = {
            name: {"shape": list(view[name].shape), "rank": view[name].rank, "dtype": str(view[name].dtype)}
            for name in self._chosen(view)
        }
        return {
            "every": self.every,
            "base": view.base_model,
            "gradients": self._gradients is not None,
            "modules": modules,
        }


def _logged_measures(module: LoggedModule) -> ModuleSnapshot:
    """The part of a logged module by which the health of a run is judged."""
    drift = finite_number(module.measures.get("drift"))
    spectrum = Spectrum(module.s, module.shape, module.rank)
    return ModuleSnapshot(spectrum, None, None, nan if drift is None else drift, {})


def watcher_of(
    model: Any, options: WatcherOptions, *, every: int, log: str | PathLike[str] | None, folder: Any, done: int
) -> Watcher:
    """The watcher of a trainer that has done so many steps.

    Its log is that which was asked for, else ``watch.jsonl`` in the folder of the trainer. If that is there and the run
    is not resumed, it is the first of ``watch-2.jsonl``, ``watch-3.jsonl`` … that is free.
    """
    path = Path(folder) / WATCHED if log is None else Path(log)
    number, free = 2, path
    while log is None and not done and free.exists():
        free, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
    return Watcher(model, every=every, log=free, start=done, resume=done > 0 and free.exists(), **vars(options))


# The two packages of Lightning. A callback has to come from the package whose trainer runs.
PACKAGES = ("lightning.pytorch", "pytorch_lightning")


@takes_options
def lightning_callback(every: int = 50, *, log: str | PathLike[str] | None = None, options: WatcherOptions) -> Any:
    """A callback for Lightning's ``Trainer(callbacks=[…])`` that measures the adapter in its LightningModule.

    The numbers ``lora/frobenius``, ``lora/effective_rank`` … go to the loggers of the trainer.

    Parameters
    ----------
    every : int
        Steps of the optimiser between two snapshots. The first is before the first step, and the last at the end.
    log : path, optional
        The file of the log; by default ``watch.jsonl`` in the folder of the trainer's logger.
    options : WatcherOptions
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
    callback: Any = type("SpectralCallback", (_LightningMethods, base), {})
    return callback(every, log, options)


class _LightningMethods:
    """The methods that Lightning calls."""

    def __init__(self, every: int, log: str | PathLike[str] | None, options: WatcherOptions) -> None:
        super().__init__()
        # Lightning sets the attribute `log` of every callback.
        self.every, self.log_file, self.options = every, log, options
        self.watcher: Watcher | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the watcher, which takes the first snapshot."""
        folder, done = trainer.log_dir or trainer.default_root_dir, trainer.global_step
        own = {"every": self.every, "log": self.log_file, "folder": folder, "done": done}
        self.watcher = watcher_of(pl_module, self.options, **own)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Note the norm of the gradient, which is clipped after this."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.watcher is not None and gradients:
            norms = [gradient.norm() for gradient in gradients]
            self.watcher.hear(gradient_norm=sum(norm.square() for norm in norms) ** 0.5)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take a snapshot, while the gradients are still there: Lightning sets them to 0 before the next batch."""
        watcher, step = self.watcher, trainer.global_step
        if watcher is not None:
            watcher.hear(loss=outputs["loss"] if isinstance(outputs, Mapping) else outputs)
        # With accumulated gradients several batches belong to one step.
        if watcher is None or step % self.every or (watcher.last is not None and watcher.last.step == step):
            return
        pl_module.log_dict(watcher.look(step).scalars)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the last snapshot."""
        watcher, step = self.watcher, trainer.global_step
        if watcher is not None and (watcher.last is None or watcher.last.step != step):
            watcher.look(step)
