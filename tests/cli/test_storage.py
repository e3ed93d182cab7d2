"""One adapter of expert stacks, one network in two storages: every verb that has a base says the same of both."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.bases import peft_folder, single, stored
from tests.cli.command import Command, near

done = Command().good
E, F, D = 3, 10, 16
CONFIG = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
BLOCK = "model.layers.0"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """An adapter, a base with stacks, and the same one with every expert alone."""
    rng = np.random.default_rng(0)

    def floats(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    gate_up, down, router, q = floats(E, 2 * F, D), floats(E, D, F), floats(E, D), floats(D, D)
    rest = {f"{BLOCK}.self_attn.q_proj.weight": q}
    path = f"{BLOCK}.mlp"
    stacks = {f"{path}.experts.gate_up_proj": gate_up, f"{path}.experts.down_proj": down, f"{path}.gate.weight": router}
    moe = f"{BLOCK}.block_sparse_moe"
    alone = {f"{moe}.gate.weight": router}
    for e in range(E):
        alone |= {f"{moe}.experts.{e}.w1.weight": gate_up[e, :F].copy(), f"{moe}.experts.{e}.w2.weight": down[e]}
        alone |= {f"{moe}.experts.{e}.w3.weight": gate_up[e, F:].copy()}
    pairs = {
        "mlp.experts.base_layer": (2 * F, D, 4 * E),
        "mlp.experts": (D, F, 2 * E),
        "mlp.gate": (E, D, 2),
        "self_attn.q_proj": (D, D, 2),
    }
    tensors = {}
    for name, (out, in_, rank) in pairs.items():
        tensors |= {
            f"{BLOCK}.{name}.lora_A.weight": floats(rank, in_),
            f"{BLOCK}.{name}.lora_B.weight": floats(out, rank),
        }
    config = {
        "peft_type": "LORA", "peft_version": "0.21.2", "r": 2, "lora_alpha": 0.2, "target_modules": ["gate", "q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "rank_pattern": {r".*\.gate_up_proj": 4}, "alpha_pattern": {r".*\.gate_up_proj": 0.4},
    }  # fmt: skip
    return (
        peft_folder(tmp_path / "adapter", tensors, config),
        single(tmp_path / "stacks", {**stacks, **rest}, config=CONFIG),
        single(tmp_path / "alone", {**alone, **rest}, config=CONFIG),
    )


@pytest.mark.some(2)
@pytest.mark.parametrize("command", ["amplify", "spectrum", "doctor", "intruders"])
def test_a_verb_says_the_same_of_both(command, folders, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    adapter, stacks, alone = folders
    records = [Command(command).told(adapter, "--base", base) for base in (stacks, alone)]
    told = [
        json.dumps(record).replace(str(base), "BASE") for record, base in zip(records, (stacks, alone), strict=True)
    ]
    near(*map(json.loads, told), rel=1e-9)


def test_a_merge_is_the_same_and_says_where_each_half_went(folders, tmp_path: Path) -> None:
    adapter, stacks, alone = folders
    done("merge", adapter, "--base", stacks, "-o", tmp_path / "one")
    done("merge", adapter, "--base", alone, "-o", tmp_path / "two")
    one, two = stored(tmp_path / "one"), stored(tmp_path / "two")
    for e in range(E):
        path = f"{BLOCK}.block_sparse_moe.experts.{e}"
        gate_up = one[f"{BLOCK}.mlp.experts.gate_up_proj"][e]
        np.testing.assert_array_equal(two[f"{path}.w1.weight"], gate_up[:F])
        np.testing.assert_array_equal(two[f"{path}.w3.weight"], gate_up[F:])
        np.testing.assert_array_equal(two[f"{path}.w2.weight"], one[f"{BLOCK}.mlp.experts.down_proj"][e])
    np.testing.assert_array_equal(two[f"{BLOCK}.block_sparse_moe.gate.weight"], one[f"{BLOCK}.mlp.gate.weight"])
    said = json.loads((tmp_path / "two" / "merge_certificate.json").read_text())
    names = [module["name"] for module in said["modules"]]
    assert len(names) == len(set(names)) == 3 * E + 2
    assert f"{BLOCK}.mlp.experts.gate_up_proj[1] in {BLOCK}.block_sparse_moe.experts.1.w3.weight" in names


def first_expert(folder: Path, **more: tuple[int, ...]) -> Path:
    """An adapter of one expert alone, with more tensors beside the pair."""
    rng, shapes = np.random.default_rng(1), {"lora_A.weight": (2, D), "lora_B.weight": (F, 2), **more}
    path = f"{BLOCK}.block_sparse_moe.experts.1.w1"
    tensors = {f"{path}.{name}": rng.random(shape).astype(np.float32) for name, shape in shapes.items()}
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["w1"], "use_dora": bool(more)}
    return peft_folder(folder, tensors, said)


def test_two_adapters_that_cut_a_tensor_otherwise(folders, tmp_path: Path) -> None:
    adapter, stacks, _ = folders
    other = first_expert(tmp_path / "other")
    done("merge", other, "--base", stacks, "-o", tmp_path / "first")
    said = Command("merge").refused(adapter, other, "--base", stacks, "-o", tmp_path / "out")
    assert "another adapter adapts a range that overlaps" in said


def test_what_is_of_a_whole_module_is_refused_for_a_part(folders, tmp_path: Path) -> None:
    """DoRA's lengths are those of the rows of W, which another module changes too."""
    _, stacks, _ = folders
    other = first_expert(tmp_path / "other", lora_magnitude_vector=(F,))
    said = Command("merge").refused(other, "--base", stacks, "-o", tmp_path / "out")
    assert "in parts, but a magnitude needs the whole weight" in said


@pytest.mark.some(2)
@pytest.mark.parametrize(("to", "name"), [("mlx", "mlx"), ("gguf", "adapter.gguf")])
@pytest.mark.parametrize("storage", [0, 1], ids=["stacks", "alone"])
def test_what_convert_writes_of_expert_stacks_merges_as_the_adapter_does(
    folders, to: str, name: str, storage: int, tmp_path: Path
) -> None:
    """The target cuts and calls the experts otherwise, and what rounding cost is measured all the same."""
    adapter, base = folders[0], folders[1 + storage]
    config = {"hidden_size": D, "num_local_experts": E, "num_attention_heads": 2, "num_key_value_heads": 2}
    (base / "config.json").write_text(json.dumps({**CONFIG, **config}))
    done("compress", adapter, "--rank", "2", "-o", tmp_path / "uniform")  # mlx-lm has one rank for all modules
    adapter = tmp_path / "uniform"
    command = ("convert", adapter, "--to", to, "--base", base, "--json", "-o")
    exact = json.loads(done(*command, tmp_path / name).stdout)["rounding"]
    halved = json.loads(done(*command, tmp_path / f"f16-{name}", "--dtype", "f16").stdout)["rounding"]
    assert exact["error"] < 1e-7 < 1e-5 < halved["error"] < 1e-3  # α = 0.2 has no float32 of its own
    done("merge", adapter, "--base", base, "-o", tmp_path / "one")
    done("merge", tmp_path / name, "--base", base, "-o", tmp_path / "two")
    one, two = stored(tmp_path / "one"), stored(tmp_path / "two")
    for key, weight in one.items():
        np.testing.assert_allclose(two[key], weight, rtol=0, atol=2e-6, err_msg=key)
