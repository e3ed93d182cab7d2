"""GGUF models as bases: their weights under Hugging Face's names, in Hugging Face's order of rows.

==================  ============================================  =======================================
..                  in the file                                   here
==================  ============================================  =======================================
names               llama.cpp's (``blk.3.attn_q.weight``)         Hugging Face's (``model.layers.3.…``)
rows of q and k     RoPE pairs neighbouring rows (some families)  RoPE pairs rows half a head apart
norms of Gemma      1 + weight                                    weight
stacks of experts   one tensor for all experts                    one matrix for each expert
GPT-2's matrices    (out, in)                                     the same, though its checkpoints are (in, out)
==================  ============================================  =======================================

A tensor with an unknown name keeps its llama.cpp name.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, final
from weakref import WeakValueDictionary

import numpy as np

from loralens.core.adapter import Finding
from loralens.core.lazy import LazyArray
from loralens.core.weights import CodedWeight
from loralens.errors import FormatError, place
from loralens.formats.dialects.gguf import EMBEDDING, STACK
from loralens.formats.dialects.gguf_architectures import (
    ARCHITECTURES,
    Architecture,
    Heads,
    heads_in,
    module_of,
    named_in_file,
    norm_of,
    rotary,
    unpermute,
)
from loralens.formats.files.gguf_file import (
    BROKEN,
    DTYPES,
    TENSOR_TYPES,
    GgufHeader,
    TensorInfo,
    Value,
    read_gguf_header,
)
from loralens.formats.models.low_bit.gguf_blocks import (
    Order,
    StoredRows,
    can_decode,
    coded_weight,
    float_rows,
    row_decoder,
)
from loralens.linalg.exact import Singles
from loralens.tables.numbers import count

ARCHITECTURE = "general.architecture"
# Field of config.json → key of GGUF behind the name of the architecture.
_FIELDS = {
    "hidden_size": "embedding_length", "num_hidden_layers": "block_count", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base", "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count", "sliding_window": "attention.sliding_window",
    "moe_intermediate_size": "expert_feed_forward_length",
}  # fmt: skip
# Field of rope_scaling → key of GGUF behind "rope.scaling.".
_SCALING = {
    "factor": "factor", "original_max_position_embeddings": "original_context_length",
    "attention_factor": "yarn_attn_factor", "extrapolation_factor": "yarn_ext_factor", "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}  # fmt: skip
# Of all models of Llama 3.1 to 3.3; the factor alone differs between them.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192
ROPE_THETA = 10000.0  # llama.cpp's default of rope.freq_base
# ids of tokens
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}


def base_architecture(values: Mapping[str, Value]) -> Architecture:
    """The architecture of a GGUF model.

    Raises
    ------
    FormatError
        The file does not hold a model, or the weight names of its architecture are not known.
    """
    kind, name = _plain(values, "general.type"), _plain(values, ARCHITECTURE)
    if kind not in (None, "model"):
        fix = "give the GGUF file of the model itself"
        raise FormatError(f"is a GGUF file of type {kind!a:.40}, not a model", fix=fix)
    architecture = named_in_file(name)
    if architecture is None:
        names = ", ".join(each.name for each in ARCHITECTURES)
        what = f"its architecture is {name!a:.40}, whose weight names are not known here (known: {names})"
        raise FormatError(what, fix="give the model that it was converted from, a folder with safetensors files")
    return architecture


def heads_of_gguf(values: Mapping[str, Value], arch: Architecture) -> Heads | None:
    """The numbers of heads, if all blocks have the same; None if the file states none, or if blocks differ."""
    q = _one_number(_plain(values, f"{arch.name}.attention.head_count"))
    kv = _one_number(_plain(values, f"{arch.name}.attention.head_count_kv", q))
    if q is None or kv is None:
        return None
    if not (0 < q < 1 << 20 and 0 < kv < 1 << 20):
        raise FormatError(f"{q} and {kv} are not numbers of heads (queries; keys and values)", fix=BROKEN)
    return Heads(q, kv)


def gguf_config(
    values: Mapping[str, Value], arch: Architecture, infos: Mapping[str, TensorInfo], tensors: Mapping[str, LazyArray]
) -> dict[str, Any]:
    """The fields of config.json that the metadata has, and what the stored tensors say."""
    routed = any(name.endswith(f"{STACK}.weight") for name in infos)
    mixtral = arch.name == "llama" and routed
    # All members of a family can be loaded as the first of its classes and types. Mixtral's architecture is Llama's.
    own_class, own_type = ("MixtralForCausalLM", "mixtral") if mixtral else (arch.classes[0], arch.types[0])
    config: dict[str, Any] = {"architectures": [own_class], "model_type": own_type}
    config |= _stated(values, f"{arch.name}.", _FIELDS) | _stated(values, "tokenizer.ggml.", _TOKENS)
    kind = _plain(values, f"{arch.name}.rope.scaling.type")
    scaling: dict[str, Any] = {}
    # How the model scales positions beyond those that it was trained on.
    if isinstance(kind, str) and kind != "none":
        scaling = {"rope_type": kind, **_stated(values, f"{arch.name}.rope.scaling.", _SCALING)}
    factors = tensors.get(ROPE_FACTORS)
    if not scaling and factors and factors.ndim == 1 and factors.dtype == np.float32 and factors.size <= MOST_FACTORS:
        scaling = _llama3_scaling(factors.read(), config.get("rope_theta", ROPE_THETA))
    if scaling:
        config["rope_scaling"] = scaling
    if f"{EMBEDDING}.weight" in infos:
        config["vocab_size"] = infos[f"{EMBEDDING}.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in infos
    keys = ("general.base_model.0.repo_url", "general.base_model.0.name", "general.name")
    name = next((each for each in (_plain(values, key) for key in keys) if isinstance(each, str) and each), None)
    if name:
        config["_name_or_path"] = name.removeprefix("https://huggingface.co/")
    return config


def _stated(values: Mapping[str, Value], prefix: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """The numbers that the metadata state, by their fields in config.json."""
    numbers = {field: _one_number(_plain(values, prefix + key)) for field, key in fields.items()}
    return {field: number for field, number in numbers.items() if number is not None}


def _llama3_scaling(factors: Singles, theta: float) -> dict[str, Any]:
    """The scaling of Llama 3 that gives these factors; empty if none does.

    llama.cpp's converter states it in no key-value, and writes the factors as a tensor instead.
    """
    size = len(factors)
    wavelengths = 2 * np.pi * np.power(float(theta), np.arange(size) / size)
    largest = float(factors.max(initial=1.0))
    # 1 for short waves, the factor for long ones, and a straight line between the frequencies of both.
    between = (LLAMA3_CONTEXT / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
    smooth = np.clip(between, 0.0, 1.0)
    expected = 1 / ((1 - smooth) / largest + smooth)
    if not np.allclose(factors, expected, rtol=1e-3):
        return {}
    return {
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }


def _plain(values: Mapping[str, Value], key: str, default: Any = None) -> Any:
    """The value of a key; a float32 as the shortest decimal number that stands for it, as in config.json."""
    if key not in values:
        return default
    value = values[key]
    return float(str(np.float32(value.value))) if value.kind == "f32" and not value.array else value.value


def _one_number(value: Any) -> Any:
    """A number, or the number that all blocks share; None for anything else."""
    if isinstance(value, list) and value and all(each == value[0] for each in value):
        value = value[0]
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


ROPE_FACTORS = "rope_freqs.weight"
MOST_FACTORS = 1 << 12  # half of the width of a head, which is 64 or 128 in most models
_SHOWN = 6  # most names that a message lists


class StoredWeight(NamedTuple):
    """Where a weight is stored.

    Attributes
    ----------
    part
        The number of its file, from 0.
    tensor
        llama.cpp's name of the stored tensor.
    expert
        The number of the expert, where the stored tensor is a stack of them.
    order
        The position in the stored tensor of every row; None: in order.
    shift
        The constant that the file adds to its numbers.
    """

    part: int
    tensor: str
    expert: int | None = None
    order: Order | None = None
    shift: float = 0.0


@final
@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class GgufModel:
    """A GGUF model.

    Attributes
    ----------
    paths : tuple of Path
        Its files: one, or the parts in order.
    headers : tuple of GgufHeader
        The header of each file.
    architecture : Architecture
    config : mapping
        What config.json would say.
    weights : mapping of str to StoredWeight
        Every weight by its key, in the order of the files.
    tensors : mapping of str to LazyArray
        The same keys → numbers: float32 where they are decoded, else the stored dtype.
    coded : mapping of str to CodedWeight
        The matrices that are stored as codes. Those of a type without a layout here have no grid.
    notes : tuple of Finding
    """

    paths: tuple[Path, ...]
    headers: tuple[GgufHeader, ...]
    architecture: Architecture
    config: Mapping[str, Any]
    weights: Mapping[str, StoredWeight]
    tensors: Mapping[str, LazyArray]
    coded: Mapping[str, CodedWeight]
    notes: tuple[Finding, ...]

    def info(self, weight: StoredWeight) -> TensorInfo:
        """The entry of the stored tensor in the header."""
        return self.headers[weight.part].infos[weight.tensor]

    def raw(self, key: str) -> LazyArray:
        """The bytes of a weight in the order of the file. For an expert, these are its part of the stored tensor."""
        weight = self.weights[key]
        header, info = self.headers[weight.part], self.info(weight)
        # One expert is a part of the stored tensor; all experts have the same size.
        nbytes = info.nbytes // (1 if weight.expert is None else info.shape[0])
        begin = header.start + info.begin + (weight.expert or 0) * nbytes
        return header.file.array(begin, (nbytes,), np.dtype(np.uint8))

    def stored(self, key: str) -> LazyArray:
        """A weight as it is hashed: numbers in Hugging Face's order if it is stored in floats, else `raw` bytes."""
        return self.tensors[key] if self.info(self.weights[key]).kind in DTYPES else self.raw(key)


# Models that are in use. A verb opens the same model several times, and skipping its vocabulary alone takes 40 ms.
_IN_USE: WeakValueDictionary[tuple[Path, ...], GgufModel] = WeakValueDictionary()


def open_gguf(paths: tuple[Path, ...]) -> GgufModel:
    """Open a GGUF model. Only headers are read, and not again while the model is in use and its files are the same.

    Raises
    ------
    FormatError
        A file is damaged, or its architecture is not known.
    MismatchError
        The rows of q or k cannot be divided into heads.
    """
    files = tuple(path.absolute() for path in paths)
    model = _IN_USE.get(files)
    if model is None or not all(header.file.is_unchanged for header in model.headers):
        model = _IN_USE[files] = _read_gguf(paths)
    return model


def _read_gguf(paths: tuple[Path, ...]) -> GgufModel:
    headers = tuple(read_gguf_header(path) for path in paths)
    with place(paths[0]):
        values = headers[0].values
        arch = base_architecture(values)
        _check_parts(headers)
        infos = {name: info for header in headers for name, info in header.infos.items()}
        heads = heads_of_gguf(values, arch)
        weights: dict[str, StoredWeight] = {}
        for part, header in enumerate(headers):
            for name, info in sorted(header.infos.items(), key=lambda item: item[1].begin):
                with place(name):
                    if not info.shape or not prod(info.shape):
                        raise FormatError(f"{TENSOR_TYPES[info.kind].name} {info.shape} holds no numbers", fix=BROKEN)
                    for key, weight in _weights(part, name, info, arch, heads):
                        if key in weights:
                            what = f"is the same weight of the model as {weights[key].tensor}"
                            raise FormatError(what, fix="convert the model again")
                        weights[key] = weight
    tensors: dict[str, LazyArray] = {}
    coded: dict[str, CodedWeight] = {}
    for key, weight in weights.items():
        tensors[key], codes = _numbers(headers[weight.part], weight)
        if codes:
            coded[key] = codes
    config, notes = gguf_config(values, arch, infos, tensors), tuple(_notes(infos, weights))
    return GgufModel(paths, headers, arch, config, weights, tensors, coded, notes)


def _check_parts(headers: tuple[GgufHeader, ...]) -> None:
    """Refuse parts that do not belong to one model."""
    fix = "download the parts of one model again"
    for number, header in enumerate(headers if len(headers) > 1 else ()):
        stated = [header.values[key].value for key in ("split.no", "split.count") if key in header.values]
        if stated != [number, len(headers)]:
            what = f"part {number + 1} says split.no, split.count = {stated}, but there are {len(headers)} parts"
            raise FormatError(what, fix=fix)
    names = Counter(name for header in headers for name in header.infos)
    if max(names.values(), default=0) > 1:
        raise FormatError("two of its parts hold the same tensor", fix=fix)


def _weights(
    part: int, name: str, info: TensorInfo, arch: Architecture, heads: Heads | None
) -> Iterator[tuple[str, StoredWeight]]:
    """The keys that a stored tensor has here: one, or one for each expert of a stack."""
    base, _, parameter = name.rpartition(".")
    if base.endswith(STACK) and parameter == "weight" and len(info.shape) == 3:
        experts = [module_of(base, arch, e) for e in range(info.shape[0])]
        # The family has these names for all of its experts or for none.
        if all(experts):
            for e, module in enumerate(experts):
                yield f"{module}.weight", StoredWeight(part, name, e)
            return
    module = module_of(base, arch)
    norm = None if module else norm_of(base, arch)
    target = module or norm
    if target is None or parameter not in ("weight", "bias"):
        yield name, StoredWeight(part, name)
        return
    # The sinks of gpt-oss are a parameter of the attention itself.
    key = target if target.endswith(".sinks") else f"{target}.{parameter}"
    shift = arch.shift if norm and parameter == "weight" and len(info.shape) == 1 else 0.0
    yield key, StoredWeight(part, name, None, _order(base, info, arch, heads), shift)


def _order(base: str, info: TensorInfo, arch: Architecture, heads: Heads | None) -> Order | None:
    """The position in the file of every row of a q or k projection; None where the rows are in order."""
    if not (arch.permuted and rotary(base)):
        return None
    if heads is None:
        what = "llama.cpp reordered its rows by heads, but the metadata states no number of heads that all blocks share"
        raise FormatError(what, fix="convert the model again with a current llama.cpp")
    out = info.shape[0]
    return unpermute(np.arange(out), heads_in(rotary(base), heads, out))


def _numbers(header: GgufHeader, weight: StoredWeight) -> tuple[LazyArray, CodedWeight | None]:
    """The numbers of a weight, and its codes if it is a matrix of codes."""
    info, expert, shift = header.infos[weight.tensor], weight.expert, weight.shift
    position = header.start + info.begin
    if info.kind in DTYPES:
        tensor = header.file.array(position, info.shape, DTYPES[info.kind])
        if expert is not None:
            tensor = tensor.rows(expert, expert + 1).reshape(*info.shape[1:])
        if weight.order is not None:
            tensor = float_rows(tensor, weight.order)
        if shift:
            plain = lambda numbers: numbers.astype(np.float32) - np.float32(shift)  # noqa: E731
            tensor = tensor.map(plain, shape=tensor.shape, dtype=np.float32)
        return tensor, None
    type_ = TENSOR_TYPES[info.kind]
    row_bytes = info.shape[-1] // type_.numbers * type_.nbytes
    raw = header.file.array(position, (info.nbytes // row_bytes, row_bytes), np.dtype(np.uint8))
    shape, order = info.shape, weight.order
    if expert is not None:
        shape = info.shape[1:]
        order = np.arange(expert * shape[0], (expert + 1) * shape[0])
    rows = StoredRows(raw, order)
    # A vector has one row of blocks, which cannot be read in parts.
    stacked = shape if len(shape) > 1 else (1, *shape)
    read = row_decoder(rows, info.kind, stacked, name=weight.tensor)
    tensor = LazyArray(lambda: read(0, stacked[0]), shape=stacked, dtype=np.float32, rows=read).reshape(*shape)
    matrix = len(shape) == 2
    return tensor, coded_weight(rows, info.kind, (shape[0], shape[1]), stored=weight.tensor) if matrix else None


def _notes(infos: Mapping[str, TensorInfo], weights: Mapping[str, StoredWeight]) -> Iterator[Finding]:
    """What the reader noticed: types, names that are not known, and tensors that cannot be decoded."""
    types: dict[int, list[str]] = {}
    for name, info in infos.items():
        if info.kind not in DTYPES:
            types.setdefault(info.kind, []).append(name)
    if types:
        listed = ", ".join(f"{len(names)} of {TENSOR_TYPES[kind].name}" for kind, names in types.items())
        yield Finding("note", "gguf", f"weights are decoded to float32 when they are read: {listed}")
    for kind, names in types.items():
        if not can_decode(kind):
            stored = f"{count(len(names), 'tensor')} stored as {TENSOR_TYPES[kind].name}"
            text = f"cannot be decoded here: {stored} ({_first_names(names)})"
            yield Finding("warning", "undecodable", text, "give the model in another quantisation, such as Q4_K_M")
    unnamed = [key for key, weight in weights.items() if key == weight.tensor]
    if unnamed:
        text = f"llama.cpp's name is kept for {count(len(unnamed), 'tensor')}, for lack of a known Hugging Face name"
        yield Finding("note", "names-unknown", f"{text}: {_first_names(unnamed)}")


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
