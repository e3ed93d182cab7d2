"""The model and the texts of a grid, which are read once for all runs that have the same."""

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, final

from loralens.verbs.inputs.loaded import Loaded
from loralens.verbs.inputs.models import ModelSource, load_headed
from loralens.verbs.inputs.training import TrainingInputs, read_training_inputs
from loralens.verbs.inputs.training_options import TrainingOptions

# The options that decide about the inputs of a run. The seed does too, where weights are missing and drawn at random.
MODEL = ("model", "task", "dtype")
TEXTS = ("data", "eval", "eval_limit", "length", "mask_prompt", "pack")


def inputs_key(options: TrainingOptions) -> tuple[str, ...]:
    """What two runs have in common that share their inputs, as texts that can be sorted; the model comes first."""
    return tuple(_identity(getattr(options, name)) for name in (*MODEL, *TEXTS))


def _identity(value: Any) -> str:
    """A value as text; an object, such as a model or a list of texts, by what it is and not by what is in it."""
    plain = value is None or isinstance(value, str | int | PathLike)
    return str(value) if plain else f"{type(value).__name__} {id(value)}"


@final
class GridInputs:
    """Reads the inputs of runs. The tokens of all texts are kept, and one model: that of the run before."""

    def __init__(self) -> None:
        self._texts: dict[tuple[str, ...], TrainingInputs] = {}
        self._model: Loaded | None = None
        self._model_key: tuple[Any, ...] = ()
        self._seed = 0

    def read(self, options: TrainingOptions, *, device: str) -> TrainingInputs:
        """The inputs of a run, as `loralens.verbs.inputs.training.read_training_inputs` reads them."""
        key = (*inputs_key(options), device)
        inputs = self._texts.get(key)
        if inputs is None:
            inputs = read_training_inputs(options, device=device, load=self._load)
            # Without its model, of which there is one at a time.
            self._texts[key] = replace(inputs, loaded=inputs.loaded._replace(model=None))  # type: ignore[arg-type]
            return inputs
        loaded = self._load(
            options.model,
            inputs.task.head,
            device=device,
            dtype=options.dtype or "f32",
            threads=options.threads,
            seed=options.seed,
            labels=inputs.learned.labels if inputs.task.labelled else None,
        )
        return replace(inputs, loaded=loaded)

    def clear(self) -> None:
        """Forget everything."""
        self._texts, self._model, self._model_key = {}, None, ()

    def _load(
        self,
        source: ModelSource,
        head: str | None,
        *,
        device: str,
        dtype: str,
        threads: int | None,
        seed: int,
        labels: Sequence[str] | None,
    ) -> Loaded:
        """As `loralens.verbs.inputs.models.load_headed`, if it is another model than that of the run before."""
        key = (_identity(source), head, device, dtype, None if labels is None else tuple(labels))
        model = self._model if key == self._model_key else None
        # Another seed draws other numbers for the weights that the folder does not have.
        if model is None or (model.missing and seed != self._seed):
            # The old model leaves the memory first.
            self._model = model = None
            self._model = load_headed(
                source, head, device=device, dtype=dtype, threads=threads, seed=seed, labels=labels
            )
        elif threads:
            import torch  # which has been imported to load the model

            torch.set_num_threads(threads)
        assert self._model
        self._model_key, self._seed = key, seed
        return self._model
