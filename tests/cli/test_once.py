"""``--once``: every verb that reads an adapter takes the out_proj of an ``nn.MultiheadAttention`` once."""

import json
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from loralens.cli.main import COMMANDS, main
from tests.cli.command import Command

OUT = "attn.out_proj"
run = Command().good


def attention(folder: Path, seed: int = 0) -> Path:
    """An adapter of an attention as PEFT saves it: the pair of in_proj under the attention's own name."""
    rng = np.random.default_rng(seed)
    shapes = {"attn": (24, 8), "attn.base_layer.out_proj": (8, 8), "fc": (8, 8)}
    arrays = {}
    for name, (out, in_) in shapes.items():
        arrays[f"base_model.model.{name}.lora_A.weight"] = rng.standard_normal((2, in_)).astype(np.float32)
        arrays[f"base_model.model.{name}.lora_B.weight"] = rng.standard_normal((out, 2)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(arrays, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["attn", "fc"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return attention(tmp_path / "adapter")


def norm(path: Path) -> float:
    return float(np.linalg.norm(loralens.load(path)[OUT].dense()))


def test_every_verb_that_reads_an_adapter_offers_it() -> None:
    context = click.Context(main)
    commands = {name: main.get_command(context, name) for name in COMMANDS}
    options = {name: {one.name for one in command.params} for name, command in commands.items() if command}
    assert all("once" in names for names in options.values() if "format" in names and "alpha" in names)
    assert sum({"format", "alpha", "scale", "once"} <= names for names in options.values()) >= 20
    assert "once" in options["survey"]


@pytest.mark.parametrize("verb", ["scale", "combine", "compress", "convert"])
def test_what_is_written_has_half_the_update(verb: str, adapter: Path, tmp_path: Path) -> None:
    words = {"scale": ["--by", "1"], "combine": [adapter], "compress": ["--rank", "2"], "convert": ["--to", "peft"]}
    other = attention(tmp_path / "other", seed=1) if verb == "combine" else None
    more = [other] if other else words[verb]
    for name, flags in (("plain", ()), ("once", ("--once",))):
        run(verb, adapter, *more, "-o", tmp_path / name, *flags)
    assert norm(tmp_path / "plain") == pytest.approx(2 * norm(tmp_path / "once"), rel=1e-5)
    fc = [loralens.load(tmp_path / name)["fc"].dense() for name in ("plain", "once")]
    np.testing.assert_allclose(fc[0], fc[1], atol=1e-6)


def numbers(record: object, name: str = "", *, of: str = "") -> list[float]:
    """Every number in a record under a name that holds ``of``, in its order."""
    if isinstance(record, dict):
        return [number for key, one in record.items() for number in numbers(one, key, of=of)]
    if isinstance(record, list):
        return [number for one in record for number in numbers(one, name, of=of)]
    plain = isinstance(record, int | float) and not isinstance(record, bool)
    return [float(record)] if plain and of in name else []  # type: ignore[arg-type]


def test_equal_reads_both_so(adapter: Path, tmp_path: Path) -> None:
    arrays = load_file(adapter / "adapter_model.safetensors")
    plain = {"attn.base_layer": "attn", "attn.lora": "attn.in_proj_weight.lora"}  # no attention, as PEFT sees it
    for old, new in plain.items():
        arrays = {key.replace(old, new): array for key, array in arrays.items()}
    (tmp_path / "plain").mkdir()
    save_file(arrays, tmp_path / "plain" / "adapter_model.safetensors")
    shutil.copy(adapter / "adapter_config.json", tmp_path / "plain")
    assert run("equal", adapter, tmp_path / "plain", "--once").exit_code == 0
    assert Command("equal").run(adapter, tmp_path / "plain").exit_code == 1
