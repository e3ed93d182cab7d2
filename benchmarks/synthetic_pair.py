"""Blocks of a small Llama in bf16, two tuned versions of it, and two adapters for it.

``tuned`` stands for a full fine-tune: it differs from ``base`` in every direction, with factors weighted by i^−0.7.
``merged`` is ``base`` with adapter ``one`` merged and rounded to bf16: it differs in 16 directions and rounding noise.
"""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

HIDDEN, INNER, BLOCKS, VOCABULARY, RANK, SCALE = 1024, 2816, 2, 512, 16, 2.0
RELATIVE, DECAY = 0.05, 0.7  # ‖ΔW‖/‖W‖; how fast the directions of a full fine-tune fall, as i^−DECAY
DEVIATION = 0.02  # the standard deviation of the entries of W

Weights = dict[str, NDArray[np.float32]]


def make(folder: Path, *, hidden: int = HIDDEN, inner: int = INNER, blocks: int = BLOCKS) -> Path:
    """The folder with ``base``, ``tuned``, ``merged``, ``one``, ``two``, and the two adapters as rsLoRA; made once."""
    done = folder / "done"
    if done.exists():
        return folder
    rng = np.random.default_rng(0)
    shapes = _shapes(hidden, inner, blocks)
    base = {name: _narrow(DEVIATION * rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
    pairs = [{name: _pair(rng, shape) for name, shape in shapes.items()} for _ in range(2)]
    tuned = {name: W + _full(rng, W.shape) for name, W in base.items()}
    merged = {name: W + SCALE * pairs[0][name][0] @ pairs[0][name][1] for name, W in base.items()}
    rest = _rest(rng, hidden, blocks)
    for name, weights in {"base": base, "tuned": tuned, "merged": merged}.items():
        _write_model(folder / name, weights | rest, hidden=hidden, inner=inner, blocks=blocks)
    for name, pair in zip(("one", "two"), pairs, strict=True):
        write_adapter(folder / name, pair, alpha=SCALE * RANK)
        write_adapter(folder / f"{name}-rslora", pair, alpha=SCALE * RANK**0.5, use_rslora=True)
    done.touch()
    return folder


def make_tiny(folder: Path) -> Path:
    """The same, of one small block."""
    return make(folder, hidden=64, inner=96, blocks=1)


def write_adapter(
    folder: Path, pairs: dict[str, tuple[NDArray[np.float32], ...]], *, alpha: float, **more: bool
) -> None:
    """Write an adapter in PEFT's format from pairs (B, A)."""
    folder.mkdir(parents=True, exist_ok=True)
    sides = {(name, side): X for name, pair in pairs.items() for side, X in zip("BA", pair, strict=True)}
    tensors = {f"base_model.model.{name}.lora_{side}.weight": X for (name, side), X in sides.items()}
    targets = sorted({name.rpartition(".")[2] for name in pairs})
    rank = next(iter(pairs.values()))[1].shape[0]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config | more))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _shapes(hidden: int, inner: int, blocks: int) -> dict[str, tuple[int, int]]:
    kinds = {f"self_attn.{one}_proj": (hidden, hidden) for one in "qkvo"}
    kinds |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    return {f"model.layers.{block}.{kind}": shape for block in range(blocks) for kind, shape in kinds.items()}


def _pair(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """B (out, r) and A (r, in) with ‖scale · B A‖ = RELATIVE ‖W‖."""
    size = RELATIVE * DEVIATION / (SCALE * RANK**0.5)
    B = rng.standard_normal((shape[0], RANK), np.float32) * np.float32(size * shape[1] ** 0.5)
    return B, rng.standard_normal((RANK, shape[1]), np.float32) / np.float32(shape[1] ** 0.5)


def _full(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    k = min(shape)
    fall = np.arange(1, k + 1, dtype=np.float32) ** -DECAY
    D = (rng.standard_normal((shape[0], k), np.float32) * fall) @ rng.standard_normal((k, shape[1]), np.float32)
    scaled: NDArray[np.float32] = D * np.float32(RELATIVE * DEVIATION * D.size**0.5 / np.linalg.norm(D))
    return scaled


def _rest(rng: np.random.Generator, hidden: int, blocks: int) -> Weights:
    """The tensors that all three models share: embeddings, head and norms."""
    norms = [f"model.layers.{b}.{n}_layernorm" for b in range(blocks) for n in ("input", "post_attention")]
    ends = ("lm_head", "model.embed_tokens")
    rest = {name: DEVIATION * rng.standard_normal((VOCABULARY, hidden), np.float32) for name in ends}
    return rest | {name: np.ones(hidden, np.float32) for name in [*norms, "model.norm"]}


def _write_model(folder: Path, weights: Weights, *, hidden: int, inner: int, blocks: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.weight": W.astype(ml_dtypes.bfloat16) for name, W in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": blocks, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _narrow(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """The array rounded to bf16, so that ΔW is added to the same weights that ``base`` stores."""
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
