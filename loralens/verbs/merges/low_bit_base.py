"""Quantised bases as inputs of a merge: the outputs that fit them, and the base of a QLoRA adapter."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from loralens.choices import MergeBits
from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.core.messages import note, warn
from loralens.core.names import block, some
from loralens.core.weights import CodedWeight
from loralens.errors import LEAVE_OUT, MismatchError, OptionError
from loralens.formats.models.checkpoint import CONV1D, Checkpoint
from loralens.formats.models.model_files import ModelFiles
from loralens.linalg.codes import Q4_1, Q8_0, BlockType
from loralens.merging.codec import PARTS, Part, check_movable, decoded_block
from loralens.merging.merge_plan import MergePlan, TensorPlan, as_matrix

if TYPE_CHECKING:
    from loralens.formats.models.gguf_writer import NewTypes

# Endings of names of quantised models, as their makers write them.
_QUANTISED = re.compile(r"[-_. ](bnb|gguf|gptq|awq|exl2|mlx|fp4|nf4|int4|int8|[2-8]bit|w[48]a\d+|i?q\d\w*)(?![a-z0-9])")
# As transformers writes it for BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").
NF4_CONFIG = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}
# The block types of ggml that --bits can name.
GGUF_BITS: dict[str, BlockType] = {"q4_1": Q4_1, "q8_0": Q8_0}
LOOKED_AT = 4  # weights that are looked at: all weights of a model are stored alike


def check_bits(
    base: str,
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    *,
    bits: MergeBits | None,
    dtype: str | None,
) -> None:
    """Refuse an output that does not fit the base.

    If an adapter was trained on a low-bit base and is merged into floats, a message says into which floats.

    Raises
    ------
    OptionError
        A low-bit base with neither ``bits`` nor ``dtype``, or with codes other than its own; codes to be kept although
        the base has floats; or new codes for a base that is a decoded low-bit model, which would lose the adapter.
    """
    if checkpoint.coded:
        kinds = Counter(weight.layout for weight in checkpoint.coded.values())
        layouts = " and ".join(kinds)
        if bits is None and dtype is None:
            movable = any(weight.grid for weight in checkpoint.coded.values())
            keep = "--bits keep, which moves the codes, or " if movable else ""
            raise OptionError(
                f"{base}: its weights are quantised ({layouts})",
                fix=f"give {keep}--dtype bf16, which writes floats",
            )
        if bits not in (None, "keep"):
            raise OptionError(
                f"{base}: its weights are codes ({layouts}), and quantising their floats again loses the adapter",
                fix="give --bits keep, or merge into the original 16-bit model",
            )
        return
    if bits == "keep":
        raise OptionError(f"{base}: its weights are floats, so there are no codes to keep", fix="leave out --bits")
    quantised = [adapter.base_model for adapter in adapters if names_quantised(adapter.base_model)]
    size = decoded_block_of(checkpoint.tensors) if quantised or bits else None
    if size and bits:
        raise OptionError(
            f"{base}: its floats are a decoded 4-bit model (blocks of {size}), and quantising it again loses the "
            "adapter: almost every sum is rounded to the code that it came from",
            fix="merge into the original 16-bit model, or keep codes: give the 4-bit model and --bits keep",
        )
    if quantised and size:
        note(f"trained on {quantised[0]}, and {base} is its decoded copy: the merged model is what was trained")
        warn("quantising the merged model again would lose the adapter", "keep it in floats, or use --bits keep")
    elif quantised:
        note(f"trained on {quantised[0]} and merged into the original weights, which usually preserves it")


def check_codes(plan: MergePlan, coded: Mapping[str, CodedWeight]) -> None:
    """Refuse a plan that cannot be merged into codes.

    Raises
    ------
    MismatchError, FormatError
        The message names the tensor.
    """
    if not coded:
        raise MismatchError(
            f"the adapter changes no weight that is stored as codes ({some(list(plan.tensors), 3)})",
            fix="write the merged model in floats: --dtype bf16",
        )
    homes: dict[str, str] = {}
    for key, tensor in plan.tensors.items():
        if key in coded:
            check_movable(tensor, coded[key])
            _check_alone(key, coded[key], homes)
        elif tensor.base is None:
            raise MismatchError(
                f"{key}: the merged model needs it as a tensor of its own, and the base does not store it",
                fix="write the merged model in floats: --dtype bf16; or keep the tie with --keep-tied",
            )


def _check_alone(key: str, weight: CodedWeight, homes: dict[str, str]) -> None:
    """Refuse two weights whose codes lie in one stored tensor, which is written once; ``homes`` has those so far.

    Raises
    ------
    MismatchError
        The message names both.
    """
    # Rows that are parts of a stored tensor have positions of their own (experts of a GGUF stack).
    other = key if weight.row_order is not None else homes.setdefault(weight.stored, key)
    if other != key:
        raise MismatchError(
            f"{key} and {other}: their codes lie in one stored tensor ({weight.stored}), and a merge can move the "
            "codes of only one weight in a stored tensor",
            fix=f"write the merged model in floats: --dtype bf16; or {LEAVE_OUT}",
        )


class NewCodes(NamedTuple):
    """Weights of floats that the merged model stores as new codes.

    Attributes
    ----------
    keys
    types
        Their types, if the model is GGUF.
    """

    keys: frozenset[str] = frozenset()
    types: "NewTypes | None" = None


NO_CODES = NewCodes()


def quantised_plan(
    plan: MergePlan, files: ModelFiles, config: Mapping[str, Any], bits: MergeBits
) -> tuple[MergePlan, NewCodes]:
    """The plan of a merge in floats that is quantised once, and the weights that become codes.

    The matrices of the blocks become NF4. Embeddings and the head stay floats, as transformers leaves them. For a GGUF
    model, `block_types` decides what each weight becomes.

    Raises
    ------
    OptionError
        These codes cannot be written for this base.
    """
    if files.gguf and bits in GGUF_BITS:
        from loralens.formats.models.gguf_writer import block_types  # only for GGUF

        new_head = bool(plan.tensors.keys() - files.gguf.weights.keys())
        types, text = block_types(files.gguf, GGUF_BITS[bits].number, new_head=new_head)
        if not types.kinds:
            raise OptionError("it has no matrices that could become codes", fix="leave out --bits")
        return _with_codes(plan, files, types.kinds, text), NewCodes(frozenset(types.kinds), types)
    if files.gguf or bits != "nf4":
        base_kind, needed_kind = (
            ("a GGUF model", "a safetensors folder") if files.gguf else ("a safetensors folder", "GGUF models")
        )
        fitting = " or ".join(GGUF_BITS) if files.gguf else "nf4"
        raise OptionError(
            f"--bits {bits} is for {needed_kind}, and the base is {base_kind}",
            fix=f"give --bits {fitting}; or --dtype, and quantise the merged model with other software",
        )
    if config.get("model_type") in CONV1D:
        raise OptionError("its weights are stored as (in, out), which bitsandbytes turns", fix="give --dtype instead")
    tensors = files.tensors
    new = frozenset(
        key for key, t in tensors.items() if key.endswith(".weight") and t.ndim == 2 and block(key) is not None
    )
    if not new:
        raise OptionError("it has no matrices in blocks that could become codes", fix="leave out --bits")
    stated = config.get("torch_dtype") or config.get("dtype")
    compute_dtype = stated if isinstance(stated, str) else "float32"
    fields = {**plan.config, "quantization_config": {**NF4_CONFIG, "bnb_4bit_compute_dtype": compute_dtype}}
    text = f"{len(new)} matrices become NF4 codes; embeddings, the head and vectors stay floats"
    return replace(_with_codes(plan, files, new, text), config=fields), NewCodes(new)


def _with_codes(plan: MergePlan, files: ModelFiles, keys: Collection[str], text: str) -> MergePlan:
    """The plan with all weights that become codes, in the order of the file, and a sentence that says so."""
    tensors = files.tensors
    added = {
        key: TensorPlan(key, tensors[key], as_matrix(tensors[key].shape)) for key in keys if key not in plan.tensors
    }
    ordered = {key: plan.tensors.get(key) or added[key] for key in tensors if key in plan.tensors or key in added}
    unordered = {key: tensor for key, tensor in plan.tensors.items() if key not in ordered}
    return replace(plan, tensors={**ordered, **unordered}, notes=(*plan.notes, text))


def part_of(written: str, key: str) -> Part:
    """Which part of a quantised weight a stored tensor is."""
    return next(part for part in PARTS if written == key + part)


def names_quantised(name: str | None) -> bool:
    """Whether the name of a model says that its weights are quantised."""
    return bool(name and _QUANTISED.search(name.lower()))


def decoded_block_of(tensors: Mapping[str, LazyArray]) -> int | None:
    """The block of `decoded_block`, if the first matrices of a base are decoded 4-bit weights."""
    # Embeddings and heads stay floats in most low-bit models.
    matrices = [t for key, t in tensors.items() if key.endswith(".weight") and t.ndim == 2 and block(key) is not None]
    blocks = {decoded_block(tensor) for tensor in matrices[:LOOKED_AT]}
    return blocks.pop() if len(blocks) == 1 else None
