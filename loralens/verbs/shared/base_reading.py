"""Base models as inputs of a verb: their weights, and warnings if an adapter belongs to another model."""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from loralens.core.adapter import Adapter
from loralens.core.base_model import BaseModel, contradiction, find_contradiction, group_models
from loralens.core.messages import note, tell, warn
from loralens.core.names import some
from loralens.errors import LoraLensError, place
from loralens.formats.files.location import known_folder

# What reads a base takes 5 ms to import, and most adapters are compared by the name of their base alone.
if TYPE_CHECKING:
    from loralens.core.structured import Updates
    from loralens.core.weights import Weights
    from loralens.formats.models.checkpoint import Checkpoint

# In both cases a warning and not an error: a copy of a base may have any name, and only the user knows.
FIX = "give the base that it was trained on; a copy of it under another name is fine"
OF_ONE = "take adapters of one base: an update has a meaning only for the weights that it was trained on"

Held = TypeVar("Held")  # tensors, or their shapes
ModelPath = str | PathLike[str]


def read_checkpoint(base: ModelPath) -> "Checkpoint":
    """Open the checkpoint at ``base``; messages say what its reader noticed."""
    from loralens.formats.models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(Path(base))
    for finding in checkpoint.notes:
        tell(finding.level, f"{base}: {finding.text}")
    return checkpoint


def with_tied_head(stored: Mapping[str, Held], base: ModelPath) -> Mapping[str, Held]:
    """The tensors or shapes of the base, with those of the embedding in place of a head that it does not store."""
    from loralens.formats.models.checkpoint import model_config
    from loralens.merging.planning import find_ties

    return find_ties(stored, model_config(Path(base)) or {}).with_copies(stored)


def base_weights(base: ModelPath, modules: "Updates") -> "Weights":
    """The weights of the base that these modules adapt; errors name the base.

    A head that the base does not store has the weight of the embedding, which it shares.
    """
    from loralens.core.weights import weights_of

    checkpoint = read_checkpoint(base)
    with place(base):
        return weights_of(modules, with_tied_head(checkpoint.tensors, base), conv1d=checkpoint.conv1d)


def base_model_of(adapter: Adapter) -> BaseModel:
    """The base that an adapter names, with its sizes if this machine has it."""
    return base_model_named(adapter.base_model or "")


def base_model_named(name: str) -> BaseModel:
    """The base of this name, with its sizes if this machine has it."""
    folder = known_folder(name)
    if folder is None:
        return BaseModel.of(name)
    from loralens.formats.models.checkpoint import model_config

    try:
        config = model_config(folder)
    except LoraLensError:  # a fault of a model that the user did not name is not an error of this command
        config = None
    return BaseModel.of(name, config)


def base_model_at(base: ModelPath) -> BaseModel:
    """The base that a user gave, under its path and the names in its configuration."""
    from loralens.formats.models.checkpoint import model_config

    path = Path(base)
    name = str(path.resolve()) if path.exists() else str(base)  # what exists is a path, even if it looks like a Hub id
    return BaseModel.of(name, model_config(path))


def base_contradiction(adapter: Adapter, base: ModelPath) -> str:
    """The contradiction between ``base`` and the base that the adapter names, in words; empty if there is none."""
    # An adapter that names no base contradicts none.
    if not adapter.base_model:
        return ""
    why = contradiction(base_model_of(adapter), base_model_at(base))
    return f"it names {adapter.base_model} as its base, and {base} is another: {why}" if why else ""


def warn_of_base(path: str, adapter: Adapter, base: ModelPath) -> None:
    """Warn if ``base`` is not the base that the adapter names."""
    reason = base_contradiction(adapter, base)
    if reason:
        warn(f"{path}: {reason}", FIX)


def warn_of_bases(labels: Sequence[str], adapters: Sequence[Adapter]) -> None:
    """Warn if adapters name different bases, or have different sizes."""
    names = {adapter.base_model or "" for adapter in adapters}
    # One name is one base, whatever its configuration says. Then the search for it on this machine, which takes longer
    # than reading a small adapter, is not needed.
    models = [BaseModel.of(name) for name in names] * len(adapters) if len(names) == 1 else map(base_model_of, adapters)
    difference = find_contradiction(list(labels), list(adapters), list(models))
    if difference:
        warn(difference, OF_ONE)


def note_of_bases(names: Iterable[str | None]) -> None:
    """Note the number of bases of a collection, if there are several, which is not a mistake in a collection."""
    # Each name is looked up once, as a collection has few bases and many adapters.
    models = [base_model_named(name or "") for name in dict.fromkeys(names)]
    groups = group_models(models)
    if len(groups) > 1:
        names = some([models[group[0]].name for group in groups], 4)
        note(f"these are adapters of {len(groups)} base models ({names}): compare within one")
