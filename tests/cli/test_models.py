"""Models as they are loaded: how long a text may be, which tokens they know, and folders that are none."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from loralens import FormatError, LoraLensError, MismatchError
from loralens.training import Examples
from loralens.verbs.models.loaded import Loaded
from loralens.verbs.models.models import load_headed
from loralens.verbs.models.texts import InputText
from loralens.verbs.models.tokens import check_causal
from tests import models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet_torch")

HOW: dict[str, Any] = {"device": "cpu", "dtype": "f32", "threads": 1}
SMALL: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 12,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "first", "most"), [("Roberta", {"pad_token_id": 1}, 10), ("MPNet", {}, 10), ("Bert", {}, 12)]
)
def test_a_text_of_the_most_tokens_that_there_are_positions_for(kind: str, first: Any, most: int) -> None:
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**SMALL, **first)).eval()
    loaded = Loaded(model, models.tokenizer(), "")
    assert loaded.longest == most
    (batch,) = loaded.batches([InputText("cat " * 50)], batch=1, length=256)
    assert batch["input_ids"].shape == (1, most)
    with torch.no_grad():
        model(**batch)
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        model(input_ids=torch.full((1, most + 1), 5))


def test_tokens_that_the_model_does_not_have_are_named() -> None:
    tokenizer = models.tokenizer()
    tokenizer.add_tokens([f"extra{number}" for number in range(10)])
    loaded = Loaded(models.bert(), tokenizer, "")
    loaded.encode(["the cat"], length=8)  # a larger tokenizer alone does no harm
    with pytest.raises(MismatchError, match="text 2 holds 'extra9', token 26 of the tokenizer, and the model has 24"):
        loaded.encode(["the cat", "the extra9"], length=8)
    with pytest.raises(MismatchError, match="text 3 holds 'extra9'"):
        list(loaded.batches([InputText("a"), InputText("a"), InputText("extra9")], batch=2, length=8))
    tokenizer.pad_token = "extra9"
    with pytest.raises(MismatchError, match="pads with token 26, and the model has 24"):
        loaded.encode(["the cat"], length=8)


def load(path: Path, head: str | None = None, **how: Any) -> LoraLensError:
    with pytest.raises(LoraLensError) as error:
        load_headed(str(path), head, **{**HOW, **how})
    assert str(error.value).startswith(str(path)) or how
    return error.value


def test_folders_that_hold_no_model_that_can_be_run(tmp_path: Path) -> None:
    path = models.folder(models.llama(), tmp_path / "llama")
    assert "threads=99999999999 is more than 4096" in str(load(path, threads=99999999999))
    (path / "adapter_config.json").write_text("{}")
    assert "holds an adapter beside the model (adapter_config.json)\n  fix: move the adapter" in str(load(path))
    (path / "adapter_config.json").unlink()
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    refused = load(path)
    assert isinstance(refused, FormatError)
    assert "its weights are damaged (" in str(refused)
    assert "fix: copy or download them again" in str(refused)


@pytest.mark.parametrize(
    ("file", "fields", "loads"),
    [
        ("config.json", {"model_type": "strange", "auto_map": {"AutoConfig": "own.Own"}}, False),
        ("config.json", {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}, True),
        ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}, False),
    ],
)
def test_code_in_a_folder_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, fields: dict[str, Any], loads: bool
) -> None:
    """Whatever stands on standard input, where transformers would ask; a class of transformers itself is still used."""
    path, marker = models.folder(models.llama(), tmp_path / "llama"), tmp_path / "ran"
    (path / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | fields))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    if loads:
        assert load_headed(str(path), None, **HOW).head == "causal"
    else:
        refused = load(path)
        assert isinstance(refused, FormatError)
        assert "its auto_map names Python code of its own, and loralens runs no code from a model" in str(refused)
    assert not marker.exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_that_sees_later_tokens_is_refused_as_a_causal_one(dtype: str) -> None:
    examples = Examples([[3, 4, 5, 6, 7], [8]], 0)
    dtype = getattr(torch, dtype)
    model = models.bert("BertLMHeadModel")
    for name, parameter in model.named_parameters():
        parameter.data *= 8 if "attention" in name else 1  # as a trained one attends
    seeing = Loaded(model.to(dtype), None, "causal")
    with pytest.raises(MismatchError, match="this bert model looks at later tokens") as error:
        check_causal(seeing, examples)
    assert "fix: give a causal model" in str(error.value)
    check_causal(seeing, Examples([[3], [4]], 0))  # tells nothing
    check_causal(seeing, Examples([[3, 3]], 0))
    check_causal(Loaded(models.llama().to(dtype), None, "causal"), examples)
    check_causal(Loaded(models.bert("BertLMHeadModel", is_decoder=True).to(dtype), None, "causal"), examples)
