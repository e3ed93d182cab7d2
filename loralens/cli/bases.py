"""Bases: a warning where adapters, or an adapter and the base it is held against, speak of different models."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loralens.cli.terminal import say

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.core.adapter import Adapter
    from loralens.core.naming.base_model import BaseModel

FIX = "give the base that it was trained on; where this is a copy of it under another name, all is well"
OF_ONE = "take adapters of one base: an update means something beside its own weights only"


def named(adapter: "Adapter") -> "BaseModel":
    """The base that an adapter names, with its sizes where this machine has it."""
    from loralens.core.naming.base_model import BaseModel
    from loralens.errors import LoraLensError
    from loralens.formats.files.location import known_folder
    from loralens.formats.models.checkpoint import model_config

    name = adapter.base_model or ""
    folder = known_folder(name)
    try:
        config = model_config(folder) if folder else None
    except LoraLensError:  # of a model that nobody asked for
        config = None
    return BaseModel.of(name, config)


def given(base: str | Path) -> "BaseModel":
    """The base that a user gave, under its name and whatever its configuration calls it."""
    from loralens.core.naming.base_model import BaseModel
    from loralens.formats.models.checkpoint import model_config

    path = Path(base)
    name = str(path.resolve()) if path.exists() else str(base)  # what exists is a path, though it look like a Hub id
    return BaseModel.of(name, model_config(path))


def against(adapter: "Adapter", base: str | Path) -> str:
    """What contradicts that ``base`` is the base of the adapter, in words; empty where nothing does."""
    from loralens.core.naming.base_model import contradiction

    if not adapter.base_model:
        return ""
    why = contradiction(named(adapter), given(base))
    return f"it names {adapter.base_model} as its base, and {base} is another: {why}" if why else ""


def warn_of_base(path: str, adapter: "Adapter", base: str | Path) -> None:
    """Say on stderr that ``base`` is not the base that the adapter names, where it is not."""
    told = against(adapter, base)
    if told:
        say(f"warning: {path}: {told}", f"  fix: {FIX}", err=True)


def warn_of_bases(paths: Sequence[str], adapters: "Sequence[Adapter]") -> None:
    """Say on stderr that adapters name different bases, or have different sizes, where that is so."""
    from loralens.core.naming.base_model import apart

    told = apart(list(paths), list(adapters), [named(adapter) for adapter in adapters])
    if told:
        say(f"warning: {told}", f"  fix: {OF_ONE}", err=True)


def note_of_bases(adapters: "Sequence[Adapter]") -> None:
    """Say on stderr how many bases a collection is of, where it is of more than one: that is no mistake there."""
    from loralens.core.names import some
    from loralens.core.naming.base_model import grouped

    models = [named(adapter) for adapter in {adapter.base_model: adapter for adapter in adapters}.values()]
    groups = grouped(models)
    if len(groups) > 1:
        names = some([models[group[0]].name for group in groups], 4)
        say(f"note: these are adapters of {len(groups)} base models ({names}): compare within one", err=True)
