"""A grid of training runs in one folder: makes the runs that are missing, and the table ``runs.csv`` of all runs.

==================== ===============================================================================================
``NAME/``            the finished run of that name, as ``loralens train`` writes it; its ``run.json`` has its settings
``NAME.unfinished/`` a run that was interrupted or has diverged
``runs.csv``         a row for each of these: settings and results, read from their folders
==================== ===============================================================================================
"""

import logging
import os
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple, final

from loralens.core.adapter import Adapter
from loralens.core.fingerprint import fingerprint
from loralens.core.messages import LOGGER, note
from loralens.core.names import natural_key
from loralens.core.processes import ProcessKilled, perform_in_processes
from loralens.core.stored import record_of
from loralens.core.threads import processor_count
from loralens.errors import DivergenceError, LoraLensError, MismatchError, OptionError, place
from loralens.formats import load
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.disk import Hold, disk_errors
from loralens.formats.files.json_text import finite_number
from loralens.formats.files.location import NAMES
from loralens.formats.files.outside import read_whole
from loralens.formats.records.training import (
    LOG,
    RUN,
    UNFINISHED,
    grid_record,
    grid_runs,
    history,
    is_finished,
    log_entries,
)
from loralens.tables.numbers import count, number
from loralens.tables.render import csv_text
from loralens.tables.result import ResultSequence
from loralens.tables.table import ALWAYS, Column, Keys, Table, rows_key
from loralens.verbs.models.models import model_name, restore_settings
from loralens.verbs.models.texts import text_label
from loralens.verbs.runs.grid_axes import WHOLE, Grid, GridPoint, grid_points, spell, value_text
from loralens.verbs.runs.run_display import naming_runs
from loralens.verbs.runs.train_adapter import train_adapter
from loralens.verbs.runs.training_inputs import TrainingInputs, digest_of_base, read_training_inputs
from loralens.verbs.runs.training_options import TrainingOptions, fill_in
from loralens.verbs.runs.training_result import TrainPlan
from loralens.verbs.shared.adapters import load_source
from loralens.verbs.shared.options import Reading, check_counts

RUNS = "runs.csv"
# Options of a single run, which mean nothing for a grid, with the advice against each.
SINGLE = {"resume": "a grid goes on by itself", "more_steps": "train more steps of single runs", "shard": ""}
# The options that decide about the inputs of a run.
INPUTS = ("model", "task", "dtype", "data", "eval", "eval_limit", "length", "mask_prompt", "pack", "backend")
TEXTS = ("data", "eval")
COUNTS = ("trainable", "frozen")  # the numbers of parameters in the record of a run
DIGITS = 12  # of a digest of texts, 48 bits
TAIL = 0.1  # the share of the steps over which `loss_tail` is the mean
# Seconds in which a run that is told to stop may finish its step and save its state. A step of a large model on a CPU
# takes that long. A run that is killed after this time goes on from the state before.
GRACE = 60.0

Status = Literal["done", "diverged", "unfinished", "missing"]


@final
@dataclass(frozen=True, slots=True)
class GridRun:
    """One run of a grid.

    Attributes
    ----------
    name : str
        The values of the axes; also the name of its folder.
    output : Path
        Its folder, which exists if it is done.
    settings : mapping of str to value
        Every option that decides about its numbers, as JSON holds them.
    status : str
        ``done``, ``diverged``, ``unfinished`` or ``missing``.
    results : mapping of str to number
        The results, by the names of the columns of ``runs.csv``; empty unless it is done or has diverged.
    message : str
        Why it has diverged.
    """

    name: str
    output: Path
    settings: Mapping[str, Any]
    status: Status
    results: Mapping[str, Any]
    message: str = ""

    @property
    def adapter(self) -> Adapter:
        """The adapter of the run, read from its folder."""
        return load(self.output)

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines of its log: every step and evaluation."""
        return log_entries((self.output if self.status == "done" else _unfinished(self.output)) / LOG)


@dataclass(frozen=True, slots=True, repr=False)
class GridResult(ResultSequence[GridRun]):
    """The runs of a grid, where the last axis varies fastest; the result is a sequence of them.

    ``runs.csv`` in the folder has them too, beside those of other grids in the same folder.

    Attributes
    ----------
    output : Path
        The folder of the grid.
    runs : sequence of GridRun
    axes : tuple of str
        The options that differ between the runs.
    trained : int
        The number of runs that were made now, or would be made after a dry run.
    dry : bool
        Whether nothing was trained because only the plan was asked for.
    """

    contents = "runs"

    output: Path
    runs: Sequence[GridRun]
    axes: tuple[str, ...]
    trained: int
    dry: bool = False

    @property
    def main(self) -> bool:
        """Whether this process reports; a grid has one."""
        return True

    def where(self, **settings: Any) -> list[GridRun]:
        """The runs that have these settings: ``result.where(rank=8, seed=0)``."""
        asked = [(name, _plain(value)) for name, value in settings.items()]
        return [run for run in self.runs if all(_plain(run.settings.get(name)) == value for name, value in asked)]

    def tables(self) -> list[Table[GridRun]]:
        """The runs with the values of the axes and the main results."""
        axes = [Column(name, _setting(name), name.replace("_", " "), value_text, priority=ALWAYS) for name in self.axes]
        results = [
            Column(key, _result(key), key.replace("_", " "), _number, priority=2 if key.startswith("eval_") else 1)
            for key in _keys(run.results for run in self.runs)
            if key in ("trainable", "loss_tail") or key.startswith("eval_")
        ]
        status: Column[GridRun] = Column("status", "status", "status", align="left", priority=ALWAYS)
        return [Table("runs", (*axes, *results, status), self.runs)]

    def listing(self) -> list[Table[GridRun]]:
        """The runs with all settings and results: the content of ``runs.csv``."""
        columns: list[Column[GridRun]] = [
            Column("run", "name"),
            Column("status"),
            *(Column(key, _setting(key)) for key in _keys(run.settings for run in self.runs)),
            *(Column(key, _result(key)) for key in _keys(run.results for run in self.runs)),
            Column("message"),
        ]
        return [Table("runs", columns, self.runs)]

    def conclusion(self) -> list[str]:
        """How many runs there are, and how many of them were made now."""
        if self.dry:
            return [f"{self.output}: {count(len(self.runs), 'run')}, of which {self.trained} would be trained."]
        statuses = Counter(run.status for run in self.runs)
        before = len(self.runs) - self.trained
        earlier = f", {before} of them before" if before else ""
        lines = [f"{self.output}: {count(statuses['done'], 'run')} done{earlier}; {RUNS} has their results."]
        if statuses["diverged"]:
            lines.append(f"{count(statuses['diverged'], 'run')} diverged: the loss is no longer finite.")
        return lines

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        columns: list[Column[GridRun]] = [
            Column("run", "name"),
            *map(Column, ("status", "settings", "results", "message")),
        ]
        return (Column("target", "output"), "axes", "trained", rows_key("runs", columns))


def _keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _setting(name: str) -> Any:
    return lambda run: run.settings.get(name)


def _result(name: str) -> Any:
    return lambda run: run.results.get(name)


def _number(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) else number(value)


def _plain(value: Any) -> Any:
    """A value as JSON holds it: a number, or the text of ``--grid``."""
    return value if value is None or isinstance(value, bool | int | float) else value_text(value)


# ---- The grid


class GridTask(NamedTuple):
    """A run that is to be made: its name, its options, and what is recorded of it in its folder."""

    name: str
    options: TrainingOptions
    record: Mapping[str, Any]


def train_grid(options: TrainingOptions, grid: Grid, *, jobs: int | None, demo: bool) -> GridResult:
    """Make the runs of a grid that are missing in its folder.

    Parameters
    ----------
    options : TrainingOptions
        Those of all runs; what differs from its default cannot be an axis.
    grid : str, mapping, or sequence of these
        The axes, see `loralens.verbs.runs.grid_axes.grid_points`.
    jobs : int, optional
        The number of runs at a time, 1 by default.
    demo : bool
        Whether the demo fills in what was left out.

    Raises
    ------
    OptionError
        An axis or a value is not allowed; the message names the run. Nothing has been trained.
    MismatchError
        The folder has a run of the same name with other settings.
    """
    check_counts(jobs=jobs)
    folder, dry = _check_options(options), options.dry_run
    fixed = {field.name for field in fields(options) if getattr(options, field.name) != field.default}
    points = grid_points(grid, fixed)
    planned = _plan(options, folder, points, demo=demo)
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{folder}: is a file, but a grid is a folder", fix="choose another folder")
    hold = Hold()
    try:
        if folder.exists() and not dry:
            hold.take(folder)
        runs = _read_runs(folder)
        if not runs and (foreign := next((name for name in (RUNS, RUN, NAMES[0]) if _is_foreign(folder / name)), None)):
            what = f"{folder}: holds {foreign}, which no grid has written there"
            raise OptionError(what, fix="choose another folder")
        asked = [_asked(task, folder, runs, overwrite=options.overwrite) for task in planned]
        missing = [
            task._replace(options=replace(task.options, resume=True, overwrite=False))
            if run.status == "unfinished"
            else task
            for task, run in zip(planned, asked, strict=True)
            if run.status in ("unfinished", "missing")
        ]
        if not dry:
            if missing:
                _make_missing(missing, folder, runs, hold, jobs=jobs or 1)
            _write_table(folder, runs)
            asked = [runs.get(run.name, run) for run in asked]
    finally:
        hold.release()
    axes = tuple(_keys(point.values for point in points))
    return GridResult(folder, asked, axes, len(missing), dry=dry)


def _check_options(options: TrainingOptions) -> Path:
    """The folder of the grid."""
    if options.output is None:
        raise OptionError("missing option '--output'", fix="say where to write the grid (-o FOLDER)")
    for name, fix in SINGLE.items():
        if getattr(options, name):
            option = f"--{spell(name)}"
            raise OptionError(f"--grid and {option} exclude each other", fix=fix or f"leave {option} out")
    # torchrun starts every process with the same command.
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise OptionError("a grid is made by one process, and torchrun has started several", fix="start it without")
    return Path(options.output)


def _plan(options: TrainingOptions, folder: Path, points: Sequence[GridPoint], *, demo: bool) -> list[GridTask]:
    """The runs with their options and settings. Every value that can be checked without the model is checked."""
    if not points:
        raise OptionError("the grid has no axes", fix="give one: --grid rank=1,8")
    # Texts that can be iterated only once are stored for all runs.
    iterators = {name: list(each) for name in TEXTS if hasattr(each := getattr(options, name), "__next__")}
    planned: dict[str, TrainingOptions] = {}
    for point in points:
        with place(point.name):
            own = {**iterators, **point.values, "output": folder / point.name, "dry_run": False}
            planned[point.name] = run = fill_in(replace(options, **own), demo=demo)
            run.check()
    digests: dict[Any, str] = {}
    return [GridTask(name, run, {"settings": _settings(run, digests)}) for name, run in planned.items()]


def _settings(options: TrainingOptions, digests: dict[Any, str]) -> dict[str, Any]:
    """Every option that decides about the numbers of a run, as JSON holds it.

    The model, the texts and the adapters to start from have digests, so that others under the same name are noticed.
    ``digests`` holds them for the next run.
    """
    # Newer options are left out where they are not given, so that a grid of an older release is the same grid.
    left_out = (*WHOLE, *(name for name in ("backend", "trl", "beta") if not getattr(options, name)))
    settings = {n: _plain(getattr(options, n)) for n in options.__dataclass_fields__ if n not in left_out}
    for option, (key, digest_of) in DIGESTS.items():
        if (source := getattr(options, option)) is not None:
            digest = digests.get((option, _identity(source))) or digest_of(source)
            settings[key] = digests[option, _identity(source)] = digest
    settings["model"] = model_name(options.model)
    # The name alone, as in the record of the adapter, since a path means nothing on another machine.
    texts = {name: Path(text_label(source)).name for name in TEXTS if (source := getattr(options, name)) is not None}
    return settings | texts


def _identity(value: Any) -> str:
    """A value as text; an object, such as a model or a list of texts, by what it is and not by what is in it."""
    plain = value is None or isinstance(value, str | int | PathLike)
    return str(value) if plain else f"{type(value).__name__} {id(value)}"


def _digest_of_adapter(source: Any) -> str:
    return fingerprint(load_source(source, Reading(), strict=False))[:DIGITS]


def _digest_of_texts(source: Any) -> str:
    """A digest of texts or of their file; empty for a folder."""
    if isinstance(source, str | PathLike):
        texts = read_whole(Path(source)) if Path(source).is_file() else None
    else:
        texts = repr(list(source)).encode(errors="replace")
    return "" if texts is None else sha256(texts).hexdigest()[:DIGITS]


# The options that have digests, each with the key of its digest.
DIGESTS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "model": ("base", digest_of_base),
    "data": ("data_digest", _digest_of_texts),
    "eval": ("eval_digest", _digest_of_texts),
    "start_from": ("start_from", _digest_of_adapter),
    "first_a": ("first_a", _digest_of_adapter),
}


def _is_foreign(path: Path) -> bool:
    """Whether a file that a grid does not write, or a table of another kind, is in the folder of a grid."""
    return path.exists() and not (path.name == RUNS and read_whole(path).startswith(b"run,status,"))


def _asked(task: GridTask, folder: Path, runs: Mapping[str, GridRun], *, overwrite: bool) -> GridRun:
    """The run of a task as it is in the folder; a missing run if it is not there, or is to be replaced.

    Raises
    ------
    MismatchError
        There is a run of this name with other settings, and ``overwrite`` is false.
    """
    run, settings = runs.get(task.name), task.record["settings"]
    missing = GridRun(task.name, folder / task.name, settings, "missing", {})
    if run is None:
        return missing
    other = [key for key in _keys([run.settings, settings]) if run.settings.get(key) != settings.get(key)]
    # What is done is not made again, so that the command can be repeated.
    if not other and not (overwrite and run.status == "unfinished"):
        return run
    if not overwrite:
        named = (f"{key} is {run.settings.get(key)!r} there, {settings.get(key)!r} here" for key in other[:3])
        fix = "choose another folder, give the option as an axis, or replace these runs: --overwrite"
        raise MismatchError(f"{folder}: {task.name} was made with other settings: {'; '.join(named)}", fix=fix)
    return missing


# ---- The runs in the folder, and their table


def _unfinished(target: Path) -> Path:
    """The folder of a run that is not done."""
    return target.with_name(target.name + UNFINISHED)


def _read_runs(folder: Path) -> dict[str, GridRun]:
    """The runs in a folder by name, in the natural order of their names."""
    names = dict.fromkeys(run.name.removesuffix(UNFINISHED) for run in grid_runs(folder))
    runs = (_read_run(folder / name) for name in names)
    return {run.name: run for run in runs if run is not None}


def _read_run(target: Path) -> GridRun | None:
    """A run from its folder; while it is replaced, the new one."""
    unfinished = _unfinished(target)
    if record := grid_record(unfinished):
        status: Status = "diverged" if "diverged" in record else "unfinished"
    elif is_finished(target) and (record := grid_record(target)):
        status = "done"
    else:
        return None
    results: dict[str, Any] = {}
    if status != "unfinished":
        results = {name: record[name] for name in COUNTS if isinstance(record.get(name), int)}
        results |= _results(target if status == "done" else unfinished, done=status == "done")
    return GridRun(target.name, target, record["settings"], status, results, str(record.get("diverged", "")))


def _results(folder: Path, *, done: bool) -> dict[str, Any]:
    """The results of a run by column; those of a diverged run are those before its end."""
    log = history(folder / LOG)
    record: Mapping[str, Any] = {}
    modules: int | None = None
    if done:
        with place(folder):
            adapter = load(folder)
        record, modules = record_of(adapter) or {}, len(adapter)
    steps = record.get("steps_done", max(log.losses, default=0))
    best = record.get("best_step")
    written = steps if best is None else best
    tail = [
        loss for step, loss in log.losses.items() if step > steps - max(1, round(TAIL * steps)) and loss is not None
    ]
    evaluations = dict(log.evaluations)
    entries = log_entries(folder / LOG)
    seconds, tokens = (sum(finite_number(entry.get(key)) or 0 for entry in entries) for key in ("seconds", "size"))
    return {
        "steps_done": steps,
        "best_step": best,
        "modules": modules,
        "loss": log.losses.get(written),
        "loss_tail": fmean(tail) if tail else None,
        **{f"before_{name}": value for name, value in evaluations.get(0, {}).items()},
        **{f"eval_{name}": value for name, value in evaluations.get(written, {}).items()},
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
    }


def _write_table(folder: Path, runs: Mapping[str, GridRun]) -> None:
    """Write ``runs.csv``: name, status, settings, results, and why a run has diverged."""
    rows = sorted(runs.values(), key=lambda run: natural_key(run.name))
    text = csv_text(*GridResult(folder, rows, (), 0).listing())
    with place(folder), disk_errors(), atomic_file(folder / RUNS) as file:
        file.write(text.encode())


# ---- Making runs


def _make_missing(tasks: Sequence[GridTask], folder: Path, runs: dict[str, GridRun], hold: Hold, *, jobs: int) -> None:
    """Check all runs that are missing, then make them; adds them to ``runs`` and to the table as they are finished."""
    # Those with the same inputs follow each other. If the model lacks weights, they are random numbers of the seed.
    tasks = sorted(tasks, key=lambda task: (_inputs_key(task.options), task.options.seed))
    shared = SharedInputs()
    with restore_settings(tasks[0].options.model), _each_message_once():
        tasks = [_checked(task, shared) for task in tasks]
        with place(folder), disk_errors():
            folder.mkdir(parents=True, exist_ok=True)
        hold.take(folder)
        with closing(_made(tasks, shared, jobs=min(jobs, len(tasks)))) as made:
            for done, task in enumerate(made, start=1):
                if (run := _read_run(folder / task.name)) is not None:
                    runs[task.name] = run
                    _write_table(folder, runs)
                    note(f"{done} of {len(tasks)}: {_run_line(run)}")


def _made(tasks: Sequence[GridTask], shared: "SharedInputs", *, jobs: int) -> Generator[GridTask, None, None]:
    """Make runs, and give each when it is finished."""
    if jobs > 1 and not all(map(_can_be_sent, tasks)):
        note("a model or texts that another process cannot receive: the runs are made one after the other")
        jobs = 1
    if jobs == 1 or not sys.executable:
        for task in tasks:
            _make(task, shared)
            yield task
        return
    # Without --threads, the runs share the processors.
    threads = tasks[0].options.threads or max(1, processor_count() // jobs)
    tasks = [task._replace(options=replace(task.options, threads=threads)) for task in tasks]
    note(f"{count(len(tasks), 'run')} to make, {jobs} at a time with {count(threads, 'thread')}")
    # Threads that wait must not spin: two runs on two processors would slow each other down.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with closing(perform_in_processes(tasks, _make, jobs, grace=GRACE, forward=True)) as finished:
        for task, outcome in finished:
            if isinstance(outcome, LoraLensError):
                raise outcome
            if isinstance(outcome, BaseException):
                what = "the process that trained it was killed"
                if not isinstance(outcome, ProcessKilled):
                    what = f"{type(outcome).__name__}: {outcome}"
                fix = "give fewer --jobs if memory is short; else report this as a bug"
                raise OptionError(what, fix=fix).at(task.name)
            yield task


def _make(task: GridTask, shared: "SharedInputs | None" = None) -> None:
    """Make a run, or continue it; in a process of its own it reads its own inputs."""
    # The folder of the run says that it has diverged, so that it is not tried again.
    with suppress(DivergenceError), place(task.name), naming_runs(task.name):
        train_adapter(task.options, read=(shared or SharedInputs()).read, keep_model=True, grid=task.record)


def _can_be_sent(task: GridTask) -> bool:
    """Whether a task is plain data, which another process can receive."""
    if isinstance(task.options.model, tuple):
        return False
    try:
        pickle.dumps(task)
    # An object of the caller may raise anything while it is pickled.
    except Exception:  # noqa: BLE001
        return False
    return True


def _checked(task: GridTask, shared: "SharedInputs") -> GridTask:
    """The task, after a dry run has checked it against its model and texts, with the numbers of its parameters."""
    with place(task.name), naming_runs(task.name):
        plan = train_adapter(replace(task.options, dry_run=True), read=shared.read, keep_model=True)
    assert isinstance(plan, TrainPlan)
    return task._replace(record={**task.record, **{name: getattr(plan.parts, name) for name in COUNTS}})


def _run_line(run: GridRun) -> str:
    """A run that is finished, in one line."""
    if run.status == "diverged":
        return f"{run.name} diverged: {run.message}"
    measures = {name.removeprefix("eval_"): v for name, v in run.results.items() if name.startswith("eval_")}
    shown = measures or {"loss": run.results.get("loss_tail")}
    return f"{run.name}: {', '.join(f'{name} {number(value)}' for name, value in shown.items())}"


@contextmanager
def _each_message_once() -> Iterator[None]:
    """Within the context, a message that several runs have appears once."""
    seen_texts: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        new = record.getMessage() not in seen_texts
        seen_texts.add(record.getMessage())
        return new

    LOGGER.addFilter(is_new)
    try:
        yield
    finally:
        LOGGER.removeFilter(is_new)


# ---- Inputs


def _inputs_key(options: TrainingOptions) -> tuple[str, ...]:
    """What two runs have in common that share their inputs, as texts that can be sorted; the model comes first."""
    return (*(_identity(getattr(options, name)) for name in INPUTS), value_text(options.trl))


@final
class SharedInputs:
    """Reads the inputs of runs. Those of the run before are used again, with its model, where they are the same."""

    def __init__(self) -> None:
        self._inputs: TrainingInputs | None = None
        self._key: tuple[str, ...] = ()
        self._seed = 0

    def read(self, options: TrainingOptions, *, device: str) -> TrainingInputs:
        """The inputs of a run, as `loralens.verbs.runs.training_inputs.read_training_inputs` reads them."""
        key, seed = (*_inputs_key(options), device), options.seed
        # Another seed draws other numbers for the weights that the folder of the model does not have.
        if self._inputs is None or key != self._key or (self._inputs.loaded.missing and seed != self._seed):
            self._inputs = None  # the old model leaves the memory first
            self._inputs, self._key, self._seed = read_training_inputs(options, device=device), key, seed
        return self._inputs
