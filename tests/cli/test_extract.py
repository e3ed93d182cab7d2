"""``loralens extract``: what it says, what it refuses, and that base and adapter together are the tuned model."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from loralens import Adapter, LowRank
from tests import models
from tests.cli.command import Command
from tests.tolerances import EXTRACTED_OUTPUT

run = Command().run


def told(base: Path, tuned: Path, *args: object) -> dict[str, object]:
    found: dict[str, object] = Command("extract").told("--base", base, "--tuned", tuned, *args)
    return found


def step(rows: int, columns: int, *values: float) -> np.ndarray:
    """A matrix whose singular values are these."""
    D = np.zeros((rows, columns), np.float32)
    D[range(len(values)), range(len(values))] = values
    return D


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints: q differs by values 4 and 1, v by 1, o not at all, a norm and an embedding do."""
    base = {f"layers.0.{name}.weight": np.zeros((6, 4), np.float32) for name in ("q", "v", "o")}
    base |= {"norm.weight": np.ones(4, np.float32), "embed_tokens.weight": np.zeros((8, 4), np.float32)}
    tuned = {**base, "layers.0.q.weight": step(6, 4, 4, 1), "layers.0.v.weight": step(6, 4, 1)}
    tuned |= {"norm.weight": np.full(4, 2, np.float32), "embed_tokens.weight": step(8, 4, 3)}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path / "base", tmp_path / "tuned"


def test_a_size_is_kept_to_the_byte(both: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = both

    def made(*rule: object) -> tuple[list[int], int]:
        record = told(base, tuned, "-o", tmp_path / "out", *rule, "--overwrite")
        size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
        return [one["rank"] for one in record["modules"]], size

    ranks, size = made("--energy", 1)
    assert ranks == [2, 1]
    assert made("--size", size) == ([2, 1], size)
    ranks, smaller = made("--size", size - 1)
    assert ranks == [1, 1]
    assert smaller < size


def test_float8_with_scales_has_no_known_rounding(both: tuple[Path, Path]) -> None:
    base, tuned = both
    tensors = load_file(tuned / "model.safetensors")
    tensors["layers.0.q.weight"] = tensors["layers.0.q.weight"].astype(ml_dtypes.float8_e4m3fn)
    tensors["layers.0.q.weight_scale"] = np.ones(1, np.float32)
    save_file(tensors, tuned / "model.safetensors")
    result = run("extract", "--base", base, "--tuned", tuned, "--noise-edge", "--dry-run")
    assert result.exit_code == 2
    assert "--noise-edge median" in result.stderr
    assert run("extract", "--base", base, "--tuned", tuned, "--rank", 1, "--dry-run").exit_code == 0


def cosine(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.vdot(one, two) / np.linalg.norm(one) / np.linalg.norm(two))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_a_merge_gives_the_adapter_back_as_the_certificate_says(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(1)
    wide = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    base = {f"a.{i}.weight": (0.02 * rng.standard_normal((96, 80))).astype(wide) for i in range(2)}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    pairs = [0.01 * rng.standard_normal(shape).astype(np.float32) for shape in ((96, 4), (4, 80), (96, 4), (4, 80))]
    adapter = Adapter(modules={f"a.{i}": LowRank(pairs[2 * i], pairs[2 * i + 1], 2.0) for i in range(2)})
    loralens.save(adapter, tmp_path / "a", format="peft")
    merged = run("merge", tmp_path / "a", "--base", tmp_path / "base", "-o", tmp_path / "m", "--undo", "none")
    assert merged.exit_code == 0, merged.stderr
    certificate = json.loads((tmp_path / "m" / "merge_certificate.json").read_text())
    record = told(tmp_path / "base", tmp_path / "m", "-o", tmp_path / "out", "--noise-edge")
    back = loralens.load(tmp_path / "out")
    for stated, found in zip(certificate["modules"], record["modules"], strict=True):
        name = found["name"]
        was, now = adapter[name].dense(), back[name].dense()
        assert found["rank"] == 4 or dtype == "bf16"
        # all of the difference has the certificate's error; the directions of the adapter hold only a part of it
        assert np.linalg.norm(was - now) / np.linalg.norm(was) < stated["relative_error"]
        assert cosine(was, now) > 1 - 0.5 * stated["relative_error"] ** 2


def tuned_copy(net: object, seed: int, *, heads: bool = True) -> object:
    """The model with every parameter but the embeddings moved."""
    import copy

    import torch

    moved = copy.deepcopy(net)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in moved.named_parameters():
            if "embed" not in name and "wte" not in name and "wpe" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return moved


def causal(name: str) -> object:
    import torch
    import transformers

    if name == "llama":
        return models.llama()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "mixtral":
            config = transformers.MixtralConfig(
                vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
                num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager",
            )  # fmt: skip
            return transformers.MixtralForCausalLM(config).eval()
        config = transformers.GPT2Config(vocab_size=24, n_positions=32, n_embd=16, n_layer=2, n_head=2)
        return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.filterwarnings(
    r"ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"
)  # one that PEFT adds by itself
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral"])
def test_peft_makes_the_tuned_model_of_base_and_adapter(name: str, tmp_path: Path) -> None:
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    net = models.bert("BertForSequenceClassification", num_labels=3) if name == "bert" else causal(name)
    tuned = tuned_copy(net, 1)
    if name == "gpt2":
        tuned.tie_weights()
    models.folder(net, tmp_path / "base")
    models.folder(tuned, tmp_path / "tuned")
    one_rank = ["--uniform"] if name == "mixtral" else []  # PEFT loses rank_pattern where transformers renames experts
    told(tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "out", "--energy", 1, *one_rank)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        plain, wanted = net(ids).logits, tuned(ids).logits
        live = peft.PeftModel.from_pretrained(net, str(tmp_path / "out")).eval()
        got = live(ids).logits
    assert (plain - wanted).abs().max() > 0.01
    torch.testing.assert_close(got, wanted, **EXTRACTED_OUTPUT)
