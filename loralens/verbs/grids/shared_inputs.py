"""The model and the texts of a grid, which are read once for all runs that have the same."""

from dataclasses import replace
from typing import Any, final

from loralens.verbs.inputs.models import load_headed
from loralens.verbs.inputs.training import TrainingInputs, read_training_inputs
from loralens.verbs.inputs.training_options import TrainingOptions

# The options that decide about the inputs of a run. The seed does too, where weights are missing and drawn at random.
DECIDING = ("model", "task", "data", "eval", "eval_limit", "length", "mask_prompt", "pack", "dtype")


def inputs_key(options: TrainingOptions) -> tuple[str, ...]:
    """What two runs have to have in common to share their inputs, as texts that can be sorted."""
    return tuple(repr(getattr(options, name)) for name in DECIDING)


@final
class SharedInputs:
    """Reads the inputs of a run, unless they are those of the run before."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._seed = 0
        self._inputs: TrainingInputs | None = None

    def read(self, options: TrainingOptions, *, device: str) -> TrainingInputs:
        """The inputs of a run, as `loralens.verbs.inputs.training.read_training_inputs` reads them."""
        key = (*inputs_key(options), device)
        inputs = self._inputs if key == self._key else None
        if inputs is None:
            # The old model first leaves the memory.
            self._inputs = None
            inputs = read_training_inputs(options, device=device)
        elif inputs.loaded.missing and options.seed != self._seed:
            # Another seed draws other numbers for the weights that the folder does not have; the texts stay.
            loaded = load_headed(
                options.model,
                inputs.task.head,
                device=device,
                dtype=options.dtype or "f32",
                threads=options.threads,
                seed=options.seed,
                labels=inputs.learned.labels if inputs.task.labelled else None,
            )
            inputs = replace(inputs, loaded=loaded)
        self._key, self._seed, self._inputs = key, options.seed, inputs
        return inputs
