"""A head that an adapter brings is loaded by the class that has it: labels and class in ``config.json``."""

import json
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import Adapter
from loralens.core import Extra, LazyArray
from tests.cli.test_merge import done
from tests.merging.made import streamed
from tests.merging.merged import plan_merge


def planned(config, *, labels=3, head="classifier", said=None, metadata=None):
    """The plan for an adapter with a head of its own on a base without one."""
    one = loralens.LowRank(np.ones((4, 1), np.float32), np.ones((1, 4), np.float32), 1.0)
    extra = {
        f"{head}.{name}": Extra("saved", head, LazyArray.of(np.ones(shape, np.float32)), name)
        for name, shape in (("weight", (labels, 4)), ("bias", (labels,)))
    }
    made = Adapter(modules={"a": one}, extra=extra, config=said or {}, metadata=metadata)
    return plan_merge([(made, 1.0)], {"a.weight": streamed(np.ones((4, 4), np.float32))}, config=config)


BERT = {"architectures": ["BertModel"], "vocab_size": 24}


@pytest.mark.parametrize(
    ("base", "said", "name"),
    [
        ("BertModel", {"task_type": "SEQ_CLS"}, "BertForSequenceClassification"),
        ("GPT2LMHeadModel", {"task_type": "SEQ_CLS"}, "GPT2ForSequenceClassification"),
        ("ViTModel", {"auto_mapping": {"base_model_class": "ViTForImageClassification"}}, "ViTForImageClassification"),
        ("BertModel", {"auto_mapping": {"base_model_class": "BertForMaskedLM"}}, None),
        ("BertModel", {}, None),
    ],
)
def test_class_and_labels(base, said, name):
    found = planned({**BERT, "architectures": [base]}, said=said)
    assert found.config.get("architectures") == ([name] if name else None)
    assert found.config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert found.config["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    text = " ".join(found.notes)
    assert "3 labels for classifier.weight" in text
    assert (f"says {name} now" if name else "nothing says which class") in text


@pytest.mark.parametrize("head", ["classifier.dense", "pre_classifier", "pooler", "lm_head"])
def test_other_modules_say_nothing(head):
    assert not planned(BERT, head=head, said={"task_type": "SEQ_CLS"}).config


KINDS = {
    "bert": ("Bert", {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
             "query"),
    "llama": ("Llama", {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                        "pad_token_id": 0}, "q_proj"),
}  # fmt: skip


@pytest.mark.usefixtures("quiet_torch")
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_the_head_with_the_encoder(kind: str, tmp_path: Path) -> None:
    """The base is the encoder alone, as it is published; the head comes with the adapter, under five labels."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    name, sizes, target = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=24, **sizes)
    getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path / "base")
    assert "id2label" not in json.loads((tmp_path / "base" / "config.json").read_text())
    whole = getattr(transformers, f"{name}ForSequenceClassification").from_pretrained(tmp_path / "base", num_labels=5)
    lora = peft.LoraConfig(r=2, target_modules=[target], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(whole, lora).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    adapted.save_pretrained(tmp_path / "adapter")

    done("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    merged, told = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    assert all("pooler" in key for key in told["unexpected_keys"])  # RoBERTa's head has none
    assert type(merged).__name__ == merged.config.architectures[0] == f"{name}ForSequenceClassification"
    assert merged.config.num_labels == 5
    tokens = torch.arange(1, 23).reshape(2, 11)
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(tokens).logits, adapted(tokens).logits, rtol=1e-5, atol=1e-6)

    done("unmerge", tmp_path / "out", "-o", tmp_path / "back")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "base" / file).read_bytes()
