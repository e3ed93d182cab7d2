"""Pipelines with two text encoders, as transformers saves them: an adapter changes the one that it names."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.cli.command import Command

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet_torch")
WIDTH = 16
merge = Command("merge").good


def pipeline(folder: Path, encoders: tuple[str, ...]) -> None:
    """Text encoders of one size, as no real pipeline has them, so that names alone tell them apart."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(vocab_size=20, max_position_embeddings=8, projection_dim=8, **sizes)
    for seed, encoder in enumerate(encoders):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = (
                transformers.CLIPTextModel if encoder == "text_encoder" else transformers.CLIPTextModelWithProjection
            )
            model(config).save_pretrained(folder / encoder)


def pair(name: str, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    down, up = rng.standard_normal((2, WIDTH)), rng.standard_normal((WIDTH, 2))
    arrays = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.array(2.0)}
    return {f"{name}.{part}": array.astype(np.float32) for part, array in arrays.items()}


@pytest.mark.parametrize(
    ("prefixes", "encoders"),
    [
        ({"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}, ("text_encoder", "text_encoder_2")),
        ({"lora_te1_": "text_encoder"}, ("text_encoder", "text_encoder_2")),
        ({"lora_te2_": "text_encoder_2"}, ("text_encoder", "text_encoder_2")),
        ({"lora_te_": "text_encoder"}, ("text_encoder",)),
    ],
    ids=["both", "first", "second", "one"],
)
def test_a_kohya_file_changes_the_encoders_that_it_names(prefixes, encoders, tmp_path: Path) -> None:
    pipeline(tmp_path / "base", encoders)
    inner = "text_model_encoder_layers_0_self_attn_q_proj"
    arrays = {key: array for seed, name in enumerate(prefixes) for key, array in pair(f"{name}{inner}", seed).items()}
    save_file(arrays, tmp_path / "kohya.safetensors")
    merge(tmp_path / "kohya.safetensors", "--base", tmp_path / "base", "-o", tmp_path / "merged")
    names = {encoder: name for name, encoder in prefixes.items()}
    for encoder in encoders:
        before, after = (load_file(tmp_path / side / encoder / "model.safetensors") for side in ("base", "merged"))
        for key, W in before.items():
            if encoder in names and key.endswith("self_attn.q_proj.weight"):
                up, down = (arrays[f"{names[encoder]}{inner}.lora_{side}.weight"] for side in ("up", "down"))
                np.testing.assert_allclose(after[key], W + up @ down, atol=1e-5)  # α/r is 1
            else:
                np.testing.assert_array_equal(after[key], W)
