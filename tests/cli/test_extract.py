"""``loralens extract``: what it says, what it refuses, and that base and adapter together are the tuned model."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import models
from tests.bases import single
from tests.cli.command import Command
from tests.tolerances import EXTRACTED_OUTPUT

CALL = Command()
run, good, refused = CALL.run, CALL.good, CALL.refused


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
        single(tmp_path / name, tensors, config={})
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
    assert "--noise-edge median" in refused("extract", "--base", base, "--tuned", tuned, "--noise-edge", "--dry-run")
    good("extract", "--base", base, "--tuned", tuned, "--rank", 1, "--dry-run")


def tuned_copy(net: object, seed: int) -> object:
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

    from tests.formats import test_peft_live as judged

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {"gpt2": judged.gpt2, "mixtral": judged.mixtral, "llama": models.llama}[name]().eval()


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
