"""Make what these pages are run on: a small made-up model, adapters of it, a training run, and texts.

    python docs/playground.py out/playground && cd out/playground

Nothing in it was trained. The adapters are built so that each page has something true to show:

base            a Llama of 4 blocks, width 128, in bfloat16, with a tokenizer of words
wide            r = 64, of which a dozen directions carry almost everything
chat code legal poems terse    five adapters of r = 8; poems and terse want opposite things in blocks 2 and 3
faint           so weak that a merge into bfloat16 loses most of it
run             three checkpoints of one run, with its losses
watch.jsonl     the log of a watcher that measured them
texts.txt held.txt    sentences of the tokenizer's words
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import loralens
from loralens.core.lazy import Array
from loralens.core.lowrank import Scaling
from loralens.watching import Watcher

WIDTH, BLOCKS, INNER = 128, 4, 256
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj")
NAMES = [f"model.layers.{block}.self_attn.{kind}" for block in range(BLOCKS) for kind in KINDS]
WORDS = (
    *("the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "under", "over", "mat", "tree", "house", "and"),
    *("then", "it", "slept", "small", "old", "quick", "red", "blue"),
)
SPECIAL = ("[PAD]", "[END]", "[UNK]")

Pairs = Mapping[str, tuple[Array, Array]]


def directions(rng: np.random.Generator, count: int) -> Array:
    """Orthonormal columns, (WIDTH, count)."""
    return np.linalg.qr(rng.standard_normal((WIDTH, count)))[0]


def pair(U: Array, s: Array, V: Array) -> tuple[Array, Array]:
    """B (out, r) and A (r, in) with B·A = U·diag(s)·Vᵀ."""
    root = np.sqrt(s)
    return U * root, (V * root).T


def save(folder: Path, pairs: Pairs, *, alpha: float) -> None:
    """The pairs as a PEFT folder."""
    rank = len(next(iter(pairs.values()))[1])
    scaling = Scaling("alpha/r", alpha, rank, "adapter_config.json")
    modules = {
        name: loralens.LowRank(B.astype(np.float32), A.astype(np.float32), scaling.value, scaling=scaling)
        for name, (B, A) in pairs.items()
    }
    loralens.save(loralens.Adapter(modules=modules, base_model="base"), folder, overwrite=True)


def base(folder: Path) -> None:
    """The model that everything here adapts: configuration, weights, tokenizer."""
    rng = np.random.default_rng(0)
    vocabulary = len(SPECIAL) + len(WORDS)
    shapes = {"model.embed_tokens": (vocabulary, WIDTH), "lm_head": (vocabulary, WIDTH)}
    shapes |= dict.fromkeys(NAMES, (WIDTH, WIDTH))
    for block in range(BLOCKS):
        mlp = f"model.layers.{block}.mlp"
        shapes |= dict.fromkeys((f"{mlp}.gate_proj", f"{mlp}.up_proj"), (INNER, WIDTH))
        shapes[f"{mlp}.down_proj"] = (WIDTH, INNER)
    tensors = {f"{name}.weight": rng.standard_normal(shape) / np.sqrt(shape[1]) for name, shape in shapes.items()}
    for block in range(BLOCKS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{block}.{norm}.weight"] = np.ones(WIDTH)
    tensors["model.norm.weight"] = np.ones(WIDTH)
    folder.mkdir(parents=True, exist_ok=True)
    narrow = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    save_file(narrow, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": vocabulary, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    words = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    added = [
        {"id": words[word], "content": word, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for word in SPECIAL
    ]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"},
    }  # fmt: skip
    names = {"pad_token": "[PAD]", "eos_token": "[END]", "unk_token": "[UNK]"}
    write(folder / "config.json", config)
    write(folder / "tokenizer.json", tokenizer)
    write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})


def wide(folder: Path) -> None:
    """Rank 64: a dozen directions that fall off, earlier in the queries than in the values, and noise."""
    rng = np.random.default_rng(1)
    fall = {"q_proj": 0.5, "k_proj": 0.55, "v_proj": 0.8, "o_proj": 0.7}
    pairs = {}
    for name in NAMES:
        block = int(name.split(".")[2])
        s = (1 + block / 10) * (0.6 * fall[name.rpartition(".")[2]] ** np.arange(64) + 0.004)
        pairs[name] = pair(directions(rng, 64), s, directions(rng, 64))
    save(folder, pairs, alpha=64)


def tasks(folder: Path) -> None:
    """Five adapters of rank 8. Those of poems and terse share directions in blocks 2 and 3, with opposite signs."""
    s = 0.5 * 0.75 ** np.arange(8)
    shared = np.random.default_rng(2)
    opposed = {name: (directions(shared, 8), directions(shared, 8)) for name in NAMES if ".2." in name or ".3." in name}
    for seed, task in enumerate(("chat", "code", "legal", "poems", "terse"), start=10):
        rng = np.random.default_rng(seed)
        pairs = {}
        for name in NAMES:
            U, V = directions(rng, 8), directions(rng, 8)
            if name in opposed and task in ("poems", "terse"):
                kept = 5  # directions that both use
                U[:, :kept], V[:, :kept] = opposed[name][0][:, :kept], opposed[name][1][:, :kept]
                U[:, :kept] *= 1 if task == "poems" else -1
            pairs[name] = pair(U, s, V)
        save(folder / task, pairs, alpha=8)


def faint(folder: Path) -> None:
    """An update of 0.2 % of the weights: bfloat16 has steps of 0.4 to 0.8 % of a weight."""
    rng = np.random.default_rng(3)
    s = 0.01 * 0.75 ** np.arange(8)
    save(folder, {name: pair(directions(rng, 8), s, directions(rng, 8)) for name in NAMES}, alpha=8)


def run(folder: Path) -> None:
    """Three checkpoints: A stays near its beginning, B grows, and turns at first."""
    rng = np.random.default_rng(4)
    s = 0.7 ** np.arange(8)
    first, last, start = ({name: directions(rng, 8) for name in NAMES} for _ in range(3))
    for step, size, turned in ((100, 0.1, 0.3), (200, 0.3, 0.9), (300, 0.4, 1.0)):
        pairs = {}
        for name in NAMES:
            B = size * ((1 - turned) * first[name] + turned * last[name]) * s
            pairs[name] = (B, start[name].T)
        save(folder / f"checkpoint-{step}", pairs, alpha=8)
    losses = [
        {"step": step, "loss": loss} for step, loss in ((50, 3.2), (100, 2.9), (150, 2.3), (200, 2.0), (300, 1.9))
    ]
    write(folder / "checkpoint-300" / "trainer_state.json", {"global_step": 300, "log_history": losses})


def watch(checkpoints: Path, log: Path) -> None:
    """Measure the checkpoints of a run as a watcher does during the training."""
    log.unlink(missing_ok=True)  # of an earlier playground in this folder
    watcher = Watcher(log=log)
    for step in (100, 200, 300):
        watcher.look(step, loralens.load(checkpoints / f"checkpoint-{step}"))


def texts(file: Path, *, seed: int, count: int) -> None:
    """Sentences, one a line; early words are likelier."""
    rng = np.random.default_rng(seed)
    chances = 1 / np.arange(2, len(WORDS) + 2)
    lines = [" ".join(rng.choice(WORDS, size=rng.integers(5, 20), p=chances / chances.sum())) for _ in range(count)]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write(file: Path, value: object) -> None:
    """JSON."""
    file.write_text(json.dumps(value, indent=1), encoding="utf-8")


def main(folder: Path) -> None:
    """All of it under ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    base(folder / "base")
    wide(folder / "wide")
    tasks(folder)
    faint(folder / "faint")
    run(folder / "run")
    watch(folder / "run", folder / "watch.jsonl")
    texts(folder / "texts.txt", seed=5, count=64)
    texts(folder / "held.txt", seed=6, count=64)


if __name__ == "__main__":
    arguments: Sequence[str] = sys.argv[1:] or ["out/playground"]
    main(Path(arguments[0]))
