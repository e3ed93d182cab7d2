"""Makes the missing runs of a grid, and the tables of all its runs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from loralens.core.messages import note
from loralens.errors import DivergenceError, LoraLensError, OptionError, place
from loralens.verbs.grids.axes import Grid, grid_points
from loralens.verbs.grids.grid_folder import GridFolder, SettingsReader, unfinished
from loralens.verbs.grids.grid_result import GridResult
from loralens.verbs.grids.shared_inputs import SharedInputs, inputs_key
from loralens.verbs.inputs.models import restore_settings
from loralens.verbs.inputs.training_options import TrainingOptions, fill_in
from loralens.verbs.outputs.training.train_adapter import train_adapter


class PlannedRun(NamedTuple):
    """A run of a grid: its name, and its options, which are checked."""

    name: str
    options: TrainingOptions


def train_grid(keywords: Mapping[str, Any], grid: Grid, *, jobs: int | None, given: Collection[str]) -> GridResult:
    """Make the runs of a grid that are missing in its folder.

    Parameters
    ----------
    keywords : mapping
        The options of `loralens.train` except for ``grid`` and ``jobs``: those of all runs.
    grid : str, mapping, or sequence of these
        The axes, see `loralens.verbs.grids.axes.grid_points`.
    jobs : int, optional
        The number of runs at a time.
    given : collection of str
        The options that are given for all runs.
    """
    if keywords["output"] is None:
        raise OptionError("Missing option '--output'", fix="say where to write the grid (-o FOLDER)")
    for name in ("resume", "more_steps", "shard"):
        if keywords[name]:
            option = f"--{name.replace('_', '-')}"
            fix = "leave it out: a grid goes on by itself" if name == "resume" else "leave it out"
            raise OptionError(f"--grid and {option} exclude each other", fix=fix)
    del jobs  # one at a time so far
    folder = GridFolder(Path(keywords["output"]))
    planned = plan_runs(keywords, grid, given)
    reader = SettingsReader()
    replaced = {
        run.name for run in planned if folder.add(run.name, reader.read(run.options), overwrite=keywords["overwrite"])
    }
    missing = [run for run in planned if run.name in replaced or folder.status(run.name) in ("missing", "unfinished")]
    axes = tuple(dict.fromkeys(option for point in grid_points(grid, given) for option in point.values))
    if keywords["dry_run"]:
        return GridResult(folder.folder, folder.runs(), axes, 0, dry=True)
    folder.begin()
    try:
        folder.write_record()
        _train_missing(folder, missing, replaced)
        runs = folder.write_tables()
    finally:
        folder.release()
    return GridResult(folder.folder, runs, axes, len(missing))


def plan_runs(keywords: Mapping[str, Any], grid: Grid, given: Collection[str]) -> list[PlannedRun]:
    """The runs with their options; every value is checked that can be without the model.

    Raises
    ------
    OptionError
        A value is not allowed; the message names the run.
    """
    output = Path(keywords["output"])
    planned: list[PlannedRun] = []
    for point in grid_points(grid, given):
        with place(f"{output} {point.name}" if point.values else str(output)):
            options = fill_in({**keywords, **point.values, "output": output / point.name})
            options.check()
        planned.append(PlannedRun(point.name, options))
    if not planned:
        raise OptionError("the grid has no axes", fix="give one: --grid rank=1,8")
    return planned


def _train_missing(folder: GridFolder, missing: Sequence[PlannedRun], replaced: Collection[str]) -> None:
    """Make the runs that are missing, those with the same inputs one after the other."""
    shared = SharedInputs()
    # With missing weights the seed decides about the model, so runs of one seed follow each other.
    ordered = sorted(missing, key=lambda run: (inputs_key(run.options), run.options.seed))
    for number, run in enumerate(ordered, start=1):
        note(f"run {number} of {len(ordered)}: {run.name}")
        begun = unfinished(folder.folder / run.name).exists()
        options = replace(run.options, resume=begun and run.name not in replaced, overwrite=run.name in replaced)
        try:
            with restore_settings(options.model):
                train_adapter(options, read=shared.read, keep_model=True)
        except DivergenceError as error:
            folder.fail(run.name, error.what)
            note(f"{run.name} diverged: {error.what}")
        except LoraLensError as error:
            raise error.at(run.name) from None
        folder.write_tables()
