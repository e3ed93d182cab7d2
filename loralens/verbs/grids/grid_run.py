"""Makes the missing runs of a grid, and the tables of all its runs."""

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from loralens.core.memory import free_memory
from loralens.core.messages import note
from loralens.core.threads import processor_count
from loralens.errors import DivergenceError, OptionError, place
from loralens.tables.numbers import count, number, size
from loralens.verbs.grids.axes import Grid, grid_points
from loralens.verbs.grids.grid_checks import check_run, run_bytes
from loralens.verbs.grids.grid_folder import GridFolder, GridRun, SettingsReader
from loralens.verbs.grids.grid_inputs import GridInputs, inputs_key
from loralens.verbs.grids.grid_result import GridResult
from loralens.verbs.grids.grid_workers import GridTask, make_runs
from loralens.verbs.inputs.choices import check_counts
from loralens.verbs.inputs.models import device_of, restore_settings
from loralens.verbs.inputs.training_options import default_dtype, fill_in

# Options of a single run, which mean nothing for a grid.
SINGLE = {"resume": "a grid goes on by itself", "more_steps": "train more steps of single runs", "shard": ""}
# The share of the free memory that a grid takes: the estimates are rough, and the machine has other work.
SHARE = 0.8


def train_grid(keywords: Mapping[str, Any], grid: Grid, *, jobs: int | None, fixed: Collection[str]) -> GridResult:
    """Make the runs of a grid that are missing in its folder.

    Parameters
    ----------
    keywords : mapping
        The options of `loralens.train` except for ``grid`` and ``jobs``: those of all runs.
    grid : str, mapping, or sequence of these
        The axes, see `loralens.verbs.grids.axes.grid_points`.
    jobs : int, optional
        The number of runs at a time; by default what memory and processors allow.
    fixed : collection of str
        The options that have one value for all runs.

    Raises
    ------
    OptionError
        An axis or a value is not allowed; the message names the run. Nothing has been trained.
    MismatchError
        The folder has a run of the same name with other settings.
    """
    _check_options(keywords, jobs)
    planned = plan_runs(keywords, grid, fixed)
    axes = tuple(dict.fromkeys(option for point in grid_points(grid, fixed) for option in point.values))
    dry: bool = keywords["dry_run"]
    folder = GridFolder(Path(keywords["output"]), hold=not dry)
    try:
        reader = SettingsReader()
        for task in planned:
            folder.add(task.name, reader.read(task.options), overwrite=keywords["overwrite"])
        missing = [task for task in planned if folder.status(task.name) in ("missing", "unfinished")]
        if missing and not dry:
            _train_missing(folder, missing, jobs=jobs)
        runs = {run.name: run for run in (folder.runs() if dry else folder.write_tables())}
    finally:
        folder.release()
    return GridResult(folder.folder, [runs[task.name] for task in planned], axes, len(missing), dry=dry)


def _check_options(keywords: Mapping[str, Any], jobs: int | None) -> None:
    if keywords["output"] is None:
        raise OptionError("Missing option '--output'", fix="say where to write the grid (-o FOLDER)")
    for name, fix in SINGLE.items():
        if keywords[name]:
            option = f"--{name.replace('_', '-')}"
            raise OptionError(f"--grid and {option} exclude each other", fix=fix or f"leave {option} out")
    # torchrun starts every process with the same command.
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise OptionError("a grid is made by one process, and torchrun has started several", fix="start it without")
    check_counts(jobs=jobs)


def plan_runs(keywords: Mapping[str, Any], grid: Grid, fixed: Collection[str]) -> list[GridTask]:
    """The runs with their options. Every value that can be checked without the model is checked.

    Raises
    ------
    OptionError
        A value is not allowed; the message names the run.
    """
    output = Path(keywords["output"])
    # Texts that can be iterated only once are stored for all runs.
    iterators = {name: list(keywords[name]) for name in ("data", "eval") if hasattr(keywords[name], "__next__")}
    keywords = {**keywords, **iterators}
    planned: list[GridTask] = []
    for point in grid_points(grid, fixed):
        with place(point.name):
            options = fill_in({**keywords, **point.values, "output": output / point.name})
            options.check()
        planned.append(GridTask(point.name, options))
    if not planned:
        raise OptionError("the grid has no axes", fix="give one: --grid rank=1,8")
    return planned


def _train_missing(folder: GridFolder, missing: Sequence[GridTask], *, jobs: int | None) -> None:
    """Make the runs that are missing, those with the same inputs one after the other."""
    # If the model lacks weights, they are random numbers of the seed, so runs of one seed follow each other.
    ordered = sorted(missing, key=lambda task: (inputs_key(task.options), task.options.seed))
    shared = GridInputs()
    with restore_settings(ordered[0].options.model):
        needed = _check_runs(folder, ordered, shared)
        jobs = _choose_jobs(folder, ordered, needed, jobs)
        folder.begin()
        # The folder decides whether a run replaces another one, and its number of threads.
        tasks = [
            GridTask(name, replace(options, overwrite=name in folder.replaced, threads=folder.threads))
            for name, options in ordered
        ]
        with closing(make_runs(tasks, shared, jobs=jobs)) as outcomes:
            for done, (task, error) in enumerate(outcomes, start=1):
                if error is not None and not isinstance(error, DivergenceError):
                    raise error.at(task.name)
                folder.finish(task.name, error.what if error else "")
                run = next(run for run in folder.write_tables() if run.name == task.name)
                note(f"{done} of {len(tasks)}: {_run_line(run)}")


def _check_runs(folder: GridFolder, tasks: Sequence[GridTask], shared: GridInputs) -> int:
    """Check all runs against their models and texts, and return the memory that the largest needs, in bytes."""
    needed = 0
    warned: set[tuple[str, ...]] = set()
    for task in tasks:
        options = task.options
        is_object = isinstance(options.model, tuple)
        device = options.device if is_object else str(device_of(options.device))
        dtype = options.dtype or ("f32" if is_object else default_dtype(device_of(options.device)))
        inputs = shared.read(replace(options, dtype=dtype), device=device)
        with place(task.name):
            folder.counts[task.name] = counts = check_run(options, inputs)
            needed = max(needed, run_bytes(options, inputs, counts.trainable))
        # The warning comes once for all runs that read these texts.
        if inputs_key(options) not in warned:
            warned.add(inputs_key(options))
            inputs.warn_of_cut()
    return needed


def _choose_jobs(folder: GridFolder, tasks: Sequence[GridTask], needed: int, jobs: int | None) -> int:
    """The number of runs at a time. Sets the number of threads of each run too, once for the folder.

    That number is recorded, since the last bits of a result depend on it: a grid that is repeated uses the same number.
    """
    processors = processor_count()
    threads = tasks[0].options.threads or folder.threads
    free = free_memory()
    room = max(1, int(SHARE * free / needed)) if free and needed else processors
    most = min(len(tasks), max(1, processors // (threads or 1)), room)
    # Several processes on one GPU take its memory from each other, so they are started only if the user asks for them.
    most = most if device_of(tasks[0].options.device).type == "cpu" else 1
    at_once = min(jobs or most, len(tasks))
    folder.threads = threads or max(1, processors // at_once)
    # For one run there is nothing to share.
    if len(tasks) > 1:
        memory = f"about {size(needed)} each, {size(free)} free" if free else f"about {size(needed)} each"
        thread_text = count(folder.threads, "thread")
        note(f"{count(len(tasks), 'run')} to make, {at_once} at a time with {thread_text}: {memory}")
    return at_once


def _run_line(run: GridRun) -> str:
    """A run that is finished, in one line."""
    if run.status == "diverged":
        return f"{run.name} diverged: {run.message}"
    measures = {name.removeprefix("eval_"): v for name, v in run.results.items() if name.startswith("eval_")}
    shown = measures or {"loss": run.results.get("loss_tail")}
    return f"{run.name}: {', '.join(f'{name} {number(value)}' for name, value in shown.items())}"
