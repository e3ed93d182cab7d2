"""A base model's checkpoint: names and shapes of its tensors, from the headers alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralens.core.lazy import LazyArray
from loralens.errors import FormatError, OptionError, place
from loralens.formats.container import read_json, read_safetensors
from loralens.formats.location import existing

CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})  # model types that store (in, out)


def weights(path: Path) -> Mapping[str, LazyArray]:
    """Every tensor of a checkpoint by key, its numbers read when they are asked for.

    Parameters
    ----------
    path : Path
        A safetensors file; a folder with one file, with shards and their index, or with the component folders of a
        pipeline (``unet/…``: their tensors come as ``unet.…``); or a Hub id that the local cache holds.

    Raises
    ------
    OptionError, FormatError
        Nothing is there, a shard is missing, or the weights are in no safetensors file.
    """
    path = existing(path)
    if path.is_file():
        return read_safetensors(path).tensors
    with place(path):
        found = _folder(path)
        if found is None:
            found = _components(path)
        if not found:
            raise FormatError(
                "holds no safetensors weights", fix="give the folder of a model, or convert its weights to safetensors"
            )
    return found


def model_config(path: Path) -> dict[str, Any] | None:
    """``config.json`` of a base model's folder; None where there is none."""
    folder = existing(path)
    file = (folder if folder.is_dir() else folder.parent) / "config.json"
    return read_json(file) if file.is_file() else None


def stores_conv1d(path: Path) -> bool:
    """Whether the model's linear weights are stored (in, out), as ``config.json`` says its type."""
    return (model_config(path) or {}).get("model_type") in CONV1D


def _folder(folder: Path) -> dict[str, LazyArray] | None:
    """The tensors of one model's folder; None where it holds none."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        return _sharded(folder, indices[0])
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        named = [file for file in files if file.name in ("model.safetensors", "diffusion_pytorch_model.safetensors")]
        if len(named) != 1:
            names = ", ".join(file.name for file in files[:6])
            raise FormatError(f"holds several files and no index: {names}", fix="give one of these files")
        files = named
    return dict(read_safetensors(files[0]).tensors) if files else None


def _sharded(folder: Path, index: Path) -> dict[str, LazyArray]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise FormatError(f"{index.name} has no weight_map", fix="download the index again")
    tensors: dict[str, LazyArray] = {}
    for name in sorted(set(names.values())):
        shard = folder / name
        if Path(name).name != name or not shard.is_file():
            raise OptionError(f"{name} is named by {index.name} and missing", fix="download the missing shard")
        tensors.update(read_safetensors(shard).tensors)
    return tensors


def _components(folder: Path) -> dict[str, LazyArray]:
    """The tensors of a diffusers pipeline, under the name of their component."""
    tensors: dict[str, LazyArray] = {}
    for inner in sorted(p for p in folder.iterdir() if p.is_dir()):
        found = _folder(inner)
        tensors.update((f"{inner.name}.{key}", tensor) for key, tensor in (found or {}).items())
    return tensors
