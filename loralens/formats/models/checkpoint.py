"""Opening the checkpoint of a base model. Only headers are read until numbers are needed.

Verbs that can take a base import this module, also where none is given. The readers of GGUF and of low-bit layouts are
therefore imported by the functions that open a base.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from loralens.core.adapter import Finding
from loralens.core.lazy import LazyArray
from loralens.errors import FormatError, OptionError, place
from loralens.formats.files.container import read_json
from loralens.formats.models.model_files import gguf_paths, model_files, resolve_path
from loralens.formats.models.quantised_bases import check_not_quantised, dequantise

if TYPE_CHECKING:
    from loralens.core.weights import CodedWeight
    from loralens.formats.models.gguf_base import GgufModel

# Model types whose linear layers are transformers' Conv1D, which stores its weight as (in, out).
CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
GPTQ_CONFIG = "quantize_config.json"


@final
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a base model by key, and notes about how they were read.

    Attributes
    ----------
    float8
        Key of each float8 weight that has scales → the dtype it is stored in, and the scale of each of its numbers.
    coded
        Key of each weight that is stored as codes of a few bits → its codes and their grid.
    gguf
        The model, if it is GGUF. While it is held here, nobody reads its header again (`open_gguf`).
    """

    tensors: Mapping[str, LazyArray]
    notes: tuple[Finding, ...] = ()
    float8: Mapping[str, tuple[np.dtype[Any], LazyArray]] = field(default_factory=dict)
    coded: Mapping[str, "CodedWeight"] = field(default_factory=dict)
    gguf: "GgufModel | None" = None


def open_checkpoint(path: Path, *, only_shapes: bool = False) -> Checkpoint:
    """Open a checkpoint whose weights can be read as numbers.

    Parameters
    ----------
    path : Path
        A safetensors file; a GGUF file, or any part of a split one; a folder with one file, with shards and their
        index, or with the component folders of a pipeline (``unet/…``: their tensors come as ``unet.…``); a model's
        folder of a Hub cache (``models--org--name``); or a Hub id that the local cache holds.
    only_shapes : bool
        Accept codes that have the keys and the shapes of the weights: no number will be read.

    Returns
    -------
    Checkpoint
        Weights that are stored as codes of a few bits, and float8 weights with scales beside them, are float32. They
        are decoded when they are read, and have the keys and shapes of float weights. Their other stored tensors, such
        as scales, are left out. Weights of a GGUF file have Hugging Face's names and order of rows.

    Raises
    ------
    OptionError, FormatError
        There is no such path, a shard is missing, the weights are not in a safetensors file, or they are quantised in a
        form that is not read here. Keys, dtypes and ``config.json`` show that; no number of a weight is read.
    """
    path = resolve_path(path)
    gguf = _gguf_model(path)
    if gguf:
        return Checkpoint(gguf.tensors, gguf.notes, coded=gguf.coded, gguf=gguf)
    from loralens.formats.models.low_bit.layouts import decode_low_bit

    # The configuration is read separately, as a single file may be given.
    stored, config = model_files(path).tensors, _quantised_config(path)
    # Otherwise the message would be about dtypes or missing weights. A PEFT model that was saved unmerged has factors
    # too, and weights beside them.
    if any("lora_" in key for key in stored) and all("lora_" in key or key.endswith(".alpha") for key in stored):
        raise OptionError(f"{path}: is an adapter and not a model", fix="give the base model that it was trained on")
    with place(path):
        decoded, coded = decode_low_bit(stored, config, conv1d=stores_conv1d(path))
        check_not_quantised(decoded, config, only_shapes=only_shapes)
        floats, scales = dequantise(decoded, config)
    counts = Counter(weight.layout for weight in coded.values())
    kinds = " and ".join(f"{count} weights are {layout}" for layout, count in counts.items())
    notes = [Finding("note", "low-bit", f"{kinds}, read as float32")] if kinds else []
    if scales:
        text = f"{len(scales)} float8 weights are read as float32, multiplied by their scales"
        notes.append(Finding("note", "float8", text))
    # The doctor needs the stored dtypes and scales to predict how a merge is rounded.
    float8 = {key: (stored[key].dtype, scale) for key, scale in scales.items()}
    return Checkpoint(floats, tuple(notes), float8, coded)


def weights(path: Path) -> Mapping[str, LazyArray]:
    """The tensors of `open_checkpoint`."""
    return open_checkpoint(path).tensors


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, for callers that need no numbers.

    Raises
    ------
    OptionError, FormatError
        As for `open_checkpoint`, but a quantised base is refused only if it does not store weights in their own shape.
    """
    return {key: tensor.shape for key, tensor in open_checkpoint(path, only_shapes=True).tensors.items()}


def model_config(path: Path) -> dict[str, Any] | None:
    """The content of ``config.json`` in the folder of a base model; None if there is none.

    For a GGUF model it is what the metadata of the file says.

    Raises
    ------
    FormatError
        The file is damaged, or its model type is not text.
    """
    folder = resolve_path(path)
    gguf = _gguf_model(folder)
    if gguf:
        return dict(gguf.config)
    file = (folder if folder.is_dir() else folder.parent) / "config.json"
    if not os.path.lexists(file):
        return None
    config = read_json(file)
    # Tables are searched for the model type, and a list or an object cannot be searched for.
    kind = config.get("model_type")
    if not isinstance(kind, str | None):
        what = f"says that the model_type is {kind!a:.40}, which is not text"
        raise FormatError(what, fix="download the configuration of the model again").at(str(file))
    return config


def _quantised_config(path: Path) -> dict[str, Any] | None:
    """``config.json``. Where it has no quantisation settings, those of the separate file of AutoGPTQ are added."""
    config = model_config(path)
    folder = path if path.is_dir() else path.parent
    file = folder / GPTQ_CONFIG
    if not os.path.lexists(file) or "quantization_config" in (config or {}):
        return config
    return {**(config or {}), "quantization_config": read_json(file)}


def stores_conv1d(path: Path) -> bool:
    """Whether the model stores its linear weights as (in, out), by the model type in ``config.json``.

    GGUF files have (out, in) for these models too.
    """
    return (model_config(path) or {}).get("model_type") in CONV1D and not gguf_paths(resolve_path(path))


def _gguf_model(path: Path) -> "GgufModel | None":
    """The GGUF model at a path; None if there is none."""
    paths = gguf_paths(path)
    if not paths:
        return None
    from loralens.formats.models.gguf_base import open_gguf

    return open_gguf(paths)
