"""Opening the checkpoint of a base model. Only headers are read until numbers are needed.

Verbs that can take a base import this module, also where none is given. The readers of GGUF and of low-bit layouts are
therefore imported by the functions that open a base.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from loralens.core.adapter import Finding
from loralens.core.lazy import Array, LazyArray
from loralens.core.model_in_memory import ModelInMemory, ModelPath
from loralens.errors import FormatError, OptionError, place
from loralens.formats.files.container import Stored, read_json
from loralens.formats.models.model_files import (
    BESIDE,
    ModelFiles,
    WeightFile,
    gguf_paths,
    model_files,
    resolve_path,
)

if TYPE_CHECKING:
    from loralens.core.weights import CodedWeight
    from loralens.formats.models.gguf_base import GgufModel


SCALES = ("_scale_inv", "_scale")
BLOCK = [128, 128]  # the default of transformers' finegrained_fp8

Tensors = Mapping[str, LazyArray]


def dequantise(tensors: Tensors, config: Mapping[str, Any] | None) -> tuple[dict[str, LazyArray], dict[str, LazyArray]]:
    """The tensors of a checkpoint with float8 weights as float32, multiplied by their scales, and without the scales.

    The second mapping has the scale of each number of these weights, float32. A FormatError if the shape of a scale
    fits no rule.
    """
    # E8M0 is a type of scales, not of weights.
    weights = [
        key for key, t in tensors.items() if t.ndim and t.dtype.name.startswith("float8") and "e8m0" not in t.dtype.name
    ]
    # Of two scales, the first end in SCALES counts.
    scaled = {key: key + end for key in weights for end in reversed(SCALES) if key + end in tensors}
    if not scaled:
        return {**tensors}, {}
    section = (config or {}).get("quantization_config")
    size = section.get("weight_block_size") if isinstance(section, dict) else None
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        size = BLOCK
    hidden, block = {*scaled.values()}, tuple(size)
    floats, scales = {}, {}
    for key, tensor in tensors.items():
        if key in scaled:
            with place(key):
                floats[key], scales[key] = _scaled(tensor, tensors[scaled[key]], block)
        elif key not in hidden and key.rpartition(".")[2] not in BESIDE:
            floats[key] = tensor
    return floats, scales


def _scaled(tensor: LazyArray, scale: LazyArray, block: tuple[int, ...]) -> tuple[LazyArray, LazyArray]:
    """A weight times its scale, and the scale of each of its numbers; rows can be read separately."""
    shape, counts = tensor.shape, scale.shape
    # A single scale, with or without axes; or one for each row, stored without the axes of length 1.
    if scale.size == 1 or counts == shape[:1]:
        counts = (scale.size, *(1,) * (len(shape) - 1))
    # Blocks are two-dimensional: the axes in front of the last two (experts) have their own scales. An axis with one
    # scale shares it, and an axis with as many scales as numbers is not in blocks.
    sizes = (*(1,) * (len(shape) - 2), *block)[-len(shape) :]
    if len(counts) != len(shape) or not all(
        count in (1, n, -(-n // size)) for n, count, size in zip(shape, counts, sizes, strict=True)
    ):
        what = f"a float8 weight {shape} with scales {scale.shape} and blocks of {block[0]} × {block[1]}"
        fix = "keep config.json beside the weights: it says the block size; or give the model in 16 bits"
        raise FormatError(what, fix=fix)

    def spread(start: int, stop: int) -> Array:
        ends = ((start, stop), *((0, n) for n in shape[1:]))
        index = [
            np.arange(*(end if count > 1 else (1,))) // (1 if count == n else size)
            for end, n, count, size in zip(ends, shape, counts, sizes, strict=True)
        ]
        factor = scale.read().astype(np.float32).reshape(counts)[np.ix_(*index)]
        return np.broadcast_to(factor, (stop - start, *shape[1:]))

    def rows(start: int, stop: int) -> Array:
        product = tensor.rows(start, stop).read().astype(np.float32)
        product *= spread(start, stop)  # in place, without a second copy of the weight
        return product

    product, scales = (
        LazyArray(partial(read, 0, shape[0]), shape=shape, dtype=np.float32, rows=read if tensor.streams else None)
        for read in (rows, spread)
    )
    return product, scales


# Methods of ``quantization_config`` that store float8 weights with scales. Some of them can also store codes, and the
# name of the method does not say which of the two a model has.
FLOAT8_METHODS = frozenset({"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt"})
# method of quantisation → ends of keys, all of which its models have. The first match counts: if the files of one
# method also contain the ends of another, the first is listed earlier.
QUANTISATIONS = {
    # Files of older versions, which have no quant_state. With one they can be read.
    "bitsandbytes 4-bit": (".absmax", ".quant_map"),
    # GPTQ and AWQ come here only in packings that cannot be read.
    "GPTQ": (".qweight", ".g_idx"),
    "AWQ": (".qweight", ".qzeros", ".scales"),
    "compressed-tensors": (".weight_packed",),
    "HQQ": (".W_q",),
    "AQLM": (".codebooks", ".codes"),
    "quanto": (".weight._data",),
}


def check_not_quantised(tensors: Tensors, config: Mapping[str, Any] | None, *, only_shapes: bool = False) -> None:
    """Refuse a base whose weights are stored as codes.

    With ``only_shapes``, codes that have the keys and the shapes of the weights are accepted.

    Raises
    ------
    FormatError
        It is quantised. The message names the method and, if the configuration does, the model it was made from.
    """
    section = (config or {}).get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    # The method that ``config.json`` names, unless it may store float8 weights.
    stated = ascii(method)[1:-1][:40] if isinstance(method, str) and method not in FLOAT8_METHODS else ""
    found = (n for n, ends in QUANTISATIONS.items() if all(any(key.endswith(end) for key in tensors) for end in ends))
    name = next(found, "")
    # GPTQ without g_idx has the keys of AWQ, so only the configuration tells them apart.
    name = "GPTQ" if name == "AWQ" and stated == "gptq" else name
    # Weights are matrices of floating point numbers. Matrices of integers are codes of a method not listed above.
    matrices = (t.dtype for key, t in tensors.items() if key.endswith(".weight") and t.ndim >= 2)
    if not name and not only_shapes and any(np.issubdtype(dtype, np.integer) for dtype in matrices):
        name = stated or "integer"
    if name:
        source = (config or {}).get("_name_or_path")
        source_text = f" ({ascii(source)[1:-1][:80]})" if isinstance(source, str) and "/" in source else ""
        fix = "give the 16-bit model it was made from: an adapter that was trained on the quantised base fits it"
        raise FormatError(f"its weights are quantised: {name}{source_text}", fix=fix)


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
        Key of each quantised weight → its codes and their grid.
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


def open_checkpoint(base: ModelPath, *, only_shapes: bool = False) -> Checkpoint:
    """Open a checkpoint whose weights can be read as numbers.

    Parameters
    ----------
    base : path or ModelInMemory
        A safetensors file; a GGUF file, or any part of a split one; a folder with one file, with shards and their
        index, or with the component folders of a pipeline (``unet/…``: their tensors come as ``unet.…``); a model's
        folder of a Hub cache (``models--org--name``); or a Hub id that the local cache holds.
    only_shapes : bool
        Accept codes that have the keys and the shapes of the weights: no number will be read.

    Returns
    -------
    Checkpoint
        Quantised weights, and float8 weights with scales beside them, are float32. They
        are decoded when they are read, and have the keys and shapes of float weights. Their other stored tensors, such
        as scales, are left out. Weights of a GGUF file have Hugging Face's names and order of rows.

    Raises
    ------
    OptionError, FormatError
        There is no such path, a shard is missing, the weights are not in a safetensors file, or they are quantised in a
        form that is not read here. Keys, dtypes and ``config.json`` show that; no number of a weight is read.
    """
    if isinstance(base, ModelInMemory):
        # It has no files. Its tensors stand for those that a file would store.
        tensors = base.tensors
        shards = (WeightFile(str(base), "", Stored(tensors)),)
        return Checkpoint(tensors, ModelFiles(Path(str(base)), shards, ()), base.config)
    path = resolve_path(Path(base))
    files, plain_config = model_files(path), model_config(path) or {}
    if gguf := files.gguf:
        return Checkpoint(gguf.tensors, files, plain_config, gguf.notes, coded=gguf.coded)
    from loralens.formats.models.low_bit.layouts import decode_low_bit

    # The configuration is read separately, as a single file may be given.
    stored, config = files.tensors, _quantised_config(path)
    # Otherwise the message would be about dtypes or missing weights. A PEFT model that was saved unmerged has factors
    # too, and weights beside them.
    if any("lora_" in key for key in stored) and all("lora_" in key or key.endswith(".alpha") for key in stored):
        raise OptionError(f"{path}: is an adapter and not a model", fix="give the base model that it was trained on")
    with place(path):
        decoded, coded = decode_low_bit(stored, config, conv1d=plain_config.get("model_type") in CONV1D)
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
    return Checkpoint(floats, files, plain_config, tuple(notes), float8, coded)


def weights(base: ModelPath) -> Mapping[str, LazyArray]:
    """The tensors of `open_checkpoint`."""
    return open_checkpoint(base).tensors


def shapes(base: ModelPath) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, for callers that need no numbers.

    Raises
    ------
    OptionError, FormatError
        As for `open_checkpoint`, but a quantised base is refused only if it does not store weights in their own shape.
    """
    return {key: tensor.shape for key, tensor in open_checkpoint(base, only_shapes=True).tensors.items()}


def model_config(base: ModelPath) -> dict[str, Any] | None:
    """The content of ``config.json`` in the folder of a base model; None if there is none.

    For a GGUF model it is what the metadata of the file says.

    Raises
    ------
    FormatError
        The file is damaged, or its model type is not text.
    """
    if isinstance(base, ModelInMemory):
        return base.config or None
    folder = resolve_path(Path(base))
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
