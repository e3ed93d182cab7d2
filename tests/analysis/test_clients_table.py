"""One row for each rule of each program: an adapter that it takes in full, and one that shows the rule.

A row changes the adapter of `plain`: its configuration, its tensors, or its modules. What a row finds is all that the
program says, so every row also shows that the other rules of the program are silent. What the programs do was seen in
their own code, or by running their loaders on such files: vLLM 0.28.0 to 0.33.0 (``PEFTHelper``), LoRAX 0.12.1, ComfyUI
0.38.1 (``load_lora``), sd-scripts 0.10.1 (``create_network_from_weights``).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from loralens.analysis.clients import CLIENTS, RULES
from loralens.core import Extra, Finding, LazyArray
from loralens.core.image_families import client_versions
from loralens.core.matching import match
from loralens.verbs.shared.adapters import consult
from tests.cli.command import Command
from tests.draws import draw_factors

PREFIX, LAYER = "base_model.model.", "model.layers.0.self_attn"
PAIRS = {f"{LAYER}.q_proj": (8, 6), f"{LAYER}.k_proj": (4, 6), f"{LAYER}.v_proj": (4, 6)}
BASE = {**{f"{name}.weight": shape for name, shape in PAIRS.items()}, "model.embed_tokens.weight": (10, 6)}
KINDS = ("q_proj", "k_proj", "v_proj")
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "v_proj"]}
Changed = Mapping[str, Any]
SAME: Changed = {}


class Row(NamedTuple):
    """What differs from `plain`, and what the program says: code → level."""

    client: str
    about: str
    finds: Mapping[str, str]
    config: Changed = SAME
    tensors: Changed = SAME  # key → shape, or None to leave it out
    rename: Callable[[str], str] = str
    ranks: Mapping[str, int] = SAME
    base: Mapping[str, tuple[int, ...]] | None = None
    architecture: str | None = None
    tokens: Mapping[str, int] | None = None
    alone: bool = False  # without adapter_config.json


def refusals(adapter: Any, consumer: Any) -> Sequence[Finding]:
    return loralens.inspect(adapter, consumer=consumer).adapters[0].refusals


def codes(adapter: Any, consumer: str) -> dict[str, str]:
    return {finding.code: finding.level for finding in refusals(adapter, consumer)}


def write(folder: Path, shapes: Changed, config: Changed | None) -> None:
    """A folder as PEFT has it, its tensors drawn."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    held = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items() if shape}
    save_file(held, folder / "adapter_model.safetensors")
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))


def said(row: Row, folder: Path) -> dict[str, str]:
    """The codes and levels that a program has for the adapter of a row, read from the disk."""
    config = {key: value for key, value in {**CONFIG, **row.config}.items() if value is not ...}
    shapes: dict[str, Any] = {}
    for name, (out, in_) in PAIRS.items():
        r = row.ranks.get(name.rpartition(".")[2], 2)
        shapes |= {f"{PREFIX}{name}.lora_A.weight": (r, in_), f"{PREFIX}{name}.lora_B.weight": (out, r)}
    shapes = {row.rename(key): shape for key, shape in shapes.items()} | dict(row.tensors)
    write(folder, shapes, None if row.alone else config)
    if row.tokens:
        (folder / "added_tokens.json").write_text(json.dumps(row.tokens))
    adapter = loralens.load(folder, strict=False)
    found = match({name: module.shape for name, module in adapter.items()}, row.base) if row.base else None
    client: Any = row.client
    findings = consult(client, folder, adapter, match=found, stored=row.base)
    if row.architecture:
        from loralens.analysis.clients import check

        findings = check(adapter, client, architecture=row.architecture)
    return {finding.code: finding.level for finding in findings}


ERROR, WARNING = "error", "warning"
HEAD = {f"{PREFIX}lm_head.weight": (10, 6)}
SCORE = {f"{PREFIX}score.weight": (3, 6)}
BIAS = {f"{PREFIX}{LAYER}.q_proj.bias": (8,)}
MAGNITUDE = {f"{PREFIX}{name}.lora_magnitude_vector": (out,) for name, (out, _) in PAIRS.items()}
OTHER = {f"{PREFIX}model.norm.weight": (6,)}
PATTERNS = {"alpha_pattern": {"q_proj": 8}}
RSLORA = {"use_rslora": True}


def without(*kinds: str) -> dict[str, None]:
    return {f"{PREFIX}{LAYER}.{kind}.lora_{half}.weight": None for kind in kinds for half in "AB"}


def wrapper(key: str) -> str:
    return key.replace(PREFIX, f"{PREFIX}_orig_mod.")


STACK = "model.layers.0.mlp.experts"
EXPERTS = {f"{PREFIX}{STACK}.base_layer.lora_A.weight": (4, 6), f"{PREFIX}{STACK}.base_layer.lora_B.weight": (8, 4)}
TINKER = {f"{PREFIX}{STACK}.w1.lora_A.weight": (1, 2, 6), f"{PREFIX}{STACK}.w1.lora_B.weight": (3, 4, 2)}
TINKER_CONFIG = {"target_modules": "all-linear"}


def bare(key: str) -> str:
    return key.removeprefix(PREFIX)


SERVERS = ("vllm", "sglang", "tensorrt-llm", "lorax")
OLLAMA = {"version": WARNING}  # of every adapter
GEMMA = {"base_model_name_or_path": "google/gemma-2-2b"}
ROWS = [
    *(row for client in SERVERS for row in (
        Row(client, "plain", {}),
        Row(client, "DoRA", {"dora": ERROR}, {"use_dora": True}, MAGNITUDE))),
    *(row for client in SERVERS if client != "vllm" for row in (
        Row(client, "α for one kind", {"alpha-pattern": ERROR}, PATTERNS),
        Row(client, "biases", {"bias": ERROR}, {"bias": "all"}, BIAS),
        Row(client, "a head", {"extra-ignored": ERROR}, {"modules_to_save": ["lm_head"]}, HEAD))),
    *(Row(client, "rsLoRA", {}, RSLORA) for client in SERVERS if client != "sglang"),
    *(Row(client, "no peft_type", {"config": ERROR}, {"peft_type": ...}) for client in ("sglang", "lorax")),
    *(Row(client, "no α", {"config": ERROR}, {"lora_alpha": ...}) for client in ("sglang", "tensorrt-llm")),
    *(Row(client, "a wrapper's names", {"names-unmapped": ERROR}, rename=wrapper) for client in
        ("vllm", "lorax", "peft")),
    *(Row(client, "names of another class", {"names-differ": ERROR},
        rename=lambda key: key.replace("model.model.model.", "model.model."), base=BASE) for client in
        ("vllm", "lorax")),
    Row("vllm", "rank 4 for one kind", {}, {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}},
        ranks={"q_proj": 4}),
    Row("vllm", "α for one kind, which old versions ignore", {"alpha-pattern": WARNING}, PATTERNS),
    Row("vllm", "no peft_type, which it does not read", {}, {"peft_type": ...}),
    Row("vllm", "no r", {"config": ERROR}, {"r": ...}),
    Row("vllm", "AdaLoRA", {"peft-type": ERROR}, {"peft_type": "ADALORA"}, {f"{PREFIX}{n}.lora_E": (2,
        1) for n in PAIRS}, lambda key: key.removesuffix(".weight")),
    Row("vllm", "bias lora_only with biases", {"bias": ERROR}, {"bias": "lora_only"}, BIAS),
    Row("vllm", "bias lora_only without biases", {"bias": ERROR}, {"bias": "lora_only"}),
    Row("vllm", "bias none", {}, {"bias": "none"}),
    Row("vllm", "module. before all", {"names-unmapped": ERROR}, rename="module.{}".format),
    Row("vllm", "no prefix", {}, rename=bare),
    Row("vllm", "names of the base", {}, base=BASE),
    Row("vllm", "a head of classification", {"saved-head": WARNING}, {"modules_to_save": ["score"]}, SCORE),
    Row("vllm", "another head", {"saved-modules": ERROR}, {"modules_to_save": ["lm_head"]}, HEAD),
    Row("vllm", "modules_to_save alone", {"saved-modules": ERROR}, {"modules_to_save": ["lm_head"]}),
    Row("vllm", "another tensor", {"saved-modules": ERROR}, tensors=OTHER),
    Row("vllm", "an embedding's own weight", {"embedding-skipped": WARNING},
        tensors={f"{PREFIX}model.embed_tokens.base_layer.weight": (10, 6)}),
    Row("vllm", "PiSSA", {"init": ERROR}, {"init_lora_weights": "pissa"}),
    Row("vllm", "gaussian", {}, {"init_lora_weights": "gaussian"}),
    Row("vllm", "aLoRA", {"unsupported": ERROR}, {"alora_invocation_tokens": [1]}),
    Row("vllm", "rank 20", {"rank": WARNING}, {"r": 20}, ranks=dict.fromkeys(KINDS, 20)),
    Row("vllm", "rank 600", {"rank": ERROR}, {"r": 600}, ranks=dict.fromkeys(KINDS, 600)),
    Row("sglang", "rsLoRA", {"use-rslora": ERROR}, RSLORA),
    Row("sglang", "rank for one kind", {"ranks": ERROR}, {"rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"q_proj": 8}}, ranks={"q_proj": 4}),
    Row("sglang", "q without v", {"incomplete": ERROR}, tensors=without("v_proj", "k_proj")),
    Row("sglang", "q and v", {}, tensors=without("k_proj")),
    Row("sglang", "an expression", {"targets": ERROR}, {"target_modules": ".*_proj"}),
    Row("sglang", "all linear layers", {}, {"target_modules": "all-linear"}),
    Row("sglang", "new tokens", {"added-tokens": ERROR}, base=BASE, tokens={"<x>": 10}),
    Row("sglang", "old tokens", {}, base=BASE, tokens={"<x>": 9}),
    Row("sglang", "tokens, and no base", {"added-tokens": WARNING}, tokens={"<x>": 9}),
    Row("tensorrt-llm", "rank for one kind, with the same α", {}, {"rank_pattern": {"q_proj": 4}}, ranks={"q_proj": 4}),
    Row("tensorrt-llm", "another kind", {"names-unmapped": ERROR}, rename=lambda key: key.replace("k_proj", "c_attn")),
    Row("tensorrt-llm", "a wrapper before the number of the layer, which is not read", {}, rename=wrapper),
    Row("tensorrt-llm", "module. before all", {}, rename="module.{}".format),
    Row("tensorrt-llm", "a wrapper behind that number", {"names-unmapped": ERROR},
        rename=lambda key: key.replace("self_attn", "self_attn._fsdp_wrapped_module")),
    Row("tensorrt-llm", "rank 65", {"rank": WARNING}, {"r": 65}, ranks=dict.fromkeys(KINDS, 65)),
    Row("lorax", "no prefix", {"prefix-missing": ERROR}, rename=bare),
    Row("lorax", "rank 129", {"rank": WARNING}, {"r": 129}, ranks=dict.fromkeys(KINDS, 129)),
    Row("ollama", "Gemma 2", OLLAMA, GEMMA),
    Row("ollama", "Llama", {**OLLAMA, "rows": ERROR}, architecture="llama"),
    Row("ollama", "Llama without q and k", OLLAMA, tensors=without("q_proj", "k_proj"), architecture="llama"),
    Row("ollama", "Qwen", {**OLLAMA, "architecture": ERROR}, architecture="qwen2"),
    Row("ollama", "α of 10.5", {**OLLAMA, "alpha": ERROR}, {**GEMMA, "lora_alpha": 10.5}),
    Row("ollama", "rsLoRA", {**OLLAMA, "use-rslora": ERROR}, {**GEMMA, **RSLORA}),
    Row("ollama", "α for one kind", {**OLLAMA, "alpha-pattern": ERROR}, {**GEMMA, **PATTERNS}),
    Row("ollama", "DoRA", {**OLLAMA, "dora": ERROR}, {**GEMMA, "use_dora": True}, MAGNITUDE),
    Row("ollama", "biases", {**OLLAMA, "bias": ERROR}, {**GEMMA, "bias": "all"}, BIAS),
    Row("ollama", "another tensor", {**OLLAMA, "extra-ignored": ERROR}, GEMMA, OTHER),
    Row("ollama", "another kind", {**OLLAMA, "names-unmapped": ERROR}, GEMMA,
        rename=lambda key: key.replace("k_proj", "c_attn")),
    Row("peft", "patterns and rsLoRA", {}, {**PATTERNS, **RSLORA}),
    Row("peft", "bias lora_only without biases", {"bias": WARNING}, {"bias": "lora_only"}),
    Row("peft", "lost biases", {"bias": ERROR}, {"bias": "lora_only"}, base=BASE | {f"{LAYER}.q_proj.bias": (8,)}),
    Row("peft", "bias lora_only of a base without", {}, {"bias": "lora_only"}, base=BASE),
    Row("peft", "a tensor that the base may have", {"extra-ignored": WARNING}, tensors=OTHER),
    Row("peft", "a tensor that the base has", {}, tensors=OTHER, base=BASE | {"model.norm.weight": (6,)}),
    Row("peft", "a tensor that the base lacks", {"extra-ignored": ERROR}, tensors=OTHER, base=BASE),
    *(Row(client, "no adapter_config.json", {**others, "config": ERROR}, alone=True) for client, others in (
        *((server, {}) for server in SERVERS), ("peft", {}), ("ollama", {**OLLAMA, "rows": ERROR}))),
    *(Row(client, "Tinker's experts", {"names-unmapped": ERROR}, TINKER_CONFIG, TINKER) for client in
        ("vllm", "lorax", "peft")),
    *(Row(client, "expert stacks", {"experts": WARNING, **others}, {"target_parameters": ["mlp.experts.gate_up_proj"]},
        EXPERTS) for client, others in (("vllm", {}), ("sglang", {}), ("lorax", {}),
        ("tensorrt-llm", {"names-unmapped": ERROR}))),
    Row("ollama", "a wrapper's names", {**OLLAMA, "names-unmapped": ERROR}, GEMMA, rename=wrapper),
    Row("peft", "module. before all", {"names-unmapped": ERROR, "prefix-missing": ERROR}, rename="module.{}".format),
    Row("peft", "a module that is excluded", {"module-excluded": ERROR}, {"exclude_modules": ["k_proj"]}),
    Row("peft", "a kernel that is missing", {"kernel": ERROR}, {"target_modules": ["q_proj", "conv1", "v_proj"]},
        rename=lambda key: key.replace("k_proj", "conv1")),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.client}: {row.about}" for row in ROWS])
def test_what_a_program_says(row: Row, tmp_path: Path) -> None:
    assert said(row, tmp_path) == dict(row.finds)


FACTORS = {"lora_A.weight": (2, 6), "lora_B.weight": (8, 2)}
KOHYA = {"lora_down.weight": (2, 6), "lora_up.weight": (8, 2), "alpha": ()}
FLUX, UNET = "transformer.transformer_blocks.0.attn.to_q", "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
WAN, HUNYUAN = (
    "transformer.blocks.0.attn1.to_q",
    "diffusion_model.txt_in.individual_token_refiner.blocks.0.self_attn.qkv",
)
WIDE = {"lora_A.weight": (2, 5120), "lora_B.weight": (5120, 2)}
WIDE_QKV = {"lora_down.weight": (2, 3072), "lora_up.weight": (9216, 2), "alpha": ()}
UNET_LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_LAYER = "text_model_encoder_layers_0_mlp_fc1"
MLX = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0}}
MLX_PAIR = {f"{LAYER}.q_proj.lora_a": (6, 2), f"{LAYER}.q_proj.lora_b": (2, 8)}


def keys(name: str, parts: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": shape for part, shape in parts.items()}


OWN = keys("diffusion_model.input_blocks.1.1.proj_in", KOHYA)
LOKR = keys(f"lora_unet_{UNET}", {"lokr_w1": (2, 2), "lokr_w2": (3, 2)})
# client, what it is, what is found, the shapes of the tensors (None is a zero, the others are ones), configuration
OTHER_DIALECTS: list[tuple[str, str, Mapping[str, str], Changed, Changed | None]] = [
    ("mlx", "plain", {}, MLX_PAIR, MLX),
    ("mlx", "no number of layers", {"config": ERROR}, MLX_PAIR, {**MLX, "num_layers": None}),
    ("mlx", "another rank", {"ranks": ERROR}, MLX_PAIR, {**MLX, "lora_parameters": {"rank": 3, "scale": 1,
        "dropout": 0}}),
    ("mlx", "another tensor", {"extra-ignored": ERROR}, {**MLX_PAIR, "x": (2,)}, MLX),
    ("mlx", "PEFT's names", {"dialect": ERROR}, keys(f"{PREFIX}{LAYER}.q_proj", FACTORS), CONFIG),
    ("mlx", "a wrapper's names", {"names-unmapped": ERROR},
        {f"_orig_mod.{key}": shape for key, shape in MLX_PAIR.items()}, MLX),
    ("mlx", "no configuration", {"config": ERROR}, MLX_PAIR, None),
    ("diffusers", "plain", {}, keys(FLUX, FACTORS), None),
    ("diffusers", "Wan", {}, keys(WAN, WIDE), None),
    ("diffusers", "HunyuanVideo of ComfyUI", {"names": ERROR}, keys(HUNYUAN, WIDE_QKV), None),
    ("diffusers", "a name that it has not", {"names": ERROR}, keys("lora_unet_nowhere", KOHYA), None),
    ("diffusers", "a doubled prefix", {"names": ERROR}, keys(f"lora_unet_unet_{UNET}", KOHYA), None),
    ("diffusers", "SDXL", {}, keys("lora_unet_input_blocks_4_1_proj_in", KOHYA), None),
    ("diffusers", "FLUX.1 or HunyuanVideo", {"family-unclear": WARNING}, keys("lora_unet_double_blocks_0_img_attn_proj",
        {"lora_down.weight": (2, 3072), "lora_up.weight": (3072, 2)}), None),
    ("comfyui", "FLUX.1 or HunyuanVideo", {"family-unclear": WARNING}, keys(
        "transformer.transformer_blocks.0.attn.to_out.0", {"lora_A.weight": (2, 3072), "lora_B.weight": (3072, 2)}),
        None),
    ("comfyui", "HunyuanVideo of musubi", {"names": ERROR}, keys("lora_unet_double_blocks_0_img_mlp_fc1", KOHYA), None),
    ("comfyui", "the last block of FLUX.1", {}, keys("transformer.transformer_blocks.18.attn.to_out.0",
        {"lora_A.weight": (2, 3072), "lora_B.weight": (3072, 2)}), None),
    ("diffusers", "a wrapper's names", {"names-unmapped": ERROR}, keys(FLUX.replace("attn", "_orig_mod.attn"), FACTORS),
        None),
    ("comfyui", "Wan of diffusers", {"dialect": ERROR}, keys(WAN, WIDE), None),
    ("comfyui", "HunyuanVideo", {}, keys(HUNYUAN, WIDE_QKV), None),
    ("diffusers", "no component", {"names-unmapped": ERROR}, keys("transformer_blocks.0.attn.to_q",
        {"lora.down.weight": (2, 6), "lora.up.weight": (8, 2)}), None),
    ("diffusers", "kohya", {}, keys(f"lora_unet_{UNET}", KOHYA), None),
    ("diffusers", "DoRA of LyCORIS", {"dora": ERROR}, keys(f"lora_unet_{UNET}", {**KOHYA, "dora_scale": (8, 1)}), None),
    ("diffusers", "another tensor", {"extra-ignored": ERROR}, {**keys(FLUX, FACTORS), "transformer.x": (2,)}, None),
    ("diffusers", "PEFT's names", {"dialect": ERROR}, keys(f"{PREFIX}{LAYER}.q_proj", FACTORS), CONFIG),
    ("comfyui", "kohya", {}, keys(f"lora_unet_{UNET}", KOHYA), None),
    ("comfyui", "a text encoder", {}, keys(f"lora_te_{TEXT_LAYER}", KOHYA), None),
    ("comfyui", "its own", {}, OWN, None),
    ("comfyui", "LoKr", {}, LOKR, None),
    ("comfyui", "DoRA by input", {}, keys(f"lora_unet_{UNET}", {**KOHYA, "dora_scale": (1, 6)}), None),
    ("comfyui", "DoRA by output, which comes out otherwise", {"dora": WARNING}, keys(f"lora_unet_{UNET}",
        {**KOHYA, "dora_scale": (8, 1)}), None),
    ("comfyui", "ai-toolkit's DoRA", {"dora": ERROR}, keys("diffusion_model.a.b", {**KOHYA, "magnitude": (8,)}), None),
    ("comfyui", "a UNet's names under its own prefix", {"names": ERROR}, keys(f"diffusion_model.{UNET_LAYER}", KOHYA),
        None),
    ("comfyui", "transformers 5's text encoder", {"names": ERROR}, keys("text_encoder.encoder.layers.0.mlp.fc1", KOHYA),
        None),
    ("comfyui", "a text encoder as a UNet", {"names": ERROR}, keys(f"lora_unet_{TEXT_LAYER}", KOHYA), None),
    ("comfyui", "diffusers' UNet", {"dialect": ERROR}, keys(f"unet.{UNET_LAYER}", FACTORS), None),
    ("comfyui", "α of 0", {"alpha-zero": ERROR}, {**keys(f"lora_unet_{UNET}", KOHYA), f"lora_unet_{UNET}.alpha": None},
        None),
    ("comfyui", "Z-Image", {}, keys("transformer.layers.0.attention.to_q", FACTORS), None),
    ("comfyui", "Z-Image, bare", {}, keys("layers.0.attention.to_q", KOHYA), None),
    ("comfyui", "Krea 2", {}, keys("transformer.text_fusion.refiner_blocks.0.attn.to_q", FACTORS), None),
    ("comfyui", "LTX, bare", {}, keys("transformer_blocks.0.attn1.to_q", KOHYA), None),
    ("comfyui", "FLUX, bare", {}, keys("single_transformer_blocks.0.attn.to_q", KOHYA), None),
    ("comfyui", "a wrapper's names", {"names": ERROR}, keys("module.layers.0.attention.to_q", KOHYA), None),
    ("comfyui", "Wan, bare", {"names": ERROR}, keys("blocks.0.self_attn.q", KOHYA), None),
    ("comfyui", "a language model", {"names": ERROR}, keys(f"{LAYER}.q_proj", KOHYA), None),
    ("sd-scripts", "kohya", {}, keys(f"lora_unet_{UNET}", KOHYA), None),
    ("sd-scripts", "a text encoder", {}, keys(f"lora_te_{TEXT_LAYER}", KOHYA), None),
    ("sd-scripts", "FLUX", {}, keys("lora_unet_double_blocks_0_img_attn_qkv", KOHYA), None),
    ("sd-scripts", "LoKr", {"dialect": ERROR}, LOKR, None),
    ("sd-scripts", "ComfyUI's own", {"dialect": ERROR}, OWN, None),
    ("peft", "kohya", {"dialect": ERROR}, keys(f"lora_unet_{UNET}", KOHYA), None),
    ("peft", "LoKr", {"dialect": ERROR, "structured": ERROR}, LOKR, None),
    ("sd-scripts", "a name that it has not", {"names": ERROR}, keys("lora_unet_conv_in", KOHYA), None),
    ("sd-scripts", "DoRA", {"dora": ERROR}, keys(f"lora_unet_{UNET}", {**KOHYA, "dora_scale": (8, 1)}), None),
    ("sd-scripts", "another tensor", {"extra-ignored": ERROR}, {**keys(f"lora_unet_{UNET}", KOHYA), "x": (2,)}, None),
]  # fmt: skip


@pytest.mark.parametrize("row", OTHER_DIALECTS, ids=[f"{row[0]}: {row[1]}" for row in OTHER_DIALECTS])
def test_what_a_program_says_of_another_dialect(row: Any, tmp_path: Path) -> None:
    client, _, finds, shapes, config = row
    held = {key: np.full(shape or (), shape is not None, np.float32) for key, shape in shapes.items()}
    name = "adapters" if client == "mlx" and config is not CONFIG else "adapter_model" if config else "a"
    save_file(held, tmp_path / f"{name}.safetensors")
    if config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert codes(tmp_path / f"{name}.safetensors", client) == finds


IN_MEMORY = [  # GGUF files are written from these: client, what they are, what is found, dialect, roles, ranks
    ("llama.cpp", "plain", {}, "gguf", (), (2,)),
    ("llama.cpp", "another dialect", {"dialect": ERROR}, "peft", (), (2,)),
    ("llama.cpp", "magnitudes", {"dora": ERROR, "tensors": ERROR}, "gguf", ("magnitude",), (2,)),
    ("llama.cpp", "biases", {"bias": ERROR, "tensors": ERROR}, "gguf", ("bias",), (2,)),
    ("llama.cpp", "a head", {"saved-modules": ERROR, "tensors": ERROR}, "gguf", ("saved",), (2,)),
    ("llama.cpp", "another tensor", {"tensors": ERROR}, "gguf", ("other",), (2,)),
    ("llama.cpp", "a norm", {"extra-ignored": ERROR}, "gguf", ("norm",), (2,)),
    ("ollama", "GGUF", OLLAMA, "gguf", (), (2,)),
    ("ollama", "GGUF with another tensor", {**OLLAMA, "tensors": ERROR, "extra-ignored": ERROR}, "gguf", ("other",),
        (2,)),
    ("ollama", "kohya", {"dialect": ERROR}, "kohya", (), (2,)),
    ("lorax", "ranks 2 and 7, padded alike", {}, "peft", (), (2, 7)),
    ("lorax", "ranks 17 and 32, padded alike", {}, "peft", (), (17, 32)),
    ("lorax", "ranks 8 and 9", {"ranks": ERROR}, "peft", (), (8, 9)),
    ("comfyui", "its own extras", {}, "comfyui", ("diff", "diff_b", "saved", "shape"), (2,)),
    ("comfyui", "a bias", {"extra-ignored": ERROR}, "comfyui", ("bias",), (2,)),
    ("vllm", "rank 16", {}, "peft", (), (16,)),
    ("vllm", "rank 17", {"rank": WARNING}, "peft", (), (17,)),
    ("vllm", "rank 513", {"rank": ERROR}, "peft", (), (513,)),
    ("lorax", "rank 128", {}, "peft", (), (128,)),
]  # fmt: skip


@pytest.mark.parametrize("row", IN_MEMORY, ids=[f"{row[0]}: {row[1]}" for row in IN_MEMORY])
def test_what_a_program_says_of_an_adapter_in_memory(row: Any) -> None:
    client, _, finds, form, roles, ranks = row
    modules = {f"model.layers.{i}.mlp.up_proj": loralens.LowRank(np.ones((3, r)), np.ones((r, 2)))
               for i, r in enumerate(ranks)}  # fmt: skip
    extra = {f"x_{role}.weight": Extra(role, "x", LazyArray.of(np.ones(2))) for role in roles}
    adapter = loralens.Adapter(modules=modules, extra=extra, format=form)
    assert codes(adapter, client) == finds


def test_every_rule_names_a_file_and_known_programs() -> None:
    for rule in RULES:
        assert rule.source
        assert set(rule.source) <= set(CLIENTS)
        assert all(rule.source.values())


def test_the_versions_are_those_of_the_table_of_names() -> None:
    for client in ("comfyui", "diffusers"):
        assert client_versions()[client] in CLIENTS[client].version


def test_the_programs_are_listed_without_an_adapter() -> None:
    for verb in ("inspect", "doctor"):
        shown = Command().run(verb, "--for", "list")
        assert shown.exit_code == 0
        assert all(name in shown.output for name in CLIENTS)


def test_an_error_is_exit_code_1(tmp_path: Path) -> None:
    said(Row("vllm", "", {}, {"r": 3}), tmp_path)
    assert Command().run("inspect", tmp_path).exit_code == 1
    for verb in ("inspect", "doctor"):
        assert Command().run(verb, tmp_path, "--for", "vllm").exit_code == 1
    said(Row("vllm", "", {}, PATTERNS), tmp_path)
    for verb in ("inspect", "doctor"):
        assert Command().run(verb, tmp_path, "--for", "vllm").exit_code == 0
        assert Command().run(verb, tmp_path, "--for", "sglang").exit_code == 1


MIXED = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 10.5}, **RSLORA}
HARD = Row("", "", {}, MIXED, ranks={"q_proj": 4}, rename=wrapper)


@pytest.mark.parametrize("server", SERVERS)
def test_what_is_written_for_a_server_is_taken_and_means_the_same(server: str, tmp_path: Path) -> None:
    said(HARD._replace(client=server), tmp_path / "a")
    before = loralens.load(tmp_path / "a")
    result = loralens.convert(tmp_path / "a", to=server, output=tmp_path / "b")
    assert codes(tmp_path / "b", server) == {}
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 4, {}, {})
    assert type(config["lora_alpha"]) is int
    assert result.truncation == 0
    after = loralens.load(tmp_path / "b")
    for name in PAIRS:
        # Scales are multiplied into B in float32.
        np.testing.assert_allclose(after[name].dense(), before[name].dense(), rtol=1e-5, atol=1e-6)


def test_a_smaller_rank_states_its_error_and_sglang_gets_zeros(tmp_path: Path) -> None:
    said(Row("sglang", "", {}, tensors=without("v_proj")), tmp_path / "a")
    run = Command().run
    written = run("convert", tmp_path / "a", "--to", "sglang", "-o", tmp_path / "b", "--rank", "1")
    assert "% of the update lost by rank 1" in written.output
    assert "added 1 module of zeros" in written.output
    after = loralens.load(tmp_path / "b")
    # The shape of v is that of k.
    assert (after[f"{LAYER}.v_proj"].shape, after[f"{LAYER}.v_proj"].rank) == ((4, 6), 1)
    assert not after[f"{LAYER}.v_proj"].dense().any()
    assert run("inspect", tmp_path / "b", "--for", "sglang").exit_code == 0
    said(Row("sglang", "", {}, tensors=without("v_proj", "k_proj")), tmp_path / "q")
    refused = run("convert", tmp_path / "q", "--to", "sglang", "-o", tmp_path / "c")
    assert refused.exit_code == 2
    assert "give --base DIR" in refused.output


def test_what_a_server_would_ignore_is_not_written_for_it(tmp_path: Path) -> None:
    said(Row("vllm", "", {}, {"modules_to_save": ["lm_head"]}, HEAD), tmp_path / "a")
    run = Command().run
    refused = run("convert", tmp_path / "a", "--to", "vllm", "-o", tmp_path / "b")
    assert refused.exit_code == 2
    assert not (tmp_path / "b").exists()
    assert run("convert", tmp_path / "a", "--to", "vllm", "-o", tmp_path / "b", "--drop-extra").exit_code == 0
    assert loralens.inspect(tmp_path / "b", consumer="vllm").answer
    # Ollama takes a GGUF file, which states its architecture.
    gguf = run(
        "convert", tmp_path / "a", "--to", "ollama", "--arch", "gemma2", "--drop-extra", "-o", tmp_path / "c.gguf"
    )
    assert gguf.exit_code == 0
    assert loralens.inspect(tmp_path / "c.gguf", consumer="ollama").answer


# ---- Files whose numbers matter


def test_a_scale_that_only_the_header_says_is_lost_on_comfyui(tmp_path: Path) -> None:
    held = {key: np.ones(shape, np.float32) for key, shape in keys(FLUX, FACTORS).items()}
    for alpha, expected in ((2, {}), (6, {"scale": ERROR})):
        said = json.dumps({"transformer.r": 2, "transformer.lora_alpha": alpha, "transformer.target_modules": ["to_q"]})
        save_file(held, tmp_path / "a.safetensors", {"lora_adapter_metadata": said})
        assert codes(tmp_path / "a.safetensors", "comfyui") == expected


def mixed(*terms: tuple[int, float]) -> loralens.Adapter:
    """Modules of several ranks and scales."""
    pairs = [loralens.LowRank(*draw_factors(0, 6, 4, r, "f4"), scale) for r, scale in terms]
    return loralens.Adapter(modules={f"model.layers.{i}.self_attn.q_proj": pair for i, pair in enumerate(pairs)})


def test_patterns_that_leave_the_scale_alone_are_right_for_vllm(tmp_path: Path) -> None:
    loralens.save(mixed((3, 2.0), (1, 2.0)), tmp_path / "a")
    adapter = loralens.load(tmp_path / "a")
    assert adapter.config
    assert adapter.config["rank_pattern"]
    assert adapter.config["alpha_pattern"]
    assert codes(adapter, "vllm") == {}


def test_patterns_that_change_the_scale_are_a_warning_about_old_vllm(tmp_path: Path) -> None:
    loralens.save(mixed((3, 2.0), (1, 2.0), (3, 1.0)), tmp_path / "a")
    (finding,) = refusals(tmp_path / "a", "vllm")
    assert (finding.level, finding.code) == ("warning", "rank-pattern")
    assert finding.text.startswith("vLLM before 0.32.0 ignores rank_pattern and alpha_pattern: 1 modules get the wrong")


def test_a_file_without_its_configuration_is_repaired_by_conversion(tmp_path: Path) -> None:
    said(Row("peft", "", {}, alone=True), tmp_path / "a")
    Command().good("convert", tmp_path / "a", "--to", "peft", "--alpha", "4", "-o", tmp_path / "b")
    for consumer in ("vllm", "lorax", "peft"):
        assert codes(tmp_path / "b", consumer) == {}


def test_one_alpha_with_several_ranks_is_what_a_gguf_file_says(tmp_path: Path) -> None:
    adapter = mixed((2, 1.0), (1, 2.0))
    assert codes(adapter, "llama.cpp") == {"dialect": ERROR, "mixed-scale": WARNING}
    loralens.save(adapter, tmp_path / "a.gguf", format="gguf", arch="qwen2")
    assert codes(tmp_path / "a.gguf", "llama.cpp") == {}


OTHERS = {  # PEFT's other types of updates: parts of a module, and fields of the configuration
    "ADALORA": ({"lora_A": (2, 4), "lora_B": (6, 2), "lora_E": (2, 1)},
                {"init_r": 3, "r": 8, "lora_alpha": 8, "rank_pattern": {"q.lora_E": [True, False, True]}}),
    "LOHA": ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 4), "hada_w2_a": (6, 2), "hada_w2_b": (2, 4)},
             {"r": 2, "alpha": 2}),
    "LOKR": ({"lokr_w1": (2, 2), "lokr_w2": (3, 2)}, {"r": 2, "alpha": 2}),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_servers_refuse_peft_s_other_types_and_take_what_the_fix_writes(kind: str, tmp_path: Path) -> None:
    """vLLM 0.33.0 calls each tensor of these "unsupported LoRA weight"; LoRAX finds none of AdaLoRA's."""
    shapes, fields = OTHERS[kind]
    folder = tmp_path / "a"
    write(folder, keys(f"{PREFIX}q", shapes), {"peft_type": kind, "target_modules": ["q"], **fields})
    for consumer in ("vllm", "lorax"):
        (found,) = refusals(folder, consumer)
        assert (found.level, found.code) == (ERROR, "peft-type")
        assert kind in found.text
    assert codes(folder, "llama.cpp")["dialect"] == ERROR
    assert codes(folder, "peft") == {}
    rank = ["--rank", "4"] if "--rank" in found.fix else []
    assert rank or kind == "ADALORA"
    Command().good("convert", folder, "--to", "peft", "-o", tmp_path / "out", *rank)
    for consumer in ("vllm", "lorax", "peft"):
        assert codes(tmp_path / "out", consumer) == {}
