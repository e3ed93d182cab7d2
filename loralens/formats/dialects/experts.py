"""Experts as other software has them: gate and up apart, upright, and under the names of mlx-lm or of single experts.

PEFT adapts the parameters of transformers: ``gate_up_proj`` holds gate and up of all experts, its rows below each other
(alternating in gpt-oss). llama.cpp and mlx-lm hold a stack of each. Both halves share A, and each has its rows of B.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array
from loralens.core.lowrank import Layout, LowRank
from loralens.core.names import expert, is_expert_alone
from loralens.core.naming.storage import EXPERT_PARTS
from loralens.core.structured import Update
from loralens.errors import OptionError, place
from loralens.formats.dialects.gguf.architectures import architecture, text_config
from loralens.formats.dialects.gguf.reader import ARCHITECTURE
from loralens.formats.files.gguf.values import plain

FUSED = "gate_up_proj"
STACKS = (FUSED, "down_proj")  # of the experts of transformers
_ALTERNATE = ("gpt_oss",)  # model types in which rows of gate and up alternate
_LAYER = r"^(?P<path>.+)\.(?P<owner>mlp|block_sparse_moe|feed_forward)\."
_STACKED = re.compile(_LAYER + r"(?:experts|switch_mlp)\.(?P<part>\w+)\[(?P<number>\d{1,9})\]$")
_ALONE = re.compile(_LAYER + r"experts\.(?P<number>\d{1,9})\.(?P<part>\w+)$")
_SWITCH = re.compile(_LAYER + r"switch_mlp\.(?P<part>\w+)\[(?P<number>\d{1,9})\]$")
_ROUTER = re.compile(_LAYER + r"(?:gate|router|router\.layer)$")


class Names(NamedTuple):
    """What mlx-lm calls the mixture of a model: the module of a layer, its stacks, its router."""

    owner: str
    stacks: str
    router: str


_MLP, _MIXTRAL = Names("mlp", "switch_mlp", "gate"), Names("block_sparse_moe", "switch_mlp", "gate")
_GRANITE = Names("block_sparse_moe", "switch_mlp", "router.layer")
MLX: Mapping[str, Names] = {  # model type → names; mlx-lm of November 2026
    **dict.fromkeys(("mixtral", "phimoe", "minimax"), _MIXTRAL),
    **dict.fromkeys(("granitemoe", "granitemoehybrid"), _GRANITE),
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32",
         "glm4_moe", "glm4_moe_lite", "ernie4_5_moe", "exaone_moe", "mellum"), _MLP,
    ),
    "jamba": Names("feed_forward", "switch_mlp", "router"),
    "lfm2_moe": Names("feed_forward", "switch_mlp", "gate"),
    "gpt_oss": Names("mlp", "experts", "router"),
    "dots1": Names("mlp", "experts", "gate"),
}  # fmt: skip


def as_in(
    dialect: str, adapter: Adapter, *, base_config: Mapping[str, Any] | None = None, arch: str | None = None
) -> Adapter:
    """An adapter of another dialect, its experts cut and called as ``dialect`` has them.

    Parameters
    ----------
    dialect : str
    adapter : Adapter
    base_config : mapping, optional
        The base's config.json.
    arch : str, optional
        What llama.cpp or Hugging Face calls its architecture, where no config.json does.

    Raises
    ------
    OptionError
        What the dialect needs to know about the base is not said.
    """
    if dialect == "gguf":
        return taken_apart(adapter, base_config or _config_of(arch))
    if dialect == "mlx":
        return named_for_mlx(adapter, base_config or _config_of(_gguf_architecture(adapter)))
    return named_alone(adapter) if dialect == "peft" else adapter


def _config_of(arch: str | None) -> Mapping[str, Any] | None:
    """As much of a config.json as an architecture says: the type of its model with experts, else any of its types."""
    family = architecture(arch)
    return {"model_type": next((kind for kind in family.types if kind in MLX), family.types[0])} if family else None


def _gguf_architecture(adapter: Adapter) -> str | None:
    """The architecture that a GGUF file says."""
    arch = plain(adapter.metadata).get(ARCHITECTURE) if adapter.format == "gguf" else None
    return arch if isinstance(arch, str) else None


def model_type(config: Mapping[str, Any] | None) -> str | None:
    """The type of model that a base's config.json says, of its part about text."""
    kind = text_config(config).get("model_type")
    return kind if isinstance(kind, str) else None


def taken_apart(adapter: Adapter, config: Mapping[str, Any] | None) -> Adapter:
    """The adapter with every stack of gate and up as one of each, and all stacks as updates (out, in).

    Parameters
    ----------
    adapter : Adapter
    config : mapping or None
        The base's config.json: whether gate and up alternate, and which side of a stack is that of its inputs. Without
        it the shapes of the stacks tell, where both are there.

    Raises
    ------
    OptionError
        There are such stacks, and nothing says how their rows lie.
    """
    stacks = {name: part for name, module in adapter.items() if (part := _stack(name, module))}
    if not stacks:
        return adapter
    kind = model_type(config)
    if kind is None and FUSED in stacks.values():
        raise OptionError(
            "the rows of gate and up stand below each other in most models and alternate in gpt-oss, and nothing says "
            "which this is",
            fix="give the base's folder with --base",
        )
    turned = _are_transposed(adapter, stacks, config)
    modules: dict[str, Update] = {}
    for name, module in adapter.items():
        if name not in stacks:
            modules[name] = module
            continue
        with place(name):
            upright = _transpose(module) if turned else module
            if stacks[name] == FUSED:
                modules.update(_halves(name, upright, alternate=kind in _ALTERNATE))
            else:
                modules[name] = upright
    return replace(adapter, modules=modules)


def _stack(name: str, module: Update) -> str | None:
    """Which stack of transformers' a module is one expert of."""
    member = expert(name)
    if member is None or module.layout.kind != "experts":
        return None
    return next((part for part in STACKS if member.stack.endswith(f".experts.{part}")), None)


def _are_transposed(adapter: Adapter, stacks: Mapping[str, str], config: Mapping[str, Any] | None) -> bool:
    """Whether the updates of the stacks are (in, out): as PEFT has them of some models, and up to 0.18 of most."""
    hidden = text_config(config).get("hidden_size")
    shapes = {part: adapter[name].shape for name, part in stacks.items()}
    votes: set[bool] = set()
    for part, (out, in_) in shapes.items():
        inside, outside = (in_, out) if part == FUSED else (out, in_)
        if inside != outside and hidden in (inside, outside):
            votes.add(outside == hidden)
    if len(shapes) == 2 and not votes:
        (out, in_), (other_out, other_in) = shapes[FUSED], shapes["down_proj"]
        if (out, in_) == (2 * other_in, other_out):
            votes.add(False)
        if (in_, out) == (2 * other_out, other_in):
            votes.add(True)
    if len(votes) == 1:
        return votes.pop()
    transposed = next(adapter[name].layout.transposed for name in stacks)
    return transposed and model_type(config) not in _ALTERNATE


def _transpose(module: Update) -> LowRank:
    B, A = module.factors
    return LowRank(A.T, B.T, module.scale, scaling=module.scaling, layout=Layout("experts"))


def _halves(name: str, module: Update, *, alternate: bool) -> Iterator[tuple[str, LowRank]]:
    """Gate and up of one expert."""
    B, A = module.factors
    size = B.shape[0] // 2
    for i, part in enumerate(("gate_proj", "up_proj")):
        rows = slice(i, None, 2) if alternate else slice(i * size, (i + 1) * size)
        half = B.map(_rows(rows), shape=(size, B.shape[1])) if alternate else B.rows(i * size, (i + 1) * size)
        yield (
            name.replace(FUSED, part),
            LowRank(half, A, module.scale, scaling=module.scaling, layout=Layout("experts")),
        )


def _rows(rows: slice) -> Callable[[Array], Array]:
    return lambda array: array[rows]


def named_for_mlx(adapter: Adapter, config: Mapping[str, Any] | None) -> Adapter:
    """The adapter under the names that mlx-lm has for the experts and the router of its base.

    Raises
    ------
    OptionError
        It adapts experts, and nothing says of which model, or that model's names are not known here.
    """
    if not any(module.layout.kind == "experts" or is_expert_alone(name) for name, module in adapter.items()):
        return _rename_routers(adapter, MLX.get(model_type(config) or ""))
    kind = model_type(config)
    if kind is None:
        raise OptionError(
            "mlx-lm has names of its own for the experts of each model, and nothing says which model this is",
            fix="give the base's folder with --base",
        )
    if kind not in MLX:
        raise OptionError(
            f"what mlx-lm calls the experts of {kind[:40]!a} is not known here",
            fix="leave them out with loralens drop; known are " + ", ".join(sorted(MLX)),
        )
    names = MLX[kind]
    adapter = _rename_routers(taken_apart(adapter, config), names)
    modules: dict[str, Update] = {}
    for name, module in adapter.items():
        match = _STACKED.match(name) or _ALONE.match(name)
        if match:
            part = EXPERT_PARTS.get(match["part"], match["part"])
            name = f"{match['path']}.{names.owner}.{names.stacks}.{part}[{match['number']}]"
            if is_expert_alone(match[0]):
                B, A = module.factors
                module = LowRank(B, A, module.scale, scaling=module.scaling, layout=Layout("experts"))
        modules[name] = module
    return replace(adapter, modules=modules)


def _rename_routers(adapter: Adapter, names: Names | None) -> Adapter:
    """Routers under the name that mlx-lm has for them; all other modules as they are."""
    routers = {name: router for name in adapter if (router := _ROUTER.match(name))}
    if names is None or not routers:
        return adapter
    return adapter.renamed({name: f"{r['path']}.{names.owner}.{names.router}" for name, r in routers.items()})


def named_alone(adapter: Adapter) -> Adapter:
    """mlx-lm's stacks as single experts, under the names of checkpoints: PEFT joins these when it loads them."""
    modules: dict[str, Update] = {}
    old = {new: old for old, new in EXPERT_PARTS.items()}
    for name, module in adapter.items():
        match = _SWITCH.match(name)
        if match:
            part = old.get(match["part"], match["part"]) if match["owner"] == "block_sparse_moe" else match["part"]
            name = f"{match['path']}.{match['owner']}.experts.{match['number']}.{part}"
            B, A = module.factors
            module = LowRank(B, A, module.scale, scaling=module.scaling)
        modules[name] = module
    return replace(adapter, modules=modules)
