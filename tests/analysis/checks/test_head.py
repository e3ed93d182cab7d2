"""A head that was lost: what PEFT refuses is an error, what may be in the base is a warning."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from tests.bases import edit_config
from tests.marks import when_used

peft, transformers = when_used("peft"), when_used("transformers")
EXAMPLE = Path(__file__).parents[3] / "examples" / "adapters" / "reuters-r8-r8-seed0"
OF_CLASS = {"base_model_class": "BertForSequenceClassification", "parent_library": "transformers"}


def adapter(folder: Path, *, head: bool = False, **config: object) -> Path:
    """The example with other settings, and without its head."""
    shutil.copytree(EXAMPLE, folder)
    if not head:
        file = folder / "adapter_model.safetensors"
        kept = {key: X for key, X in load_file(file).items() if "classifier" not in key}
        save_file(kept, file, metadata={"format": "pt"})
    edit_config(folder, **config)
    return folder


def base(folder: Path, *names: str) -> Path:
    folder.mkdir()
    weights = [key for key in loralens.load(EXAMPLE) if "attention" in key]
    tensors = {f"{key}.weight": np.ones((384, 384), np.float32) for key in weights}
    save_file(tensors | {name: np.ones((8, 384), np.float32) for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder


def levels(*arguments: Path, **options: Path) -> list[str]:
    return [one.level for one in loralens.doctor(*arguments, **options).findings if one.code == "head-missing"]


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_a_task_without_its_head_is_an_error(task: str, tmp_path: Path) -> None:
    lost = adapter(tmp_path / "lost", task_type=task)
    (found,) = [one for one in loralens.doctor(lost).findings if one.code == "head-missing"]
    assert found.level == "error"
    assert task in found.evidence
    assert "train again" in found.fix


def test_a_class_without_its_head_depends_on_the_base(tmp_path: Path) -> None:
    lost = adapter(tmp_path / "lost", task_type=None, auto_mapping=OF_CLASS, modules_to_save=None)
    assert levels(lost) == ["warning"]
    assert levels(lost, base=base(tmp_path / "bare")) == ["error"]
    assert levels(lost, base=base(tmp_path / "tuned", "classifier.weight")) == []


@pytest.mark.parametrize(
    "config",
    [
        {"task_type": "CAUSAL_LM", "modules_to_save": None},
        {"task_type": None, "auto_mapping": {"base_model_class": ["hostile"]}, "modules_to_save": None},
        {"task_type": ["hostile"], "auto_mapping": "hostile", "modules_to_save": {"hostile": 1}},
    ],
)
def test_other_tasks_and_hostile_settings_need_none(config: dict[str, object], tmp_path: Path) -> None:
    assert levels(adapter(tmp_path / "lost", **config)) == []


@pytest.mark.parametrize(
    "config",
    [
        {"task_type": "SEQ_CLS"},
        {"task_type": None, "auto_mapping": OF_CLASS, "modules_to_save": None},
    ],
)
def test_a_head_that_is_there_is_not_missed(config: dict[str, object], tmp_path: Path) -> None:
    assert levels(adapter(tmp_path / "whole", head=True, **config)) == []


def test_a_head_without_the_prefix_is_not_lost(tmp_path: Path) -> None:
    """PEFT refuses the file as well, but the head is there, and conversion fixes the file."""
    bare = adapter(tmp_path / "bare", head=True)
    file = bare / "adapter_model.safetensors"
    save_file({key.removeprefix("base_model.model."): X for key, X in load_file(file).items()}, file)
    (found,) = [one for one in loralens.doctor(bare).findings if one.code == "head-missing"]
    assert "convert" in found.fix
    loralens.convert(bare, to="peft", output=tmp_path / "fixed")
    assert levels(tmp_path / "fixed") == []


@pytest.mark.slow
def test_peft_refuses_what_is_called_an_error(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=64, num_labels=8, vocab_size=64
    )
    lost = adapter(tmp_path / "lost")
    with pytest.raises(KeyError, match="classifier"):
        peft.PeftModel.from_pretrained(transformers.BertForSequenceClassification(config), str(lost))
    whole = adapter(tmp_path / "whole", head=True)
    peft.PeftModel.from_pretrained(transformers.BertForSequenceClassification(config), str(whole))
