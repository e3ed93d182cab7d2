"""Models that share the numbers of their embedding: merged, they do what PEFT's unmerged adapter does."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.bases import stored
from tests.cli.test_merge import contents, done, run
from tests.marks import when_used
from tests.tolerances import MERGED_OUTPUT

torch = pytest.importorskip("torch")
peft = when_used("peft")

pytestmark = [
    pytest.mark.usefixtures("quiet_torch"),
    pytest.mark.filterwarnings("ignore:Model .* `tie_word_embeddings=True`"),
]


def llama() -> Any:
    return models.llama(tie_word_embeddings=True)


def bert() -> Any:
    model = models.bert("BertForMaskedLM")
    model.cls.predictions.bias.data += torch.arange(24) / 10  # it is tied to that of the head
    return model


def logits(model: Any) -> Any:
    tokens = torch.arange(1, 13).reshape(2, 6)
    more = {"decoder_input_ids": tokens.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.double()(tokens, **more).logits


def trained(model: Any, folder: Path, **options: Any) -> None:
    """An adapter of PEFT's own, every tensor of it random."""
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=4, **options))
    models.shake(adapted, 0.3).save_pretrained(folder, save_embedding_layers=False)


def apart(folder: Path, model: Any, adapter: Path) -> float:
    """‖merged − unmerged‖/‖unmerged − base‖ of the logits."""
    merged, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    plain = logits(copy.deepcopy(model))
    theirs = logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter).eval())
    return float((logits(merged.eval()) - theirs).norm() / (theirs - plain).norm())


CASES = [
    (llama, {"target_modules": ["embed_tokens"]}, ["lm_head.weight"]),
    (llama, {"target_modules": ["lm_head"]}, ["lm_head.weight"]),
    (llama, {"target_modules": ["embed_tokens", "lm_head"]}, ["lm_head.weight"]),
    (llama, {"target_modules": ["embed_tokens"], "use_dora": True}, ["lm_head.weight"]),
    (llama, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, []),
    (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, ["lm_head.weight"]),
    (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, ["lm_head.weight"]),
    (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, []),
    (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}, []),
    (llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 3]}}, ["lm_head.weight"]),
    (llama, {"target_modules": ["q_proj"]}, []),
    (bert, {"target_modules": ["word_embeddings"]}, ["cls.predictions.decoder.bias", "cls.predictions.decoder.weight"]),
    (bert, {"target_modules": ["decoder"]}, ["cls.predictions.decoder.bias", "cls.predictions.decoder.weight"]),
    (models.gpt2, {"target_modules": ["wte"], "fan_in_fan_out": True}, ["lm_head.weight"]),
    (models.t5, {"target_modules": ["encoder.embed_tokens"]}, ["encoder.embed_tokens.weight"]),
    (models.t5, {"target_modules": ["embed_tokens"]}, ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight"]),
]


@pytest.mark.some(4)
@pytest.mark.parametrize(("make", "options", "new"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_the_merged_model_does_what_the_unmerged_adapter_does(make, options, new, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    trained(model, tmp_path / "adapter", **options)
    result = done("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    assert apart(tmp_path / "out", model, tmp_path / "adapter") < MERGED_OUTPUT
    held, before = stored(tmp_path / "out"), stored(tmp_path / "base")
    assert sorted(set(held) - set(before)) == new
    cost = sum(held[key].nbytes for key in new)
    assert (f"written as a weight of its own, {cost:,} bytes more" in result.stderr) == bool(new)
    assert result.stderr.count("bytes more") == bool(new)
    untied = json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert untied == (bool(new) and make is not models.t5)  # T5 reads the field as a scaling
    done("verify", tmp_path / "out", "--base", tmp_path / "base", "--adapter", tmp_path / "adapter")
    done("unmerge", tmp_path / "out", "-o", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "base")


def test_a_tie_can_be_kept(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    trained(model, tmp_path / "adapter", target_modules=["embed_tokens"])
    paths = (tmp_path / "adapter", "--base", tmp_path / "base")
    result = done("merge", *paths, "-o", tmp_path / "out", "--keep-tied")
    said = "lm_head.weight shares the weight of model.embed_tokens.weight and changes with it, unlike in the unmerged"
    assert said in result.stderr
    merged = type(model).from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert apart(tmp_path / "out", model, tmp_path / "adapter") > 1
    looked = ("verify", tmp_path / "out", "--base", tmp_path / "base", "--adapter", tmp_path / "adapter")
    done(*looked, "--keep-tied")
    refused = run(*looked)
    assert refused.exit_code == 1
    assert "lm_head.weight" in refused.stdout
    done("unmerge", tmp_path / "out", "-o", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")  # PEFT merges in place, and changes both
    elsewhere = ("verify", tmp_path / "theirs", "--base", tmp_path / "base", "--adapter", tmp_path / "adapter")
    assert run(*elsewhere).exit_code == 1
    done(*elsewhere, "--keep-tied")


def test_an_adapted_head_cannot_stay_tied(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    trained(model, tmp_path / "adapter", target_modules=["lm_head"])
    result = run("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out", "--keep-tied")
    assert result.exit_code == 2
    assert "lm_head.weight and model.embed_tokens.weight have different updates" in result.stderr
    assert "leave out --keep-tied" in result.stderr
    assert not (tmp_path / "out").exists()
