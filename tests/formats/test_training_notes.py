"""What the metadata of adapters of image models say about their training; hostile metadata are harmless."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from loralens.formats.records.training_notes import LONGEST, MOST_TAGS, Tag, TrainingNotes
from tests.cli.command import Command

inspect = Command("inspect")
SD_SCRIPTS = {
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "ss_network_alpha": "2.0",
    "ss_network_args": '{"conv_dim": "4"}',
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_sd_model_name": "sd_xl_base_1.0.safetensors",
    "ss_sd_scripts_commit_hash": "0123",
    "ss_output_name": "sks_dog",
    "ss_steps": "1200",
    "ss_max_train_steps": "1600",
    "ss_resolution": "(1024, 1024)",
    "ss_learning_rate": "None",
    "ss_unet_lr": "0.0001",
    "ss_training_finished_at": "1700003600.5",
    "ss_dataset_dirs": '{"10_sks dog": {"n_repeats": 10, "img_count": 24}}',
    "ss_tag_frequency": '{"10_sks dog": {"ball": 3, "sks dog": 24, "grass": 11}}',
}


def notes(**metadata: str) -> TrainingNotes:
    found = TrainingNotes.of(metadata)
    assert found
    return found


def test_what_sd_scripts_writes() -> None:
    found = notes(**SD_SCRIPTS)
    assert found.values == {
        "title": "sks_dog",
        "architecture": "sdxl_base_v1-0",
        "base_file": "sd_xl_base_1.0.safetensors",
        "trainer": "sd-scripts",
        "network": "networks.lora (dim 4, alpha 2.0, conv_dim=4)",
        "steps": "1200 of 1600",
        "resolution": "1024, 1024",
        "learning_rate": "0.0001",
        "date": "2023-11-14 23:13 UTC",
    }
    assert found.trigger_words == ["sks dog"]
    assert found.tags == [Tag("sks dog", 24), Tag("grass", 11), Tag("ball", 3)]
    assert found.record()["folders"] == [{"name": "sks dog", "images": 24, "repeats": 10}]


def test_what_modelspec_and_ai_toolkit_write() -> None:
    spec = {"trigger_phrase": "ohwx man", "title": "Ohwx", "date": "2025-01-02", "license": "CC0"}
    toolkit = {"software": '{"name": "ai-toolkit", "version": "0.1"}', "training_info": '{"step": 2000, "epoch": 3}'}
    found = notes(**{f"modelspec.{key}": text for key, text in spec.items()}, **toolkit)
    assert found.trigger_words == ["ohwx man"]
    expected = {"title": "Ohwx", "license": "CC0", "trainer": "ai-toolkit 0.1", "steps": "2000", "epochs": "3"}
    assert found.values == expected | {"date": "2025-01-02"}


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"ss_steps": "None", "ss_tag_frequency": "{}"},
    ],
)
def test_a_file_that_says_nothing(metadata: dict[str, str] | None) -> None:
    assert TrainingNotes.of(metadata) is None


HOSTILE = {
    "ss_output_name": "evil\x1b[2J\u202e" + "x" * 100_000,
    "ss_steps": "9" * 6000,
    "ss_training_finished_at": "1e400",
    "ss_training_started_at": "-1e17",
    "ss_dataset_dirs": "[" * 100_000,
    "ss_datasets": '{"a": ' * 100_000,
    "ss_network_args": "[1]",
    "ss_tag_frequency": json.dumps({
        "f": {"t\x1b[31m": 5, "n": 10**400, "y": -3, "z": "q", "b": True, "y" * 9999: 1},
        "g": 3,
        "h": {f"tag {i}": 1 for i in range(1000)},
    }),
    "software": "17",
    "training_info": '{"step": [1]}',
}  # fmt: skip


def test_hostile_metadata_are_cut_and_escaped() -> None:
    found = notes(**HOSTILE)
    assert found.values["title"].startswith(r"evil\x1b[2J\u202exxx")
    texts = [*found.values.values(), *found.trigger_words, *(tag.tag for tag in found.tags)]
    assert max(map(len, texts)) <= LONGEST + 20
    assert all(text.isprintable() for text in texts)
    assert found.tags[0] == Tag(r"t\x1b[31m", 5)
    assert (len(found.tags), found.tag_count) == (MOST_TAGS, 1002)
    assert set(found.values) == {"title", "steps"}
    assert not found.folders


def test_inspect_shows_a_block_and_json(tmp_path: Path) -> None:
    name = "lora_unet_middle_block_1_proj_in"
    tensors = {f"{name}.lora_up.weight": np.ones((8, 2), "f4"), f"{name}.lora_down.weight": np.ones((2, 8), "f4")}
    for file, metadata in (("said", SD_SCRIPTS), ("evil", HOSTILE), ("silent", None)):
        save_file(tensors, tmp_path / f"{file}.safetensors", metadata)
    shown = inspect.good(tmp_path / "said.safetensors")
    assert "training, as the file says" in shown.output
    assert "Trigger words: sks dog.\n" in shown.output
    assert "tags           sks dog (24), grass (11), ball (3)\n" in shown.output
    assert "\x1b" not in inspect.good(tmp_path / "evil.safetensors").output
    assert "training, as" not in inspect.good(tmp_path / "silent.safetensors").output


def test_the_notes_go_with_the_adapter_from_program_to_program(tmp_path: Path) -> None:
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_up.weight": np.ones((640, 2), "f4"), f"{name}.lora_down.weight": np.ones((2, 2048), "f4")}
    header = {**SD_SCRIPTS, "modelspec.title": "Dog"}
    save_file(tensors, tmp_path / "kohya.safetensors", header)
    for source, target in (("kohya", "diffusers"), ("diffusers", "comfyui"), ("comfyui", "kohya")):
        loralens.convert(
            tmp_path / f"{source}.safetensors", to=target, output=tmp_path / f"{target}.safetensors", overwrite=True
        )
        metadata = loralens.load(tmp_path / f"{target}.safetensors").metadata
        found = TrainingNotes.of(metadata)
        assert found
        assert (found.trigger_words, found.values["title"], found.tags[0]) == (["sks dog"], "Dog", Tag("sks dog", 24))
