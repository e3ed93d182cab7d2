"""One run of ``train``: checks the target, reads the inputs, and trains or makes the plan."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from loralens.formats.files.disk import check_new_folder
from loralens.formats.records.training import Training
from loralens.verbs.files.output import Target
from loralens.verbs.models.models import device_of
from loralens.verbs.runs.training_inputs import TrainingInputs, read_training_inputs
from loralens.verbs.runs.training_options import TrainingOptions, default_dtype
from loralens.verbs.runs.training_result import TrainPlan, TrainResult
from loralens.verbs.runs.training_run import TrainingRun

ReadInputs = Callable[..., TrainingInputs]


def train_adapter(
    options: TrainingOptions,
    *,
    read: ReadInputs = read_training_inputs,
    keep_model: bool = False,
    grid: Mapping[str, Any] | None = None,
) -> TrainResult | TrainPlan:
    """Train one adapter, or make the plan of a dry run.

    Parameters
    ----------
    options : TrainingOptions
        Checked options.
    read : callable
        Reads the inputs; by default anew.
    keep_model : bool
        Whether the model is used again, so that its layers are restored after the run. A model that was given as an
        object always is.
    grid : mapping, optional
        What a grid records of the run in its folder.
    """
    # The target first: a model takes long to load, and a run of hours must not fail at the end for lack of a folder.
    training = None if options.output is None else Training(options.output)
    if training is not None:
        if not options.resume and not options.more_steps:
            training.check(overwrite=options.overwrite)
            check_new_folder(training.target)
        # Neither the adapter nor the unfinished run may overwrite the model or the texts.
        for folder in (training.target, training.folder):
            Target(output=folder).check_inputs(options.places)
    # torch takes a second
    from loralens.training.world import join_processes

    # A model that was given as an object stays on its device.
    if isinstance(options.model, tuple):
        device, name = next(options.model[0].parameters()).device, options.device
        options = replace(options, dtype=options.dtype or "f32")
    else:
        device = device_of(options.device)
        # What one GPU does not hold is loaded into the memory of the CPU, and moved in parts.
        name = "cpu" if options.shard else str(device)
        options = replace(options, dtype=options.dtype or default_dtype(device))
    with join_processes(device) as world:
        inputs = read(options, device=name)
        cuts = inputs.cut, inputs.evaluation_cut
        run = TrainingRun(options, inputs, training, world, device, keep_model=keep_model, grid=grid)
        try:
            if options.dry_run:
                return TrainPlan(options.output, run.rehearse(), run.identity, *cuts, main=world.main)
            fitted, parts, log = run.train()
        # The folder of the run is locked while a process writes it.
        finally:
            if training is not None:
                training.release()
    assert options.output is not None
    return TrainResult(
        fitted.adapter,
        options.output,
        parts,
        fitted.steps,
        fitted.best_step,
        log.losses,
        log.evaluations,
        *cuts,
        main=world.main,
    )
