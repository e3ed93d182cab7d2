"""The fixes of `loralens doctor`: every warning and error has one, and every command in them does what it says."""

import ast
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from tests.bases import edit_config
from tests.cli.command import Command
from tests.verbs.low_bit_bases import nf4_base, pair_adapter

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "adapters"
SPOILT = "bert.encoder.layer.2.attention.self.query"


def test_every_warning_and_error_in_the_source_has_a_fix() -> None:
    """A call with a level that is not written out counts as well."""
    without = []
    for file in sorted((ROOT / "loralens").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in ("Finding", "Diagnosis"):
                continue
            level = node.args[0] if node.args else None
            given = [*node.args[3:4], *(keyword.value for keyword in node.keywords if keyword.arg in ("fix", None))]
            empty = not given or (isinstance(given[0], ast.Constant) and not given[0].value)
            if empty and not (isinstance(level, ast.Constant) and level.value == "note"):
                without.append(f"{file.name}:{node.lineno}")
    assert without == []


def commands(fix: str) -> list[list[str]]:
    """The commands that a fix names, as words without `loralens`."""
    return [shlex.split(text)[1:] for text in re.findall(r"`(loralens [^`]+)`", fix)]


def fixes(code: str, *paths: Path, base: Path | None = None, **options: Any) -> list[str]:
    return [one.fix for one in loralens.doctor(*paths, base=base, **options).findings if one.code == code]


def changed(folder: Path, change: Callable[[dict[str, Any]], None] = lambda tensors: None, **config: Any) -> Path:
    """An adapter of the examples with other tensors and settings."""
    shutil.copytree(EXAMPLES / "reuters-r8-r8-seed0", folder)
    file = folder / "adapter_model.safetensors"
    tensors = dict(load_file(file))
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    edit_config(folder, **config)
    return folder


def multiplied(factor: float) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({key: X * factor for key, X in tensors.items() if f"{SPOILT}.lora_B" in key})


def narrow(tensors: dict[str, Any]) -> None:
    """A module with a weight of 4 × 384."""
    for key in [key for key in tensors if f"{SPOILT}.lora_B" in key]:
        tensors[key] = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("code", "change", "config"),
    [
        ("zero-update", multiplied(0), {}),
        ("outlier", multiplied(100), {}),
        ("scale-negative", multiplied(1), {"lora_alpha": -16}),
        ("rank-unused", multiplied(1), {}),
        ("rank-impossible", narrow, {}),
    ],
)
def test_a_command_that_writes_an_adapter_removes_its_finding(
    code: str, change: Callable[[dict[str, Any]], None], config: Any, tmp_path: Path
) -> None:
    sick = changed(tmp_path / "my adapter", change, **config)
    (command,) = {tuple(words) for fix in fixes(code, sick) for words in commands(fix)}
    Command().good(*command)
    written = Path(command[command.index("-o") + 1])
    assert written.parent == tmp_path
    assert fixes(code, written) == []
    kept = set(loralens.load(sick)) - ({SPOILT} if code in ("zero-update", "outlier") else set())
    assert set(loralens.load(written)) == kept


def test_commands_that_compare_two_adapters(tmp_path: Path) -> None:
    first = changed(tmp_path / "first")
    noise = np.random.default_rng(0)

    def blurred(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if "lora_B" in key]:
            tensors[key] += (0.08 * tensors[key].std() * noise.standard_normal(tensors[key].shape)).astype(np.float32)

    near = changed(tmp_path / "near", blurred)
    nearly = changed(tmp_path / "nearly", multiplied(1.003))
    for code, second in (("near-copy", near), ("combination", nearly), ("shared-initialisation", near)):
        (fix,) = fixes(code, first, second)
        (command,) = commands(fix)
        assert "cosine" in Command().good(*command).stdout
    # What is called practically the same need not be equal, and so the fix does not say that it is.
    assert Command("equal").run(first, nearly).exit_code == 1
    assert "practically the same" in Command("doctor").good(first, nearly).stdout


def weights(folder: Path, adapter: Path, ratio: float) -> Path:
    """A base in bfloat16 for an adapter, of whose weights ‖ΔW‖ is ``ratio``."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, module in loralens.load(adapter).items():
        W = rng.standard_normal(module.shape)
        W *= np.linalg.norm(module.dense()) / ratio / np.linalg.norm(W)
        tensors[f"{name}.weight"] = W.astype(ml_dtypes.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder


@pytest.mark.parametrize(("code", "ratio"), [("below-rounding", 1e-4), ("merge-lossy", 3e-3)])
def test_a_merge_with_the_named_dtype_loses_nothing(code: str, ratio: float, tmp_path: Path) -> None:
    adapter = EXAMPLES / "reuters-r8-r8-seed0"
    base = weights(tmp_path / "base", adapter, ratio)
    ((verb, *options),) = {tuple(words) for fix in fixes(code, adapter, base=base) for words in commands(fix)}
    Command().good(verb, adapter, "--base", base, "-o", tmp_path / "merged", *options)
    assert fixes(code, adapter, base=base, dtype=options[options.index("--dtype") + 1]) == []


def test_the_commands_about_merges_into_codes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = nf4_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4, "num_key_value_heads": 4}))
    for name, size in (("strong", 2e-3), ("weak", 1e-6)):
        loralens.save(pair_adapter(size), tmp_path / name)
    (fix,) = fixes("codes-merge", Path("strong"), base=Path("base"))
    (command,) = commands(fix)
    Command().good(*command)
    (fix,) = set(fixes("codes-weak", Path("weak"), base=Path("base")))
    convert, merge = commands(fix)
    Command().good(*convert, "weak", "-o", "weak.gguf", "--base", base)
    Command().good(*merge, "weak", "--base", base, "-o", "merged")
