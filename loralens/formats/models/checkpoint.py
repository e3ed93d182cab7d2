"""Opening the checkpoint of a base model. Only headers are read until numbers are needed.

Verbs that can take a base import this module, also where none is given. The readers of GGUF and of low-bit layouts are
therefore imported by the functions that open a base.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from loralens.core.adapter import Finding
from loralens.core.lazy import LazyArray
from loralens.errors import FormatError, OptionError, place
from loralens.formats.files.container import read_json
from loralens.formats.models.model_files import ModelFiles, gguf_paths, model_files, resolve_path
from loralens.formats.models.quantised_bases import check_not_quantised, dequantise

if TYPE_CHECKING:
    from loralens.core.weights import CodedWeight
    from loralens.formats.models.gguf_base import GgufModel
    from loralens.formats.models.low_bit.layouts import CodedTensors

# Model types whose linear layers are transformers' Conv1D, which stores its weight as (in, out).
CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
GPTQ_CONFIG = "quantize_config.json"


@final
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a base model by key, its files, and notes about how they were read.

    Attributes
    ----------
    files
        While they are held here, nobody reads the header of a GGUF model again (`open_gguf`).
    config
        The content of ``config.json``, or what the metadata of a GGUF file says; empty without one.
    float8
        Key of each float8 weight that has scales → the dtype it is stored in, and the scale of each of its numbers.
    coded
        Key of each weight that is stored as codes of a few bits → its codes and their grid.
    """

    tensors: Mapping[str, LazyArray]
    files: ModelFiles
    config: dict[str, Any]
    notes: tuple[Finding, ...] = ()
    float8: Mapping[str, tuple[np.dtype[Any], LazyArray]] = field(default_factory=dict)
    coded: Mapping[str, "CodedWeight"] = field(default_factory=dict)

    @property
    def conv1d(self) -> bool:
        """Whether the model stores its linear weights as (in, out); GGUF files never do."""
        return self.config.get("model_type") in CONV1D and not self.files.gguf


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint whose weights can be read as numbers.

    Parameters
    ----------
    path : Path
        A safetensors file; a GGUF file, or any part of a split one; a folder with one file, with shards and their
        index, or with the component folders of a pipeline (``unet/…``: their tensors come as ``unet.…``); a model's
        folder of a Hub cache (``models--org--name``); or a Hub id that the local cache holds.

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
    files, plain_config = model_files(path), model_config(path) or {}
    if gguf := files.gguf:
        return Checkpoint(gguf.tensors, files, plain_config, gguf.notes, coded=gguf.coded)
    # The configuration is read separately, as a single file may be given.
    stored, config = files.tensors, _quantised_config(path)
    _refuse_adapter(stored, path)
    with place(path):
        low_bit = _coded_tensors(stored, config)
        decoded = low_bit.floats(stored)
        check_not_quantised(decoded, config)
        floats = dequantise(decoded, config)
    # The doctor needs the stored dtypes and scales to predict how a merge is rounded.
    float8 = {key: (stored[key].dtype, scale) for key, scale in floats.scales.items()}
    return Checkpoint(floats.floats, files, plain_config, (*low_bit.notes(), *floats.notes), float8, low_bit.coded)


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
    path = resolve_path(path)
    gguf = _gguf_model(path)
    if gguf:
        return {key: tensor.shape for key, tensor in gguf.tensors.items()}
    stored, config = model_files(path).tensors, _quantised_config(path)
    _refuse_adapter(stored, path)
    with place(path):
        decoded = _coded_tensors(stored, config).floats(stored)
        check_not_quantised(decoded, config, only_shapes=True)
    return {key: tensor.shape for key, tensor in decoded.items()}


def _refuse_adapter(keys: Iterable[str], path: Path) -> None:
    """Refuse an adapter that was given as a model; its message would otherwise be about dtypes or missing weights.

    Raises
    ------
    OptionError
        Every key is that of a factor.
    """
    listed = list(keys)
    # A PEFT model that was saved unmerged has factors too, and weights beside them.
    if any("lora_" in key for key in listed) and all("lora_" in key or key.endswith(".alpha") for key in listed):
        raise OptionError(f"{path}: is an adapter and not a model", fix="give the base model that it was trained on")


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


def _gguf_model(path: Path) -> "GgufModel | None":
    """The GGUF model at a path; None if there is none."""
    paths = gguf_paths(path)
    if not paths:
        return None
    from loralens.formats.models.gguf_base import open_gguf

    return open_gguf(paths)


def _coded_tensors(stored: Mapping[str, LazyArray], config: dict[str, Any] | None) -> "CodedTensors":
    """The weights of a folder or file of safetensors that are stored as codes."""
    from loralens.formats.models.low_bit.layouts import coded_tensors

    return coded_tensors(stored, config, conv1d=(config or {}).get("model_type") in CONV1D)
