"""The files of a base model: its shards, their indices, and what lies beside them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from loralens.core.lazy import LazyArray
from loralens.errors import FormatError, place
from loralens.formats.container import Stored, read_json, read_safetensors

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz")
SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
LEFT_OUT = (".git", ".cache", ".locks")  # what a download leaves beside a model


@final
@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of a model.

    Attributes
    ----------
    name : str
        Its path within the model's folder, with ``/``.
    prefix : str
        What its keys begin with among the model's: the component of a pipeline and a dot.
    stored : Stored
    """

    name: str
    prefix: str
    stored: Stored


@final
@dataclass(frozen=True, slots=True)
class Index:
    """The JSON that says which shard holds which tensor.

    Attributes
    ----------
    name : str
        Its path within the model's folder.
    prefix : str
        As that of its shards.
    content : dict
    """

    name: str
    prefix: str
    content: Mapping[str, Any]


@final
@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files that make a model.

    Attributes
    ----------
    root : Path
        Its folder, or its one file.
    shards : tuple of Shard
    indices : tuple of Index
    left_out : tuple of str
        Files that hold the same weights in another form, which a changed copy must not carry on.
    """

    root: Path
    shards: tuple[Shard, ...]
    indices: tuple[Index, ...]
    left_out: tuple[str, ...]

    @property
    def tensors(self) -> dict[str, LazyArray]:
        """Every tensor by key, as it is stored."""
        return {shard.prefix + key: t for shard in self.shards for key, t in shard.stored.tensors.items()}

    @property
    def others(self) -> list[str]:
        """Files beside the weights: configuration, tokenizer, code."""
        weights = {*(s.name for s in self.shards), *(i.name for i in self.indices), *self.left_out}
        return [name for name in _walk(self.root) if name not in weights]


def model_files(root: Path) -> ModelFiles:
    """The files of the model at ``root``, a folder or one safetensors file, headers read.

    Raises
    ------
    FormatError, OptionError
        A shard is missing or damaged; there is no safetensors file.
    """
    if root.is_file():
        return ModelFiles(root, (Shard(root.name, "", read_safetensors(root)),), (), ())
    with place(root):
        found = [_in_folder(root, root)]
        if not found[0][0]:
            found = [_in_folder(root, p) for p in sorted(root.iterdir()) if p.is_dir() and p.name not in LEFT_OUT]
        shards = tuple(shard for one, _ in found for shard in one)
        if not shards:
            raise FormatError("holds no safetensors weights", fix="convert its weights to safetensors")
    indices = tuple(index for _, index in found if index)
    used = {*(shard.name for shard in shards), *(index.name for index in indices)}
    return ModelFiles(root, shards, indices, tuple(n for n in _walk(root) if n not in used and _other_weights(n)))


def _in_folder(root: Path, folder: Path) -> tuple[list[Shard], Index | None]:
    prefix, inside = ("", "") if folder == root else (f"{folder.name}.", f"{folder.name}/")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        content = read_json(index)
        names = sorted(set(content["weight_map"].values()))
        shards = [Shard(inside + name, prefix, read_safetensors(folder / name)) for name in names]
        return shards, Index(inside + index.name, prefix, content)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        files = [file for file in files if file.name in SINGLE]
    return [Shard(inside + file.name, prefix, read_safetensors(file)) for file in files[:1]], None


def _walk(root: Path) -> list[str]:
    """Every file under a folder, by its path with ``/``."""
    found = []
    for folder, inner, names in os.walk(root, followlinks=True):
        inner[:] = [name for name in inner if name not in LEFT_OUT]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in names]
    return sorted(found)


def _other_weights(name: str) -> bool:
    return name.endswith(WEIGHTS) or name.endswith((".bin.index.json", ".safetensors.index.json"))
