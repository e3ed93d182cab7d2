"""Converting the experts of mixture models between the layouts and names of PEFT, llama.cpp and mlx-lm.

PEFT adapts the parameters of transformers, where ``gate_up_proj`` holds gate and up of all experts: the rows of gate
above those of up, or alternating in gpt-oss. llama.cpp and mlx-lm have one stack for each. When a pair is split, both
halves share A, and each has its rows of B.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import itemgetter
from typing import NamedTuple

from loralens.core.adapter import Adapter
from loralens.core.base_model import text_config
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Layout, LowRank
from loralens.core.matching import EXPERT_PARTS
from loralens.core.names import expert, is_expert_alone
from loralens.core.structured import Update
from loralens.errors import LEAVE_OUT, OptionError, place
from loralens.formats.dialects.pairs import Fields
from loralens.formats.files.container import Stored
from loralens.formats.files.gguf_file import plain_values

FUSED = "gate_up_proj"
STACKS = (FUSED, "down_proj")  # the parameters of the experts in transformers
SPLITTING = ("gguf", "mlx")  # dialects with a stack of gate and another of up
_ALTERNATE = ("gpt_oss",)  # model types in which rows of gate and up alternate
# The mixture is a module of its layer: mlp in most models, block_sparse_moe in Mixtral, feed_forward in Jamba.
_LAYER = r"^(?P<path>.+)\.(?P<owner>mlp|block_sparse_moe|feed_forward)\."
# One expert of a stack, of transformers (experts) or of mlx-lm (switch_mlp): ….mlp.experts.gate_proj[3]
_STACKED = re.compile(_LAYER + r"(?:experts|switch_mlp)\.(?P<part>\w+)\[(?P<number>\d{1,9})\]$")
# A single expert, as in checkpoints: ….mlp.experts.3.gate_proj
_ALONE = re.compile(_LAYER + r"experts\.(?P<number>\d{1,9})\.(?P<part>\w+)$")
# One expert of a stack of mlx-lm.
_SWITCH = re.compile(_LAYER + r"switch_mlp\.(?P<part>\w+)\[(?P<number>\d{1,9})\]$")
_ROUTER = re.compile(_LAYER + r"(?:gate|router|router\.layer)$")


class Names(NamedTuple):
    """mlx-lm's names for the mixture of a layer: the module, its stacks, its router."""

    owner: str
    stacks: str
    router: str


_MLP, _MIXTRAL = Names("mlp", "switch_mlp", "gate"), Names("block_sparse_moe", "switch_mlp", "gate")
_GRANITE = Names("block_sparse_moe", "switch_mlp", "router.layer")
_NAMES = {
    "mixtral phimoe minimax": _MIXTRAL,
    "granitemoe granitemoehybrid": _GRANITE,
    "qwen2_moe qwen3_moe qwen3_next olmoe deepseek deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe glm4_moe_lite "
    "ernie4_5_moe exaone_moe mellum": _MLP,
    "jamba": Names("feed_forward", "switch_mlp", "router"),
    "lfm2_moe": Names("feed_forward", "switch_mlp", "gate"),
    "gpt_oss": Names("mlp", "experts", "router"),
    "dots1": Names("mlp", "experts", "gate"),
}
# model type → names, as in mlx-lm of November 2026
MLX = {kind: names for kinds, names in _NAMES.items() for kind in kinds.split()}


def fit_experts(
    dialect: str, adapter: Adapter, *, base_config: Fields | None = None, arch: str | None = None
) -> Adapter:
    """An adapter of another dialect with the experts split and named as in ``dialect``.

    Parameters
    ----------
    dialect : str
    adapter : Adapter
    base_config : mapping, optional
        The content of the base's config.json.
    arch : str, optional
        The name of the architecture in llama.cpp or Hugging Face, if there is no config.json.

    Raises
    ------
    OptionError
        Nothing says what the dialect needs to know about the base.
    """
    if dialect == "gguf":
        return split_stacks(adapter, base_config or _config_of(arch))
    if dialect == "mlx":
        stated = plain_values(adapter.metadata).get("general.architecture") if adapter.format == "gguf" else None
        return name_for_mlx(adapter, base_config or _config_of(stated))
    return name_single_experts(adapter) if dialect == "peft" else adapter


def divide_as(adapter: Adapter, other: Adapter, base_config: Fields | None = None) -> Adapter:
    """The adapter with gate and up of its experts apart, if ``other`` is of llama.cpp or mlx-lm, which have them so.

    Raises
    ------
    OptionError
        Neither ``base_config``, the base's config.json, nor ``other`` says how the rows of gate and up are ordered.
    """
    if other.format not in SPLITTING or adapter.format in SPLITTING:
        return adapter
    return split_stacks(adapter, base_config or _config_of(plain_values(other.metadata).get("general.architecture")))


def _config_of(arch: object) -> Fields | None:
    """A configuration with the model type of an architecture.

    An architecture of llama.cpp stands for several model types. The one with experts matters here; llama.cpp calls
    Mixtral "llama", for example.
    """
    # Every writer of adapters imports this module, and few of them need the table of architectures.
    from loralens.formats.dialects.gguf_architectures import architecture

    family = architecture(arch)
    return {"model_type": next((kind for kind in family.types if kind in MLX), family.types[0])} if family else None


def model_type(config: Fields | None) -> str | None:
    """The model type in a base's config.json, in the part about text if it has one."""
    kind = text_config(config).get("model_type")
    return kind if isinstance(kind, str) else None


def split_stacks(adapter: Adapter, config: Fields | None) -> Adapter:
    """The adapter with every stack of gate and up split into one of each, and all stacks as updates (out, in).

    Parameters
    ----------
    adapter : Adapter
    config : mapping or None
        The content of the base's config.json. It says whether the rows of gate and up alternate, and which axis of a
        stack is that of the inputs. Without it the shapes of both stacks together tell the axis.

    Raises
    ------
    OptionError
        There are such stacks, and nothing says how their rows are ordered.
    """
    stacks = {name: part for name, module in adapter.items() if (part := _stack(name, module))}
    if not stacks:
        return adapter
    kind = model_type(config)
    # A stack of one part has no order of gate and up, so it needs no type of model.
    if kind is None and FUSED in stacks.values():
        raise OptionError(
            "the rows of gate and up form two halves in most models and alternate in gpt-oss, and the file does not "
            "say which model this is",
            fix="give the base's folder with --base",
        )
    turned = _are_transposed(adapter, stacks, config)
    modules: dict[str, Update] = {}
    for name, module in adapter.items():
        if name not in stacks:
            modules[name] = module
            continue
        with place(name):
            if turned:
                B, A = module.factors
                module = _expert_pair(A.T, B.T, module)
            # down_proj is a stack of its own in every software.
            if stacks[name] == FUSED:
                modules.update(_halves(name, module, alternate=kind in _ALTERNATE))
            else:
                modules[name] = module
    return replace(adapter, modules=modules)


def _stack(name: str, module: Update) -> str | None:
    """The stack of transformers to which a module belongs as an expert; None if it is not an expert."""
    member = expert(name)
    if member is None or module.layout.kind != "experts":
        return None
    return next((part for part in STACKS if member.stack.endswith(f".experts.{part}")), None)


def _are_transposed(adapter: Adapter, stacks: Mapping[str, str], config: Fields | None) -> bool:
    """Whether the updates of the stacks are (in, out).

    In PEFT this is the case for some models, and up to version 0.18 for most. The hidden size of the base decides, then
    the shapes of the two stacks, and at last the layout that the reader found.
    """
    hidden = text_config(config).get("hidden_size")
    shapes = {part: adapter[name].shape for name, part in stacks.items()}
    # The side of the hidden state: the inputs of gate and up, and the outputs of down.
    sides = [shape[::-1] if part == FUSED else shape for part, shape in shapes.items()]
    votes = {bool(outside == hidden) for inside, outside in sides if inside != outside and hidden in (inside, outside)}
    if len(shapes) == 2 and not votes:
        (out, in_), (other_out, other_in) = shapes[FUSED], shapes["down_proj"]
        # gate_up has twice as many outputs as down has inputs, and as many inputs as down has outputs.
        fits = {False: (out, in_) == (2 * other_in, other_out), True: (in_, out) == (2 * other_out, other_in)}
        votes = {transposed for transposed, fit in fits.items() if fit}
    if len(votes) == 1:
        return votes.pop()
    transposed = next(adapter[name].layout.transposed for name in stacks)
    return transposed and model_type(config) not in _ALTERNATE


def _expert_pair(B: LazyArray, A: LazyArray, module: Update) -> LowRank:
    """Other factors for an expert of a stack, with the scale of ``module``."""
    return LowRank(B, A, module.scale, scaling=module.scaling, layout=Layout("experts"))


def _halves(name: str, module: Update, *, alternate: bool) -> Iterator[tuple[str, LowRank]]:
    """Split the update of one expert into those of gate and up."""
    B, A = module.factors
    size = B.shape[0] // 2
    for i, part in enumerate(("gate_proj", "up_proj")):
        # Contiguous rows can be read without the rest of B; alternating ones cannot.
        scattered = B.map(itemgetter(slice(i, None, 2)), shape=(size, B.shape[1]))
        half = scattered if alternate else B.rows(i * size, (i + 1) * size)
        yield name.replace(FUSED, part), _expert_pair(half, A, module)


def name_for_mlx(adapter: Adapter, config: Fields | None) -> Adapter:
    """The adapter with mlx-lm's names for the experts and the router of its base.

    Raises
    ------
    OptionError
        It adapts experts, but nothing says of which model, or the names of that model are not known here.
    """
    # Without experts the model need not be known; only a router may have another name.
    if not any(module.layout.kind == "experts" or is_expert_alone(name) for name, module in adapter.items()):
        return _rename_routers(adapter, MLX.get(model_type(config) or ""))
    kind = model_type(config)
    if kind is None:
        what = (
            "mlx-lm has names of its own for the experts of each model, and the file does not say which model this is"
        )
        raise OptionError(what, fix="give the base's folder with --base")
    if kind not in MLX:
        what = f"what mlx-lm calls the experts of {kind[:40]!a} is not known here"
        raise OptionError(what, fix=f"{LEAVE_OUT}; known are " + ", ".join(sorted(MLX)))
    names = MLX[kind]
    adapter = _rename_routers(split_stacks(adapter, config), names)
    modules: dict[str, Update] = {}
    for name, module in adapter.items():
        match = _STACKED.match(name) or _ALONE.match(name)
        if match:
            part = EXPERT_PARTS.get(match["part"], match["part"])
            name = f"{match['path']}.{names.owner}.{names.stacks}.{part}[{match['number']}]"
            # A single expert was a linear layer and becomes a part of a stack.
            if is_expert_alone(match[0]):
                module = _expert_pair(*module.factors, module)
        modules[name] = module
    return replace(adapter, modules=modules)


def _rename_routers(adapter: Adapter, names: Names | None) -> Adapter:
    """The adapter with mlx-lm's names for routers; all other modules keep their names."""
    routers = {name: router for name in adapter if (router := _ROUTER.match(name))}
    if names is None or not routers:
        return adapter
    return adapter.renamed({name: f"{r['path']}.{names.owner}.{names.router}" for name, r in routers.items()})


def name_single_experts(adapter: Adapter) -> Adapter:
    """The adapter with stacks of mlx-lm and llama.cpp as single experts under the names of checkpoints.

    PEFT joins single experts when it loads them. PEFT has no names for the gate and the up of a stack, because
    transformers stores both in one parameter.
    """
    family = None
    if adapter.format == "gguf":
        from loralens.formats.dialects.gguf_architectures import architecture, listed_name  # as in `_config_of`

        family = architecture(plain_values(adapter.metadata).get("general.architecture"))
    modules: dict[str, Update] = {}
    # Mixtral's checkpoints call the parts w1, w2 and w3; all others have the names of the stacks.
    old = {new: old for old, new in EXPERT_PARTS.items()}
    for name, module in adapter.items():
        match = _SWITCH.match(name)
        if match:
            part = old.get(match["part"], match["part"]) if match["owner"] == "block_sparse_moe" else match["part"]
            name = f"{match['path']}.{match['owner']}.experts.{match['number']}.{part}"
            module = LowRank(*module.factors, module.scale, scaling=module.scaling)
        # An expert of a stack of GGUF has the name of a single one where its architecture has such.
        elif family and expert(name) and module.layout.kind == "linear":
            name = listed_name(name, family) or name
        modules[name] = module
    return replace(adapter, modules=modules)


OF_IMAGE_MODELS = ("kohya", "diffusers", "comfyui")  # dialects of the programs that load adapters of image models
# The beginnings of keys of metadata about the training, which none of these programs needs to load the file.
NOTES = ("ss_", "sshs_", "modelspec.")


def fit_to_dialect(
    dialect: str, adapter: Adapter, *, base_config: Fields | None = None, arch: str | None = None
) -> Adapter:
    """The adapter, with its experts and its layers of image models named and divided as in ``dialect``.

    Parameters and errors are those of `fit_experts` and `fit_image`.
    """
    adapter = fit_experts(dialect, adapter, base_config=base_config, arch=arch)
    if dialect not in OF_IMAGE_MODELS:
        return adapter
    # Most adapters are of language models, and need no table of image models.
    from loralens.formats.dialects.image import fit_image

    return fit_image(dialect, adapter)


def carry_notes(dialect: str, adapter: Adapter, stored: Stored) -> Stored:
    """The file to write, with the metadata about the training that the adapter of another dialect has.

    Only dialects of image models carry such metadata, for example trigger words and tags. Metadata of the writer itself
    take precedence.
    """
    notes = {key: text for key, text in (adapter.metadata or {}).items() if key.startswith(NOTES)}
    if dialect not in OF_IMAGE_MODELS or not notes:
        return stored
    return replace(stored, metadata={**notes, **(stored.metadata or {})})
