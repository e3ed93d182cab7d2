"""Which files make a model: shards, indices, other weights, what lies beside."""

from pathlib import Path

import numpy as np
import pytest

from loralens import FormatError, OptionError
from tests.bases import sharded, single, tensors
from tests.formats.files import model_files, weights


def test_a_pipeline(tmp_path: Path) -> None:
    for name in ("unet", "vae"):
        single(tmp_path / "p" / name, {"x": np.ones(2, np.float32)}, name="diffusion_pytorch_model.safetensors")
    (tmp_path / "p" / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    (tmp_path / "p" / "scheduler").mkdir()
    (tmp_path / "p" / "scheduler" / "config.json").write_text("{}")
    files = model_files(tmp_path / "p")
    assert set(files.tensors) == {"unet.x", "vae.x"}
    assert [shard.name for shard in files.shards] == [
        f"{n}/diffusion_pytorch_model.safetensors" for n in ("unet", "vae")
    ]
    assert files.left_out == ("vae/diffusion_pytorch_model.fp16.safetensors",)
    assert "scheduler/config.json" in files.companions


def test_other_weights_are_not_beside(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", tensors())
    for name in ("model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "a/tf_model.h5", "x.gguf"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("")
    files = model_files(folder)
    assert files.left_out == (
        "a/tf_model.h5",
        "model.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "x.gguf",
    )
    assert files.companions == ["config.json", "tokenizer.json"]


def broken(folder: Path, how: str) -> None:
    index = folder / "model.safetensors.index.json"
    shard = folder / "model-00002-of-00003.safetensors"
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif how == "no map":
        index.write_text("{}")
    elif how == "two":
        index.unlink()
    else:
        for file in folder.glob("*.safetensors*"):
            file.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "model-00002-of-00003.safetensors is named by model.safetensors.index.json, but is missing"),
        ("truncated", "the file is truncated"),
        ("no map", "has no weight_map"),
        ("two", "holds several files and no index"),
        ("none", "holds no safetensors weights"),
    ],
)
def test_what_is_wrong_is_said_alike_by_both_readers(how: str, message: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", tensors())
    broken(folder, how)
    for read in (model_files, weights):
        with pytest.raises((FormatError, OptionError), match=message.replace(".", r"\.")):
            read(folder)
