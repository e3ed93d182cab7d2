"""Which weights of a GGUF model in floats llama.cpp quantises, and in which type.

The rules are those of ``llama-quantize`` (``tensor_allows_quantization`` in llama.cpp's llama-quant.cpp) for the
architectures that are read here. Where ``llama-quantize`` would store the head as Q6_K, the head becomes Q8_0 here.
Like Q6_K, Q8_0 is finer than the type of the other weights, and ggml's Python package, whose bits a merge reproduces,
cannot make Q6_K.
"""

from loralens.core.names import some
from loralens.formats.files.gguf.types import TENSOR_TYPES
from loralens.formats.models.gguf_base import GgufModel
from loralens.formats.models.gguf_writer import NewTypes
from loralens.linalg.codes import GGML_BLOCK, Q4_1, Q8_0
from loralens.tables.numbers import count

# The numbers of general.file_type (llama_ftype in llama.h) by the type of most weights.
FILE_TYPES = {Q4_1.number: 3, Q8_0.number: 7}
FLOATS = ("F32", "F16", "BF16")
# Small matrices, or ones that are no linear layers, by a part of their name.
LEFT_IN_FLOATS = (
    "_norm.weight", "ffn_gate_inp", "position_embd.weight", "token_types.weight", "attn_rel_b.weight", "ssm_conv1d",
    "shortconv.conv.weight", "altup", "laurel", "per_layer_model_proj",
)  # fmt: skip
HEAD, EMBEDDING = "output.weight", "token_embd.weight"


def block_types(model: GgufModel, number: int, *, new_head: bool = False) -> tuple[NewTypes, str]:
    """What the weights of a model in floats become, and a sentence on what is quantised and what stays as it is.

    Parameters
    ----------
    model : GgufModel
    number : int
        ggml's number of the type of most weights: Q4_1 or Q8_0.
    new_head : bool
        Whether a head is added, which stays in floats.
    """
    names = {name for header in model.headers for name in header.infos}
    # Without a head of its own, the model multiplies by the embedding.
    head = HEAD if new_head or HEAD in names else EMBEDDING
    kinds: dict[str, int] = {}
    floats = ["the new head"] if new_head else []
    for key, weight in model.weights.items():
        info = model.info(weight)
        if len(info.shape) < 2:
            continue
        if TENSOR_TYPES[info.kind].name in FLOATS and _is_quantised(weight.tensor, info.shape):
            kinds[key] = Q8_0.number if weight.tensor == head else number
        else:
            floats.append(weight.tensor)
    own = sum(kind == number for kind in kinds.values())
    text = f"{count(own, 'weight')} become {TENSOR_TYPES[number].name}"
    if own < len(kinds):
        text += f" and the head {TENSOR_TYPES[Q8_0.number].name}"
    float_names = f"{some(list(dict.fromkeys(floats)), 3)} and vectors" if floats else "vectors"
    return NewTypes(kinds, FILE_TYPES[number]), f"{text}; {float_names} stay floats"


def _is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp quantises a stored tensor with this name and shape."""
    return name.endswith("weight") and shape[-1] % GGML_BLOCK == 0 and not any(part in name for part in LEFT_IN_FLOATS)
