"""Adapters of torchtune and LitGPT with a base of Hugging Face, which has other names and another order of rows."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from tests.bases import single
from tests.formats.stores import drawn
from tests.tolerances import SAME_UPDATE

HEADS, GROUPS, SIZE, HIDDEN, INNER = 4, 2, 4, 12, 10
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": SIZE,
    "hidden_size": HIDDEN,
}
QWEN = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
PHI = LLAMA | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
LAYER = "model.layers.1."
SHAPES = {
    f"{LAYER}self_attn.q_proj": (HEADS * SIZE, HIDDEN),
    f"{LAYER}self_attn.k_proj": (GROUPS * SIZE, HIDDEN),
    f"{LAYER}self_attn.v_proj": (GROUPS * SIZE, HIDDEN),
    f"{LAYER}self_attn.o_proj": (HIDDEN, HEADS * SIZE),
    f"{LAYER}mlp.gate_proj": (INNER, HIDDEN),
    f"{LAYER}mlp.up_proj": (INNER, HIDDEN),
    f"{LAYER}mlp.down_proj": (HIDDEN, INNER),
    "lm_head": (20, HIDDEN),
}
Q, K, V, OUT, GATE, UP, DOWN, HEAD = SHAPES
TUNE = {
    **{name: name.replace("model.", "").replace("self_attn", "attn") for name in (Q, K, V)},
    OUT: "layers.1.attn.output_proj",
    GATE: "layers.1.mlp.w1",
    UP: "layers.1.mlp.w3",
    DOWN: "layers.1.mlp.w2",
    HEAD: "output",
}
BLOCK = "transformer.h.1."
LIT = {OUT: f"{BLOCK}attn.proj", GATE: f"{BLOCK}mlp.fc_1", UP: f"{BLOCK}mlp.fc_2", DOWN: f"{BLOCK}mlp.proj", HEAD: HEAD}


def base_at(path: Path, config=LLAMA) -> Path:
    single(path, {f"{name}.weight": drawn(*shape) for name, shape in SHAPES.items()}, config=config)
    if not config:
        (path / "config.json").unlink()
    return path


def tune_at(path: Path, **more):
    """A torchtune adapter of every module, and ΔW under torchtune's names."""
    tensors, deltas = {}, {}
    for name, own in TUNE.items():
        out, in_ = SHAPES[name]
        A, B = drawn(2, in_), drawn(out, 2)
        tensors |= {f"{own}.lora_a.weight": A, f"{own}.lora_b.weight": B}
        deltas[own] = B.astype(np.float64) @ A
    save_file({**tensors, **more}, path)
    return deltas


def lit_at(path: Path, parts="qkv", fused="qkv"):
    """A LitGPT adapter of every module, and ΔW of each part of the fused projection, by blocks."""
    tensors, deltas = {}, {}
    for name, own in LIT.items():
        out, in_ = SHAPES[name]
        tensors |= {f"{own}.lora_A": drawn(2, in_), f"{own}.lora_B": drawn(out, 2)}
        deltas[name] = tensors[f"{own}.lora_B"].astype(np.float64) @ tensors[f"{own}.lora_A"]
    A = {part: drawn(2, HIDDEN) for part in parts}
    B = {part: drawn(SHAPES[f"{LAYER}self_attn.{part}_proj"][0], 2) for part in parts}
    deltas |= {f"{LAYER}self_attn.{part}_proj": B[part].astype(np.float64) @ A[part] for part in parts}
    stem = f"{BLOCK}attn.{fused}"
    tensors |= {f"{stem}.lora_A": np.concatenate([*A.values()]), f"{stem}.lora_B": np.concatenate([*B.values()])}
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    flags = {f"lora_{word}": word[0] in parts for word in ("query", "key", "value")}
    (path / "adapter_config.json").write_text(json.dumps({**flags, "lora_alpha": 2, "lora_r": 2}))
    return deltas


def check(adapter, expected):
    assert set(adapter) == set(expected)
    for name, delta in expected.items():
        np.testing.assert_allclose(adapter[name].dense(), delta, **SAME_UPDATE)


def in_halves(rows):
    """Rows of which pairs are neighbours → rows with all first ones of a head before all second ones."""
    out = np.empty_like(rows)
    for head in range(len(rows) // SIZE):
        for i in range(SIZE // 2):
            for j in range(2):
                out[head * SIZE + i + j * SIZE // 2] = rows[head * SIZE + 2 * i + j]
    return out


@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen2"])
def test_torchtune_in_a_base_of_hugging_face(tmp_path: Path, config) -> None:
    base = base_at(tmp_path / "base", config)
    magnitudes = {name: drawn(shape[0]) for name, shape in SHAPES.items()}
    more = {f"{TUNE[name]}.magnitude": magnitude for name, magnitude in magnitudes.items()}
    deltas = tune_at(tmp_path / "tune.safetensors", **more)
    order = in_halves if config is LLAMA else np.asarray
    expected = {name: order(deltas[own]) if name in (Q, K) else deltas[own] for name, own in TUNE.items()}
    loralens.convert(tmp_path / "tune.safetensors", to="peft", base=base, alpha=2, output=tmp_path / "peft")
    for adapter in (
        loralens.load(tmp_path / "tune.safetensors", alpha=2, base=base),
        loralens.load(tmp_path / "peft"),
    ):
        check(adapter, expected)
        found = {extra.module: extra.tensor.read() for extra in adapter.extra.values()}
        assert set(found) == set(SHAPES)
        for name, magnitude in magnitudes.items():
            np.testing.assert_array_equal(found[name], order(magnitude) if name in (Q, K) else magnitude)


@pytest.mark.parametrize("parts", ["qkv", "qv", "k"])
def test_litgpt_in_a_base_of_hugging_face(tmp_path: Path, parts) -> None:
    base = base_at(tmp_path / "base")
    expected = lit_at(tmp_path / "lit", parts)
    check(loralens.load(tmp_path / "lit", base=base), expected)
    merged = load_file(
        loralens.merge(tmp_path / "lit", base=base, output=tmp_path / "out").output / "model.safetensors"
    )
    before = load_file(base / "model.safetensors")
    for name, delta in expected.items():
        np.testing.assert_allclose(merged[f"{name}.weight"], before[f"{name}.weight"] + delta, atol=1e-5)


def test_old_litgpt_has_its_rows_by_groups(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base")
    expected = lit_at(tmp_path / "lit", "qv", fused="attn")
    check(loralens.load(tmp_path / "lit", base=base), expected)
    # With all three parts, LitGPT added the rows [q; k; v] to a weight that has them by groups.
    deltas = lit_at(tmp_path / "all", "qkv", fused="attn")
    rows = np.concatenate([deltas.pop(name) for name in (Q, K, V)]).reshape(GROUPS, -1, SIZE, HIDDEN)
    shared = HEADS // GROUPS
    parts = {Q: rows[:, :shared], K: rows[:, shared], V: rows[:, shared + 1]}
    deltas |= {name: part.reshape(-1, HIDDEN) for name, part in parts.items()}
    check(loralens.load(tmp_path / "all", base=base), deltas)


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        (PHI, {}, "are not known for a base of type 'phi3'"),
        (None, {}, "a base without a config.json"),
        (LLAMA | {"num_attention_heads": 3}, {}, "16 rows cannot be divided into 3 heads"),
        (
            LLAMA,
            {"layers.1.mlp.experts.lora_gate_a": (2, 4, 2), "layers.1.mlp.experts.lora_gate_b": (2, 2, 5)},
            "1 of 9 modules have no known name in a model of Hugging Face: layers.1.mlp.experts.gate_proj",
        ),
    ],
)
def test_what_has_no_name_there_is_refused(tmp_path: Path, config, more, message) -> None:
    base = base_at(tmp_path / "base", config)
    tune_at(tmp_path / "tune.safetensors", **{key: drawn(*shape) for key, shape in more.items()})
    with pytest.raises(loralens.MismatchError, match=message):
        loralens.inspect(tmp_path / "tune.safetensors", base=base)


def test_weights_under_torchtune_s_own_names_stay_what_they_are(tmp_path: Path) -> None:
    single(tmp_path / "base", {f"{own}.weight": drawn(*SHAPES[name]) for name, own in TUNE.items()}, config=LLAMA)
    deltas = tune_at(tmp_path / "tune.safetensors")
    check(loralens.load(tmp_path / "tune.safetensors", alpha=2, base=tmp_path / "base"), deltas)


@pytest.mark.live
def test_torchtune_converts_the_same(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    found = importlib.util.find_spec("torchtune")
    if found is None:
        pytest.skip("torchtune is not installed")
    # The file alone, because importing the package needs all that its recipes need.
    file = Path(found.submodule_search_locations[0]) / "models" / "convert_weights.py"
    spec = importlib.util.spec_from_file_location("torchtune_convert_weights", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    base = base_at(tmp_path / "base")
    deltas = tune_at(tmp_path / "tune.safetensors")
    state = {f"{own}.weight": torch.from_numpy(delta) for own, delta in deltas.items()}
    theirs = module.tune_to_hf(state, HEADS, GROUPS, HIDDEN, SIZE)
    expected = {key.removesuffix(".weight"): tensor.numpy() for key, tensor in theirs.items()}
    check(loralens.load(tmp_path / "tune.safetensors", alpha=2, base=base), expected)


@pytest.mark.live
@pytest.mark.parametrize("parts", ["qkv", "qv"])
def test_litgpt_converts_the_same(tmp_path: Path, parts) -> None:
    script = pytest.importorskip("litgpt.scripts.convert_lit_checkpoint", exc_type=ImportError)
    torch = pytest.importorskip("torch")
    lora = pytest.importorskip("litgpt.lora")
    base = base_at(tmp_path / "base")
    lit_at(tmp_path / "lit", parts)
    tensors = load_file(tmp_path / "lit" / "adapter_model.safetensors")
    qkv = lora.LoRAQKVLinear(
        HIDDEN, (HEADS + 2 * GROUPS) * SIZE, SIZE, HEADS, GROUPS,
        r=2, lora_alpha=2, enable_lora=[part in parts for part in "qkv"],
    )  # fmt: skip
    state = {}
    for name in {*LIT.values(), f"{BLOCK}attn.qkv"}:
        A, B = (torch.from_numpy(tensors[f"{name}.lora_{half}"]) for half in "AB")
        if name.endswith("qkv"):
            qkv.lora_A.data, qkv.lora_B.data = A, B
        state[f"{name}.weight"] = qkv.get_lora_AB().detach() if name.endswith("qkv") else B @ A
    config = script.Config(
        n_head=HEADS,
        n_query_groups=GROUPS,
        head_size=SIZE,
        n_embd=HIDDEN,
        mlp_class_name="LLaMAMLP",
        intermediate_size=INNER,
    )
    theirs = {}
    script.copy_weights_llama(config, theirs, state)
    expected = {key.removesuffix(".weight"): tensor.numpy() for key, tensor in theirs.items() if tensor.any()}
    adapter = loralens.load(tmp_path / "lit", base=base)
    assert set(adapter) == set(expected)
    for name, delta in expected.items():
        np.testing.assert_allclose(adapter[name].dense(), delta, atol=1e-5)
