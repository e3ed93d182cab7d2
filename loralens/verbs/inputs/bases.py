"""Base models as inputs of a verb: their weights, and warnings if an adapter belongs to another model."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TypeVar

from loralens.core.adapter import Adapter
from loralens.core.messages import note, tell, warn
from loralens.core.names import some
from loralens.core.naming.base_model import BaseModel, contradiction, find_contradiction, group_models
from loralens.core.structured import Updates
from loralens.core.weights import Weights, weights_of
from loralens.errors import LoraLensError, place
from loralens.formats.files.location import known_folder
from loralens.formats.models.checkpoint import Checkpoint, model_config, open_checkpoint, stores_conv1d
from loralens.merging.ties import find_ties

FIX = "give the base that it was trained on; where this is a copy of it under another name, all is well"
OF_ONE = "take adapters of one base: an update means something beside its own weights only"

Held = TypeVar("Held")  # tensors, or their shapes
ModelPath = str | PathLike[str]


def read_checkpoint(base: ModelPath) -> Checkpoint:
    """The checkpoint at ``base``; messages say what its reader noticed."""
    checkpoint = open_checkpoint(Path(base))
    for finding in checkpoint.notes:
        tell(finding.level, f"{base}: {finding.text}")
    return checkpoint


def with_tied_head(stored: Mapping[str, Held], base: ModelPath) -> Mapping[str, Held]:
    """Tensors or shapes of the base, with those of a head that it does not store: its embedding's."""
    return find_ties(stored, model_config(Path(base)) or {}).with_copies(stored)


def base_weights(base: ModelPath, modules: Updates) -> Weights:
    """The weights of the base that these modules adapt; errors say the base.

    A head that the base does not store, as it shares the embedding's weight, has that.
    """
    checkpoint = read_checkpoint(base)
    with place(base):
        return weights_of(modules, with_tied_head(checkpoint.tensors, base), conv1d=stores_conv1d(Path(base)))


def base_model_of(adapter: Adapter) -> BaseModel:
    """The base that an adapter names, with its sizes where this machine has it."""
    name = adapter.base_model or ""
    folder = known_folder(name)
    try:
        config = model_config(folder) if folder else None
    except LoraLensError:  # of a model that nobody asked for
        config = None
    return BaseModel.of(name, config)


def base_model_at(base: ModelPath) -> BaseModel:
    """The base that a user gave, under its name and whatever its configuration calls it."""
    path = Path(base)
    name = str(path.resolve()) if path.exists() else str(base)  # what exists is a path, though it look like a Hub id
    return BaseModel.of(name, model_config(path))


def base_contradiction(adapter: Adapter, base: ModelPath) -> str:
    """What contradicts that ``base`` is the base of the adapter, in words; empty where nothing does."""
    if not adapter.base_model:
        return ""
    why = contradiction(base_model_of(adapter), base_model_at(base))
    return f"it names {adapter.base_model} as its base, and {base} is another: {why}" if why else ""


def warn_of_base(path: str, adapter: Adapter, base: ModelPath) -> None:
    """Warn where ``base`` is not the base that the adapter names."""
    reason = base_contradiction(adapter, base)
    if reason:
        warn(f"{path}: {reason}", FIX)


def warn_of_bases(labels: Sequence[str], adapters: Sequence[Adapter]) -> None:
    """Warn where adapters name different bases, or have different sizes."""
    difference = find_contradiction(list(labels), list(adapters), [base_model_of(adapter) for adapter in adapters])
    if difference:
        warn(difference, OF_ONE)


def note_of_bases(adapters: Sequence[Adapter]) -> None:
    """Say how many bases a collection is of, where it is of more than one: that is no mistake there."""
    models = [base_model_of(adapter) for adapter in {adapter.base_model: adapter for adapter in adapters}.values()]
    groups = group_models(models)
    if len(groups) > 1:
        names = some([models[group[0]].name for group in groups], 4)
        note(f"these are adapters of {len(groups)} base models ({names}): compare within one")
