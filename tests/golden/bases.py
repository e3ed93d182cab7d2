"""Bases: small models, adapters and texts that the cases work on, made from fixed seeds without loralens."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BYTES, LENGTH = 256, 32  # vocabulary and positions of the models behind tests/trained


def make(folder: Path) -> None:
    """Everything under ``made``."""
    import torch

    torch.set_num_threads(1)
    _stored(folder)
    _tiny_models(folder)
    _models_of_the_trained(folder)
    for path in sorted(folder.rglob("config.json")):  # the version of a package is nobody's result
        config = json.loads(path.read_text())
        for key in ("transformers_version", "_diffusers_version"):
            config.pop(key, None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _stored(folder: Path) -> None:
    """Checkpoints in several dtypes, one in shards, and adapters for them."""
    from tests.bases import CONFIG, MODULES, sharded, single, tensors

    for name, dtype in (("f32", np.float32), ("f16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        config = CONFIG | {"torch_dtype": {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[name]}
        single(folder / f"base-{name}", tensors(dtype), config=config)
    sharded(folder / "base-shards", tensors())
    shapes = dict.fromkeys(MODULES, (6, 4))
    for seed, name in enumerate(("small-a", "small-b", "small-c")):
        peft_adapter(folder / name, shapes, rank=2, alpha=8, seed=seed)
    peft_adapter(folder / "faint", shapes, rank=2, alpha=8, seed=3, size=1e-3)
    single(folder / "base-roberta", _roberta(), config={"model_type": "roberta", "torch_dtype": "float32"})


def _roberta() -> dict[str, Any]:
    rng = np.random.default_rng(8)
    kinds = [f"{i}.attention.self.{kind}" for i in (0, 1) for kind in ("query", "value")]
    return {f"roberta.encoder.layer.{kind}.weight": rng.standard_normal((16, 16)).astype(np.float32) for kind in kinds}


def peft_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, int]], *, rank: int, alpha: int, seed: int, size: float = 0.25
) -> None:
    """Random pairs for weights of these shapes, as PEFT stores them."""
    rng = np.random.default_rng(seed)
    pairs = {
        name: (size * rng.standard_normal((rank, in_)), size * rng.standard_normal((out, rank)))
        for name, (out, in_) in shapes.items()
    }
    _peft_files(folder, pairs, alpha)


def _peft_files(folder: Path, pairs: Mapping[str, tuple[Any, Any]], alpha: int) -> None:
    """Pairs (A, B) of modules."""
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": half.astype(np.float32)
        for name, pair in pairs.items()
        for letter, half in zip("AB", pair, strict=True)
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": len(next(iter(pairs.values()))[0]), "lora_alpha": alpha, "bias": "none",
        "base_model_name_or_path": "tiny/base", "target_modules": sorted({name.rsplit(".", 1)[-1] for name in pairs}),
        "task_type": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _tiny_models(folder: Path) -> None:
    """Models that run, adapters for them, and texts."""
    from tests import models

    kinds = {
        "llama": (models.llama(), ("q_proj", "v_proj", "down_proj")),
        "llama-tied": (models.llama(tie_word_embeddings=True), ("q_proj", "v_proj")),
        "bert": (models.bert("BertForMaskedLM"), ("query", "value")),
        "classifier": (models.bert("BertForSequenceClassification", num_labels=2), ("query", "value")),
    }
    for name, (model, ends) in kinds.items():
        models.folder(model, folder / name)
        shapes = {
            layer: (module.out_features, module.in_features)
            for layer, module in model.named_modules()
            if layer.endswith(ends)
        }
        for seed, letter in enumerate("abc"):
            peft_adapter(folder / f"{name}-{letter}", shapes, rank=3, alpha=6, seed=seed)
    models.folder(models.decided_llama(), folder / "llama-decided")
    for word in ("cat", "tree"):
        module = models.one_word_adapter(word=word)[models.LAST]
        _peft_files(folder / "words" / word, {models.LAST: (module.A, module.B)}, alpha=1)
    tokenizer = folder / "bert" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"mask_token": "[UNK]"}))
    models.jsonl(folder / "texts.jsonl", label=("cat", "dog", "dog", "cat"))
    models.jsonl(folder / "other.jsonl", models.TEXTS[::-1], label=("cat", "dog", "dog", "cat"))
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "weights.json").write_text('{"*q_proj": 4.0}')


RECIPE = """method = "ties"
options = { density = 0.5 }
truncate = { rank = 2 }

[[adapters]]
path = "llama-a"
weight = 0.7
modules = { "v_proj" = 0.3 }

[[adapters]]
path = "llama-b"
"""


def _models_of_the_trained(folder: Path) -> None:
    """A base for each adapter of tests/trained: the shapes it was trained on, other numbers."""
    import transformers as t

    heads = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = t.BertConfig(vocab_size=BYTES, max_position_embeddings=LENGTH, intermediate_size=32, **heads)
    llama = t.LlamaConfig(vocab_size=BYTES, num_key_value_heads=1, intermediate_size=40, **heads)
    opt = heads | {"num_hidden_layers": 3, "ffn_dim": 32, "word_embed_proj_dim": 16}
    moe = heads | {"hidden_size": 12, "intermediate_size": 20, "num_key_value_heads": 1, "num_local_experts": 3}
    makers: dict[str, Callable[[], Any]] = {
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=BYTES, n_positions=LENGTH, n_embd=24, n_layer=2, n_head=2)
        ),
        "bert": lambda: t.BertForSequenceClassification(bert),
        "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=BYTES, hidden_size=16, n_layer=2, n_head=2)),
        "llama": lambda: t.LlamaForCausalLM(llama),
        "opt": lambda: t.OPTForCausalLM(t.OPTConfig(vocab_size=BYTES, max_position_embeddings=LENGTH, **opt)),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(vocab_size=BYTES, **moe)),
        "unet": _unet,
    }
    for name, maker in makers.items():
        seeded(maker).save_pretrained(folder / f"base-{name}")


def _unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def seeded(maker: Callable[[], Any]) -> Any:
    """What is made, with the random numbers of one seed."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return maker()
