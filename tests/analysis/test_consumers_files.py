"""For each rule a file that the consumer accepts and one that it refuses or ignores, read back from the disk.

What the programs do was seen in their own code, or by running their loaders on such files: vLLM 0.28.0 to 0.33.0
(``PEFTHelper``), LoRAX 0.12.1, ComfyUI 0.38.1 (``load_lora``), sd-scripts 0.10.1 (``create_network_from_weights``).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from loralens import Adapter
from loralens.core import Finding
from tests.cli.command import Command
from tests.conftest import small_adapter

BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0"
UNET = "down_blocks.0.attentions.0.transformer_blocks.0"
run = Command().run


def arrays(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def pair(name: str, *, leaves: tuple[str, str] = ("lora_up.weight", "lora_down.weight"), r: int = 2) -> dict[str, Any]:
    up, down = arrays((6, r), (r, 4))
    return {f"{name}.{leaves[0]}": up, f"{name}.{leaves[1]}": down}


def kohya(*names: str, **more: Any) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for name in names:
        tensors |= pair(name) | {f"{name}.alpha": np.float32(2)}
    return tensors | {f"{names[0]}.{part}": value for part, value in more.items()}


def file(folder: Path, tensors: Mapping[str, Any], name: str = "lora.safetensors") -> Adapter:
    save_file({key: np.asarray(array) for key, array in tensors.items()}, folder / name)
    return loralens.load(folder / name, strict=False)


def peft(folder: Path, tensors: Mapping[str, Any] | None = None, **config: Any) -> Adapter:
    """A PEFT folder of two modules with other tensors beside them, and other fields in its configuration."""
    loralens.save(small_adapter(), folder / "peft")
    held = load_file(folder / "peft" / "adapter_model.safetensors")
    save_file({**held, **(tensors or {})}, folder / "peft" / "adapter_model.safetensors")
    path = folder / "peft" / "adapter_config.json"
    said = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))
    return loralens.load(folder / "peft", strict=False)


def refusals(adapter: Adapter, consumer: Any) -> Sequence[Finding]:
    return loralens.inspect(adapter, consumer=consumer).adapters[0].refusals


def codes(adapter: Adapter, consumer: str) -> dict[str, str]:
    return {finding.code: finding.level for finding in refusals(adapter, consumer)}


# --- ComfyUI ---

ACCEPTED = {
    "kohya": kohya(f"lora_unet_{BLOCK}_attn1_to_q", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
    "its own": kohya("diffusion_model.input_blocks.1.1.proj_in"),
    "diffusers' FLUX": pair("transformer.transformer_blocks.0.attn.to_q", leaves=("lora_B.weight", "lora_A.weight")),
    "LoKr": {f"lora_unet_{BLOCK}_attn1_to_q.lokr_w1": np.eye(2, dtype="f"),
             f"lora_unet_{BLOCK}_attn1_to_q.lokr_w2": np.ones((3, 2), "f")},
    "DoRA by input": kohya(f"lora_unet_{BLOCK}_attn1_to_q", dora_scale=np.ones((1, 4), "f")),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_comfyui_loads_in_full(name: str, tmp_path: Path) -> None:
    assert codes(file(tmp_path, ACCEPTED[name]), "comfyui") == {}


IGNORED = {
    "a UNet's names under its own prefix": (kohya(f"diffusion_model.{UNET}.attn1.to_q"), "names"),
    "transformers 5's text encoder": (kohya("text_encoder.encoder.layers.0.mlp.fc1"), "names"),
    "a text encoder as a UNet": (kohya("lora_unet_text_model_encoder_layers_0_mlp_fc1"), "names"),
    "diffusers' UNet": (pair(f"unet.{UNET}.attn1.to_q", leaves=("lora_B.weight", "lora_A.weight")), "dialect"),
    "ai-toolkit's DoRA": (kohya("diffusion_model.a.b", magnitude=np.ones(6, "f")), "dora"),
    "α of 0": (kohya(f"lora_unet_{BLOCK}_attn1_to_q", alpha=np.float32(0)), "alpha-zero"),
}  # fmt: skip


@pytest.mark.parametrize("name", IGNORED)
def test_what_comfyui_ignores(name: str, tmp_path: Path) -> None:
    tensors, code = IGNORED[name]
    assert codes(file(tmp_path, tensors), "comfyui") == {code: "error"}


def test_dora_by_output_comes_out_otherwise_in_comfyui(tmp_path: Path) -> None:
    adapter = file(tmp_path, kohya(f"lora_unet_{BLOCK}_attn1_to_q", dora_scale=np.ones((6, 1), "f")))
    assert codes(adapter, "comfyui") == {"dora": "warning"}


def test_a_scale_that_only_the_header_says_is_lost_on_comfyui(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn.to_q"
    for alpha, expected in ((2, {}), (6, {"scale": "error"})):
        said = json.dumps({"transformer.r": 2, "transformer.lora_alpha": alpha, "transformer.target_modules": ["to_q"]})
        tensors = pair(name, leaves=("lora_B.weight", "lora_A.weight"))
        save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": said})
        assert codes(loralens.load(tmp_path / "a.safetensors"), "comfyui") == expected


# --- sd-scripts ---


def test_what_sd_scripts_loads(tmp_path: Path) -> None:
    names = (f"lora_unet_{BLOCK}_attn1_to_q", "lora_te_text_model_encoder_layers_0_mlp_fc1")
    assert codes(file(tmp_path, kohya(*names)), "sd-scripts") == {}
    assert codes(file(tmp_path, kohya("lora_unet_double_blocks_0_img_attn_qkv")), "sd-scripts") == {}


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (kohya("lora_unet_conv_in"), {"names": "error"}),
        (kohya(f"lora_unet_{BLOCK}_attn1_to_q", dora_scale=np.ones((6, 1), "f")), {"dora": "error"}),
        (ACCEPTED["LoKr"], {"dialect": "error"}),
        (ACCEPTED["its own"], {"dialect": "error"}),
    ],
)
def test_what_sd_scripts_ignores(tensors: Mapping[str, Any], expected: Mapping[str, str], tmp_path: Path) -> None:
    assert codes(file(tmp_path, tensors), "sd-scripts") == expected


# --- vLLM and LoRAX ---

MIXED = {"model.layers.0.self_attn.q_proj": (3, 2.0), "model.layers.1.self_attn.q_proj": (1, 2.0)}


def mixed(terms: Mapping[str, tuple[int, float]]) -> Adapter:
    """Modules of several ranks and scales."""
    modules = {}
    for name, (r, scale) in terms.items():
        B, A = arrays((6, r), (r, 4))
        modules[name] = loralens.LowRank(B, A, scale)
    return Adapter(modules=modules)


def test_patterns_that_leave_the_scale_alone_are_right_for_vllm(tmp_path: Path) -> None:
    loralens.save(mixed(MIXED), tmp_path / "a")
    adapter = loralens.load(tmp_path / "a")
    assert adapter.config
    assert adapter.config["rank_pattern"]
    assert adapter.config["alpha_pattern"]
    assert codes(adapter, "vllm") == {}


def test_patterns_that_change_the_scale_are_a_warning_about_old_vllm(tmp_path: Path) -> None:
    loralens.save(mixed({**MIXED, "model.layers.2.self_attn.q_proj": (3, 1.0)}), tmp_path / "a")
    (finding,) = refusals(loralens.load(tmp_path / "a"), "vllm")
    assert (finding.level, finding.code) == ("warning", "rank-pattern")
    assert finding.text.startswith("vLLM before 0.32.0 ignores rank_pattern and alpha_pattern: 1 modules get the wrong")


PREFIX = "base_model.model."
VLLM = [
    ("plain", {}, {}, {}),
    ("a head for classification", {"score.weight": (3, 6)}, {"modules_to_save": ["score"]}, {"saved-head": "warning"}),
    ("another head", {"lm_head.weight": (3, 6)}, {"modules_to_save": ["lm_head"]}, {"saved-modules": "error"}),
    ("an embedding's own weight", {"model.embed_tokens.base_layer.weight": (5, 4)}, {},
     {"embedding-skipped": "warning"}),
    ("no r", {}, {"r": ...}, {"config": "error"}),
    ("DoRA in the configuration alone", {}, {"use_dora": True}, {"dora": "error"}),
    ("a bias", {"model.layers.0.self_attn.q_proj.bias": (6,)}, {"bias": "all"}, {"bias": "error"}),
    ("one that does not", {}, {"init_lora_weights": "pissa"}, {"init": "error"}),
    ("aLoRA", {}, {"alora_invocation_tokens": [1]}, {"unsupported": "error"}),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "config", "expected"), [case[1:] for case in VLLM], ids=[case[0] for case in VLLM])
def test_what_vllm_takes_and_refuses(
    tensors: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], expected: Mapping[str, str], tmp_path: Path
) -> None:
    held = {PREFIX + key: np.ones(shape, np.float32) for key, shape in tensors.items()}
    assert codes(peft(tmp_path, held, **config), "vllm") == expected


def test_lorax_stacks_the_layers_of_a_kind(tmp_path: Path) -> None:
    """Ranks up to 8 are padded to 8, others to a multiple of 16: these stack, and 8 with 9 do not."""
    for ranks, expected in (((2, 7), {}), ((9, 16), {}), ((8, 9), {"ranks": "error"})):
        terms = {f"model.layers.{i}.self_attn.q_proj": (r, 1.0) for i, r in enumerate(ranks)}
        loralens.save(mixed(terms), tmp_path / str(ranks))
        assert codes(loralens.load(tmp_path / str(ranks)), "lorax") == expected


def test_a_file_without_its_configuration_is_refused(tmp_path: Path) -> None:
    peft(tmp_path)
    (tmp_path / "peft" / "adapter_config.json").unlink()
    for consumer in ("vllm", "lorax", "peft"):
        assert codes(loralens.load(tmp_path / "peft"), consumer) == {"config": "error"}
    assert run("convert", tmp_path / "peft", "--to", "peft", "--alpha", "4", "-o", tmp_path / "b").exit_code == 0
    for consumer in ("vllm", "lorax", "peft"):
        assert codes(loralens.load(tmp_path / "b"), consumer) == {}


# --- llama.cpp and PEFT ---


def test_one_alpha_with_several_ranks_is_what_a_gguf_file_says(tmp_path: Path) -> None:
    adapter = mixed({"model.layers.0.self_attn.q_proj": (2, 1.0), "model.layers.1.self_attn.q_proj": (1, 2.0)})
    assert codes(adapter, "llama.cpp") == {"dialect": "error", "mixed-scale": "warning"}
    loralens.save(adapter, tmp_path / "a.gguf", format="gguf", arch="qwen2")
    assert codes(loralens.load(tmp_path / "a.gguf"), "llama.cpp") == {}


def test_peft_takes_its_own_dialect(tmp_path: Path) -> None:
    assert codes(peft(tmp_path), "peft") == {}
    assert codes(file(tmp_path, ACCEPTED["kohya"]), "peft") == {"dialect": "error"}
    assert codes(file(tmp_path, ACCEPTED["LoKr"]), "peft") == {"dialect": "error", "structured": "error"}


OTHERS = {  # PEFT's other types of updates: parts of a module, and fields of the configuration
    "ADALORA": ({"lora_A": (2, 4), "lora_B": (6, 2), "lora_E": (2, 1)},
                {"init_r": 3, "r": 8, "lora_alpha": 8, "rank_pattern": {"q.lora_E": [True, False, True]}}),
    "LOHA": ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 4), "hada_w2_a": (6, 2), "hada_w2_b": (2, 4)},
             {"r": 2, "alpha": 2}),
    "LOKR": ({"lokr_w1": (2, 2), "lokr_w2": (3, 2)}, {"r": 2, "alpha": 2}),
}  # fmt: skip


def other(folder: Path, kind: str) -> Path:
    shapes, fields = OTHERS[kind]
    folder.mkdir(parents=True)
    held = dict(zip(shapes, arrays(*shapes.values()), strict=True))
    save_file(
        {f"base_model.model.q.{part}": array for part, array in held.items()}, folder / "adapter_model.safetensors"
    )
    said = {"peft_type": kind, "target_modules": ["q"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("kind", OTHERS)
def test_servers_refuse_peft_s_other_types_and_take_what_the_fix_writes(kind: str, tmp_path: Path) -> None:
    """vLLM 0.33.0 calls each tensor of these "unsupported LoRA weight"; LoRAX finds none of AdaLoRA's."""
    path = other(tmp_path / "in", kind)
    for consumer in ("vllm", "lorax"):
        (found,) = refusals(loralens.load(path), consumer)
        assert (found.level, found.code) == ("error", "peft-type")
        assert kind in found.text
    assert codes(loralens.load(path), "llama.cpp")["dialect"] == "error"
    assert codes(loralens.load(path), "peft") == {}
    rank = ["--rank", "4"] if "--rank" in found.fix else []
    assert rank or kind == "ADALORA"
    assert run("convert", path, "--to", "peft", "-o", tmp_path / "out", *rank).exit_code == 0
    for consumer in ("vllm", "lorax", "peft"):
        assert codes(loralens.load(tmp_path / "out"), consumer) == {}
